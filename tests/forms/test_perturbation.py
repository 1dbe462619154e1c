"""Scratch perturbation: the forward pass sees theta + eps z, and theta is untouched."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from buffers import Largest
from models import ARCHITECTURES, architecture, tiny_model
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from mezo import MeZO, noise
from mezo.errors import InputError
from mezo.noise import Move

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scratch(model, eps=1e-2, seed=3):
    """Direction 0 of step 0 for all of a model's parameters, and its optimizer."""
    optimizer = MeZO(model.named_parameters(), eps=eps, seed=seed, perturbation="scratch")
    return optimizer.direction(0)


def materialised(model, sign, eps=1e-2, seed=3):
    """A copy of the model whose weights are theta + sign eps z."""
    moved = copy.deepcopy(model)
    move = Move(0, 0, 1.0, sign * eps, noise.ROUND_PERTURBED)
    for name, p in moved.named_parameters():
        if p.requires_grad:
            noise.apply_(p.detach(), noise.tensor_key(seed, name), [move])
    return moved


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


def assert_materialised(model, call):
    """Both halves have the bits of a model whose weights are perturbed for good."""
    before, perturbed = bits(model), scratch(model)
    with torch.no_grad():
        plain = call(model)
        for sign in (+1, -1):
            with perturbed.at(sign):
                found = call(model)
            assert torch.equal(found, call(materialised(model, sign)))
            assert not torch.equal(found, plain)
        assert torch.equal(call(model), plain)
    assert same(bits(model), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["opt", "llama", "qwen2", "gpt2", "bert", "roberta"])
