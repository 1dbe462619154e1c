"""Forward passes under low-rank directions: matrices with small factors, one sign or both."""

import copy
import math

import pytest
import torch
from buffers import Largest
from models import ARCHITECTURES, Counted, architecture, tiny_model
from peft import LoraConfig, get_peft_model
from tiny_tokenizers import byte_bpe, word_piece
from torch.nn import functional as F

from mezo import MeZO, noise, tasks, trajectory
from mezo.closures import Paired, double
from mezo.errors import InputError
from mezo.forms.one_pass import Unpaired
from mezo.noise import Move
from mezo.objectives import form_for
from mezo.tasks import Example, custom_task

EPS, SEED = 1e-2, 3
WORDS = torch.randint(5, 90, (3, 20), generator=torch.Generator().manual_seed(0))
MODELS = ["opt", "llama", "qwen2", "gpt2", "bert", "roberta"]


def optimizer_of(model, rank=1, **options):
    options = {"eps": EPS, "seed": SEED, "perturbation": "low_rank", "rank": rank} | options
    return MeZO(model.named_parameters(), **options)


def low_rank(model, **options):
    """Direction 0 of step 0 for all of a model's parameters."""
    optimizer = optimizer_of(model, **options)
    return optimizer.direction(0)


def drawn(name, factor, size, rank, step=0):
    """U or V, as docs/noise.md has them."""
    z = noise.draw(noise.tensor_key(SEED, f"{name}\0{factor}"), 0, size * rank, step=step)
    return z.double().view(size, rank)


def materialised(model, sign, rank=1):
    """A copy whose weights are theta + sign eps z."""
    moved = copy.deepcopy(model)
    for name, p in moved.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() == 2:
            u, v = (drawn(name, factor, n, rank) for factor, n in zip("UV", p.shape, strict=True))
            p.data = (p.double() + sign * EPS * u @ v.T / math.sqrt(rank)).to(p.dtype)
        else:
            noise.apply_(p.detach(), noise.tensor_key(SEED, name), [Move(0, 0, 1.0, sign * EPS)])
    return moved


def rounding(*tensors):
    """What float64 may differ by: some 100 operations in turn, on sums of up to 100 terms."""
    return 100 * 100 * 2.0**-53 * max(float(t.abs().max()) for t in tensors)


def assert_materialised(model, call, rank=1):
    """Either half is that of a model whose weights are perturbed for good; weights stay."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    perturbed, halves = low_rank(model, rank=rank), []
    with torch.no_grad():
        plain = call(model)
        for sign in (+1, -1):
            with perturbed.at(sign):
                found = call(model)
            expected = call(materialised(model, sign, rank))
            assert (found - expected).abs().max() <= rounding(found)
            assert (found - plain).abs().max() > 1e6 * rounding(found)
            halves.append(found)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return perturbed, torch.cat(halves)


def adapted(name):
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(tiny_model(name), config).double().eval()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", [*MODELS, "lora"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_models_see_the_perturbed_weights_in_two_passes_and_in_one(name, rank):
    """Tied embeddings, Conv1D, positions of one row for all, norms by halves, adapters."""
    model = adapted("opt") if name == "lora" else tiny_model(name)
    perturbed, halves = assert_materialised(model, lambda m: m(input_ids=WORDS).logits, rank)
    assert perturbed.read == {name for name, p, _ in perturbed.rows if p.requires_grad}
    with torch.no_grad(), perturbed.both(len(WORDS)):
        together = model(**double({"input_ids": WORDS})).logits
    assert (together - halves).abs().max() <= rounding(halves)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_sees_them_and_stacking_is_right_or_refused(name):
    """float32, as experts want it: 2^11 of its roundings at most, of the largest logit."""
    model = architecture(name, torch.float32)
    call = {"input_ids": WORDS[:2, :11], "use_cache": False}
    call |= {"decoder_input_ids": WORDS[:2, :11]} if name == "t5" else {}
    perturbed, halves = low_rank(model), []
    with torch.no_grad():
        plain = model(**call).logits
        bound = 2.0**-13 * plain.abs().max()
        for sign in (+1, -1):
            with perturbed.at(sign):
                halves.append(model(**call).logits)
            expected = materialised(model, sign)(**call).logits
            assert (halves[-1] - expected).abs().max() <= bound
            assert (halves[-1] - plain).abs().max() > 10 * bound
        try:
            with perturbed.both(2):
                together = model(**double(call)).logits
        except Unpaired:
            return
        assert (together - torch.cat(halves)).abs().max() <= bound


class Unusual(torch.nn.Module):
    """Products on either side, and reads that are no products."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        for name, shape in {"w": (8, 8), "b": (8,), "stack": (3, 8, 8), "rows": (8, 8)}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, torch.nn.Parameter(value))

    def forward(self, x):
        x = x @ self.w + torch.matmul(x, self.w) + torch.mm(x[0], self.w)
        x = x + torch.addmm(self.b, x[0], self.w) + torch.addmm(self.b, x[0], self.w, beta=2.0)
        x = F.linear(input=x, weight=self.w, bias=self.b) + F.linear(x, self.stack[1])
        x = x + x @ self.w.T + self.rows.sum() * self.rows[2] + self.w.mul(self.rows)
        return (x + F.linear(self.w, self.rows)).tanh() + F.linear(x[0, 0], self.w)


def test_products_on_either_side_and_other_reads_are_perturbed():
    assert_materialised(Unusual(), lambda m: m(torch.ones(2, 8, 8, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_16_bit_models_are_as_near_as_their_rounding(name, dtype):
    """Against float64: in the mean, the factors are off by no more than perturbed weights are."""
    exact = tiny_model(name).to(dtype).double()
    model = copy.deepcopy(exact).to(dtype)
    perturbed = low_rank(model)
    with torch.no_grad():
        for sign in (+1, -1):
            expected = materialised(exact, sign)(input_ids=WORDS).logits
            off = (materialised(model, sign)(input_ids=WORDS).logits - expected).abs().mean()
            with perturbed.at(sign):
                found = model(input_ids=WORDS).logits
            assert found.dtype == dtype
            assert (found - expected).abs().mean() <= 1.5 * off


def test_autocast_computes_in_its_dtype():
    model = tiny_model("opt").float()
    perturbed = low_rank(model)
    with torch.no_grad():
        expected = materialised(model, +1)(input_ids=WORDS).logits
        with torch.autocast("cpu", torch.bfloat16):
            off = (materialised(model, +1)(input_ids=WORDS).logits - expected).abs().mean()
            with perturbed.at(+1):
                found = model(input_ids=WORDS).logits
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() <= 1.5 * off
    assert perturbed.dtypes == {torch.bfloat16, torch.float32}  # embeddings are not autocast


@pytest.mark.parametrize("paired", [False, True])
def test_no_step_makes_a_thing_of_a_matrix_size(paired):
    """Layers of 200 x 200 and 5,000 x 200, on 4 tokens: the largest are factors and activations."""
    model = torch.nn.Sequential(torch.nn.Embedding(5000, 200), torch.nn.Linear(200, 200))
    optimizer, words = optimizer_of(model, lr=1e-3, rank=2), torch.arange(4).view(2, 2)

    def halves(both):
        with both(2):
            plus, minus = model(torch.cat([words, words])).chunk(2)
        return plus.sum(), minus.sum()

    closure = Paired(lambda: model(words).sum(), halves) if paired else lambda: model(words).sum()
    for _ in range(2):
        with Largest() as largest:
            optimizer.step(closure)
        assert largest.elements <= 2 * 2 * 5000  # A + eps U and A - eps U of the embedding
    kept = sum(state["low_rank"].numel() for state in optimizer.state.values() if state)
    assert kept == 2 * (5000 + 200)


def test_an_embedding_that_rescales_itself_is_refused_by_name():
    embedding = torch.nn.Embedding(4, 2, max_norm=1.0)
    with pytest.raises(InputError, match=r"weight.*max_norm"):
        optimizer_of(embedding).step(lambda: embedding(torch.arange(3)).sum())


# ---- both losses from one forward pass


def test_a_paired_step_is_one_forward_pass_with_the_same_estimate():
    """The first step makes six more: two look at the loss, four compare one pass with two."""
    model, twin = Counted(), Counted()
    optimizers = [optimizer_of(m, lr=1e-3, interval=4) for m in (model, twin)]
    counts = []
    for _ in range(10):
        before = model.calls
        optimizers[0].step(model.paired())
        optimizers[1].step(lambda: twin(twin.x).mean())
        counts.append(model.calls - before)
    assert counts == [7] + [1] * 9
    assert optimizers[0].memory.paired is True
    # a loss near 4 is off by 8 roundings of float32, a projected_grad by 1 / eps of that
    slack = 10 * 1e-3 * 8 * 4 * 2.0**-24 / EPS * 5
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() <= slack


def test_elsewhere_a_paired_closure_is_a_plain_one():
    models = [Counted(), Counted()]
    for model, closure in zip(models, (models[0].paired(), models[1].paired().alone), strict=True):
        MeZO(model.named_parameters(), lr=1e-3, seed=1).step(closure)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize("fault", ["turned", "swapped", "transposed", "too large"])
def test_what_cannot_be_stacked_takes_two_passes_and_says_so_once(fault, caplog):
    model, twin = Counted(fault == "turned"), Counted(fault == "turned")
    closure, shape = model.paired(), model.x.shape

    def halves(both):
        if fault == "swapped":
            return closure.halves(both)[::-1]
        if fault == "transposed":  # 6 rows are not those of the batch
            with both(batch_size=len(model.x)):
                model(model.x.view(2, 4, 6)[:, :3])
        if fault == "too large":
            raise torch.OutOfMemoryError(f"twice {shape}")
        return closure.halves(both)

    optimizer, plain = (optimizer_of(m, lr=1e-3) for m in (model, twin))
    for _ in range(3):
        optimizer.step(Paired(closure.alone, halves))
        plain.step(twin.paired().alone)
    assert optimizer.memory.paired is False
    assert caplog.text.count("two forward passes a step instead of one") == 1
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_an_exception_in_one_pass_leaves_all_as_it_was():
    model = Counted()
    optimizer, closure = optimizer_of(model, lr=1e-3), model.paired()
    optimizer.step(closure)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    for error in (RuntimeError("out of memory"), KeyboardInterrupt()):

        def fails(both, error=error):
            closure.halves(both)
            raise error

        with pytest.raises(type(error)):
            optimizer.step(Paired(closure.alone, fails))
        found = model.state_dict(), optimizer.state_dict()["state"]
        assert all(torch.equal(found[0][name], kept[0][name]) for name in kept[0])
        assert all(torch.equal(found[1][i]["low_rank"], s["low_rank"]) for i, s in kept[1].items())


LONG = custom_task("{sentence} It was", [" a terrible, awful, boring movie", " great"])
FORMS = {
    "candidates": ("opt", byte_bpe, LONG, {}),
    "tokens": ("llama", byte_bpe, LONG, {"objective": "tokens"}),
    "masked": ("bert", word_piece, tasks.get("sst2"), {}),
    "encoder": ("encoder", word_piece, tasks.get("sst2"), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_both_losses_of_one_pass(form):
    name, tokenizer, task, options = FORMS[form]
    tokenizer = tokenizer()
    model = tiny_model(name, len(tokenizer))
    form = form_for(model, tokenizer, task, **options)
    texts = ["a charming journey . ", "no wit , only labored gags and no wit ", "dull"]
    examples = [Example({"sentence": s}, i % 2) for i, s in enumerate(texts)]
    batch = form.collate([form.encode(example) for example in examples])
    perturbed, expected = low_rank(model), []
    with torch.no_grad():
        for sign in (+1, -1):
            with perturbed.at(sign):
                expected.append(float(form.loss(model, batch)))
        found = [float(loss) for loss in form.pair_loss(model, batch, perturbed.both)]
    # scores are float32 whatever the model is: a few roundings of numbers near 10
    assert found == pytest.approx(expected, abs=64 * 2.0**-24 * max(map(abs, expected)))
    assert abs(expected[0] - expected[1]) > 1e-3


def test_a_pair_is_logged_as_two_passes_are(tmp_path):
    model, base = Counted(), Counted()
    optimizer = optimizer_of(model, lr=1e-3, interval=4)
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        for _ in range(9):
            optimizer.step(model.paired())
    optimizer.write()
    trajectory.replay(tmp_path / "run.mezo", base)
    assert all(map(torch.equal, base.parameters(), model.parameters()))