def test_models_see_the_perturbed_weights(name, dtype):
    """Tied embeddings, Conv1D, layer norms, RMS norms, positions: all of them."""
    model = tiny_model(name).to(dtype)
    words = torch.randint(5, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    assert_materialised(model, lambda m: m(input_ids=words).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_sees_the_perturbed_weights(name):
    model = architecture(name, torch.bfloat16)
    words = torch.randint(5, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    given = {"decoder_input_ids": words} if name == "t5" else {}
    assert_materialised(model, lambda m: m(input_ids=words, use_cache=False, **given).logits)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False),
        IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"], init_ia3_weights=False),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: str(config.peft_type.value),
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_see_the_perturbed_weights(config):
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = get_peft_model(tiny_model("opt").float(), copy.deepcopy(config))
    model = model.to(torch.bfloat16).eval()
    words = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_materialised(model, lambda m: m(input_ids=words).logits)


class Unusual(torch.nn.Module):
    """A bias tied across nested modules, weights read from outside, in a list, by slices."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.inner = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        self.inner[1].bias = self.inner[0].bias
        self.stack = torch.nn.Parameter(torch.randn(3, 8, 8, generator=generator))
        self.lstm = torch.nn.LSTM(8, 8)
        self.scale = torch.nn.Parameter(torch.randn(8, generator=generator))

    def forward(self, x):
        x = x @ self.inner[0].weight.T + self.inner[1].bias  # not by calling the module
        x = x @ self.stack[-1] + x @ self.stack[torch.tensor(1)] + x @ self.stack.sum(0)
        x = self.inner(x) * self.scale.exp()
        return self.lstm(torch.cat([x, self.scale.expand_as(x)]))[0]


def test_ties_outside_reads_and_slices_are_perturbed():
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = Unusual()
    assert_materialised(model, lambda m: m(torch.ones(2, 3, 8)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_untouched_by_any_number_of_estimates(dtype):
    model = tiny_model("llama").to(dtype)
    before, words = bits(model), torch.arange(5, 25).view(2, 10)
    optimizer = MeZO(model.named_parameters(), lr=0.0, seed=1, perturbation="scratch")
    for step in range(20):

        def loss(step=step):
            if step % 5 == 4:
                raise RuntimeError("out of memory")
            return model(input_ids=words, labels=words).loss

        with nullcontext() if step % 5 < 4 else pytest.raises(RuntimeError):
            optimizer.estimate(loss)
        if step % 5 < 4:
            optimizer.step()
    assert same(bits(model), before)
    assert optimizer.param_groups[0]["step"] == 20


def test_the_form_follows_the_weights():
    for dtype, expected in {torch.float32: "in_place", torch.bfloat16: "scratch"}.items():
        for asked in (None, "in_place", "scratch"):
            w = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
            assert MeZO([("w", w)], perturbation=asked).perturbation == (asked or expected)


def test_both_forms_give_the_same_estimate():
    """float64: in place, theta - eps z is off by two roundings of |theta| + 2 eps |z| < 4."""
    model = tiny_model("gpt2")
    words = torch.arange(5, 25).view(2, 10)
    found = []
    for form in ("in_place", "scratch"):
        optimizer = MeZO(model.named_parameters(), seed=1, perturbation=form)
        found.append(optimizer.estimate(lambda: model(input_ids=words, labels=words).loss))
    gradient = 1e3  # of the loss by any direction: far above this model's
    bound = gradient * 2 * 2.0**-53 * 4 / (2 * 1e-3) + 1e3 * 2.0**-53 / 2e-3
    assert abs(found[0].projected_grad - found[1].projected_grad) < bound


def test_scratch_is_what_one_operation_reads_and_of_an_embedding_the_rows():
    model = torch.nn.Sequential(torch.nn.Embedding(5000, 8), torch.nn.Linear(8, 60)).bfloat16()
    words = torch.arange(4).view(1, 4)
    perturbed = scratch(model)
    with torch.no_grad(), Largest() as largest, perturbed.at(+1):
        model(words)
    assert largest.elements == 8 * 60  # not 5000 * 8, and not all of them together
    assert perturbed.read == {name for name, _ in model.named_parameters()}


def test_a_lookup_of_more_tokens_than_rows_draws_the_matrix_once():
    model = torch.nn.Embedding(7, 3).bfloat16()
    assert_materialised(model, lambda m: m(torch.arange(7).repeat(5, 2)))
    with pytest.raises(IndexError), scratch(model).at(+1):
        model(torch.tensor([7]))


def test_compiled_models_are_run_uncompiled():
    model = torch.nn.Linear(8, 8).bfloat16()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.ones(1, 8).bfloat16())
    assert_materialised(model, lambda m: m(torch.ones(1, 8).bfloat16()))
    with torch.no_grad():
        with scratch(model).at(+1):
            found = compiled(torch.ones(1, 8).bfloat16())
        assert torch.equal(found, materialised(model, +1)(torch.ones(1, 8).bfloat16()))


class Viewed(torch.nn.Module):
    """Reads its weight through a view that was made when it was built."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 4))
        self.unused = torch.nn.Parameter(torch.ones(3))
        self.rows = self.weight.detach().t()

    def forward(self):
        return (self.rows * torch.arange(4.0)).sum()


def test_a_weight_read_past_torchs_functions_is_refused_by_name():
    model = Viewed()
    optimizer = MeZO(model.named_parameters(), perturbation="scratch")
    with pytest.raises(InputError, match="reads weight, unused past torch's functions"):
        optimizer.step(model)
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters())
    MeZO([("unused", model.unused)], perturbation="scratch").step(model)  # truly unused: fine


def test_a_forward_pass_that_writes_to_a_weight_is_refused_by_name():
    w = torch.nn.Parameter(torch.ones(4))
    embedding = torch.nn.Embedding(4, 2, max_norm=1.0)
    for write in (
        lambda: w.mul_(2),
        lambda: torch.add(w, 1, out=w),
        lambda: w.__setitem__(0, 1),
        lambda: w.data_ptr(),
    ):
        with pytest.raises(InputError, match=r"parameter w|reads w by its address"):
            MeZO([("w", w)], perturbation="scratch").step(lambda write=write: write() or 0.0)
    optimizer = MeZO(embedding.named_parameters(), perturbation="scratch")
    with pytest.raises(InputError, match=r"weight.*max_norm"):
        optimizer.step(lambda: embedding(torch.arange(3)).sum())
    assert torch.equal(w, torch.ones(4))


def test_metadata_costs_nothing():
    """What asks for no element draws none."""
    w = torch.nn.Parameter(torch.ones(4, 4))
    perturbed = scratch(torch.nn.ParameterDict({"w": w}))
    with perturbed.at(+1):
        assert (w.shape, w.dtype, w.device.type, w.dim(), len(w)) == ((4, 4), w.dtype, "cpu", 2, 4)
        assert w.is_floating_point()
        assert not perturbed.read
        w.sum()
    assert perturbed.read == {"w"}


@pytest.mark.parametrize("num_samples", [1, 3])
def test_nothing_of_a_parameters_size_lives_on_after_a_step(num_samples):
    model = torch.nn.Linear(64, 64).bfloat16()
    optimizer = MeZO(model.named_parameters(), lr=1e-3, num_samples=num_samples)
    x = torch.ones(1, 64).bfloat16()
    optimizer.step(lambda: model(x).float().sum())
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    assert len([t for t in alive if t.shape == (64, 64)]) == 1
    assert not optimizer.state
