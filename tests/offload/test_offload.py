"""Offload: weights come block by block, and nothing else changes, to the bit."""

import contextlib
import copy
import threading

import pytest
import torch
from offloading import COPIES, WORDS, bits, loss_of, made, same
from safetensors.torch import load_file
from torch.nn import functional as F

from mezo import MeZO, trajectory
from mezo.closures import Paired, double
from mezo.distributed.exchange import Link
from mezo.distributed.processes import join
from mezo.errors import InputError
from mezo.models.mapped import COPY
from mezo.offload import blocks
from mezo.offload.context import Offload, load_offloaded, offload

STEPS = 3


def trained(model, log, place=None, steps=STEPS, **settings):
    """The losses of a run, offloaded or not; its log is at `log`."""
    settings = {"lr": 1e-2, "eps": 1e-2, "seed": 3} | settings
    optimizer = MeZO(model.named_parameters(), **settings)
    around = contextlib.nullcontext() if place is None else Offload(model, optimizer, **place)
    with trajectory.record(optimizer, log, model=model), around:
        losses = [optimizer.step(loss_of(model)) for _ in range(steps)]
        optimizer.write()
    return losses


def assert_the_same_run(model, folder, place, **settings):
    away = copy.deepcopy(model)
    expected = trained(model, folder / "here.mezo", **settings)
    assert trained(away, folder / "away.mezo", place, **settings) == expected
    assert same(away, model)
    assert (folder / "away.mezo").read_bytes() == (folder / "here.mezo").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["in_place", "scratch"])
@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "mixtral"])
def test_weights_losses_and_log_are_those_of_the_run_without(tmp_path, name, dtype):
    """Tied embeddings and untied, experts; walked in place, and read in scratch."""
    assert_the_same_run(made(name, dtype), tmp_path, COPIES)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_samples": 2},
        {"num_samples": 2, "perturbation": "scratch", "weight_decay": 0.1},
        {"perturbation": "low_rank", "interval": 2, "weight_decay": 0.1},
        {"perturbation": "low_rank", "interval": 100, "rank": 2},
        {"distribution": "rademacher", "clip": 0.1},
    ],
    ids=str,
)
def test_whatever_the_settings(tmp_path, settings):
    assert_the_same_run(made("gpt2"), tmp_path, COPIES, **settings)


@pytest.mark.parametrize(("in_file", "copies"), [(False, False), (True, False), (True, True)])
def test_wherever_the_weights_wait(tmp_path, monkeypatch, in_file, copies):
    monkeypatch.setattr(blocks, "must_copy", lambda device, write_every: copies)
    place = {"folder": tmp_path / "weights"} if in_file else {}
    assert_the_same_run(made("opt"), tmp_path, place | {"device": "cpu"})


def test_the_file_holds_the_weights_when_the_context_is_left(tmp_path):
    """A safetensors file of the tuned model; the parameters are it, mapped."""
    model = made("opt")
    trained(model, tmp_path / "run.mezo", {"device": "cpu", "folder": tmp_path})
    stored = load_file(tmp_path / COPY)
    assert len(stored) == len(bits(model))
    assert all(torch.equal(stored[n], p) for n, p in model.named_parameters())


def test_written_after_several_updates(tmp_path):
    model, away = made("llama"), made("llama")
    optimizer = MeZO(away.named_parameters(), lr=1e-2, eps=1e-2, seed=3)
    expected = trained(model, tmp_path / "here.mezo", steps=5)
    with offload(away, optimizer, device="cpu", write_every=2) as there:
        assert [optimizer.step(loss_of(away)) for _ in range(5)] == expected
        lm_head = there.blocks.home[id(away.lm_head.weight)]
        assert there.blocks.stores[lm_head] == 2
    assert same(away, model)


def test_a_step_of_several_directions_that_fails_leaves_nothing_to_the_next():
    """What was begun for all of them is not taken for the estimates of another step."""

    def run(model, around):
        optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=3, num_samples=3, eps=1e-2)
        calls, losses = [], []

        def fails():
            calls.append(1)
            return loss_of(model)() / (1 if len(calls) < 4 else 1 // 0)

        with around(optimizer):
            with pytest.raises(ZeroDivisionError):
                optimizer.step(fails)
            for probe in range(3):

                def closure(n=probe):
                    return model(WORDS[n : n + 1], labels=WORDS[n : n + 1]).loss

                losses.append(optimizer.estimate(closure, probe))
            optimizer.step()
            losses.append(optimizer.step(loss_of(model)))
        return losses

    model, away = (made("llama", torch.bfloat16) for _ in range(2))
    expected = run(model, lambda optimizer: contextlib.nullcontext())
    assert run(away, lambda optimizer: Offload(away, optimizer, **COPIES)) == expected
    assert same(away, model)


def test_a_read_only_base_is_never_written(tmp_path):
    """The run is in its log: losses go on as if the weights had been updated, which replay does."""
    model = made("opt")
    expected = trained(model, tmp_path / "here.mezo")
    base = made("opt")
    base.save_pretrained(tmp_path / "base")
    before = (tmp_path / "base/model.safetensors").read_bytes()
    away = load_offloaded(tmp_path / "base")
    losses = trained(away, tmp_path / "run.mezo", {"device": "cpu", "write_every": 0})
    assert losses == expected
    assert same(away, base)
    assert (tmp_path / "base/model.safetensors").read_bytes() == before
    assert same(trajectory.replay(tmp_path / "run.mezo", away), model)


def test_a_call_of_the_model_sees_every_update():
    model, away = made("opt"), made("opt")
    optimizer, other = (MeZO(m.named_parameters(), lr=1e-1, seed=3) for m in (model, away))
    optimizer.step(loss_of(model))
    with torch.no_grad(), Offload(away, other, **COPIES) as there:
        other.step(loss_of(away))
        assert not same(away, model)  # behind
        assert torch.equal(away(WORDS).logits, model(WORDS).logits)
        there.flush()
        assert same(away, model)
    with torch.no_grad():
        assert torch.equal(away(WORDS).logits, model(WORDS).logits)


def test_inference_alone():
    model = made("llama")
    with torch.no_grad():
        expected = model(WORDS).logits
        with offload(copy.deepcopy(model), device="cpu") as there:
            assert torch.equal(there.model(WORDS).logits, expected)


def test_both_halves_in_one_forward_pass():
    """Low-rank directions: no turns are taken, and weights come once as well."""

    def run(model, around):
        optimizer = MeZO(
            model.named_parameters(), lr=1e-2, eps=1e-2, seed=3, perturbation="low_rank", interval=2
        )
        batch = {"input_ids": WORDS, "use_cache": False}

        def alone():
            return F.cross_entropy(model(**batch).logits[:, -1], WORDS[:, 0])

        def halves(both):
            with both(batch_size=3):
                logits = model(**double(batch)).logits[:, -1]
            return F.cross_entropy(logits[:3], WORDS[:, 0]), F.cross_entropy(
                logits[3:], WORDS[:, 0]
            )

        with around(optimizer):
            return [optimizer.step(Paired(alone, halves)) for _ in range(4)], optimizer

    model, away = made("opt"), made("opt")
    losses, _ = run(model, lambda optimizer: contextlib.nullcontext())
    found, optimizer = run(away, lambda optimizer: Offload(away, optimizer, **COPIES))
    assert optimizer.memory.paired
    assert found == losses
    assert same(away, model)


def test_accumulated_estimates_and_refused_updates():
    """A walk without an update is repeated too: a NaN loss, an exception in the closure."""

    def run(model, around):
        optimizer = MeZO(model.named_parameters(), lr=1e-2, eps=1e-2, seed=3)
        with around(optimizer):
            optimizer.estimate(loss_of(model))
            optimizer.estimate(loss_of(model))
            optimizer.step()
            optimizer.step(lambda: loss_of(model)() * torch.nan)
            with pytest.raises(ZeroDivisionError):
                optimizer.step(lambda: loss_of(model)() / (1 // 0))
            optimizer.step(loss_of(model))
        return optimizer.param_groups[0]["step"]

    model, away = made("llama"), made("llama")
    steps = run(model, lambda optimizer: contextlib.nullcontext())
    assert run(away, lambda optimizer: Offload(away, optimizer, **COPIES)) == steps == 4
    assert same(away, model)


def test_an_interrupt_in_one_half_ends_both_and_training_goes_on():
    model = made("opt")
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=3)
    with Offload(model, optimizer, **COPIES):
        for thread in (True, False):  # in the second half, in the first

            def stopped(thread=thread):
                loss = loss_of(model)()
                if (threading.current_thread() is threading.main_thread()) != thread:
                    raise KeyboardInterrupt
                return loss

            with pytest.raises(KeyboardInterrupt):
                optimizer.step(stopped)
        assert torch.isfinite(torch.tensor(optimizer.step(loss_of(model))))


def test_the_settings_are_those_of_the_state_that_is_loaded():
    """load_state_dict makes other groups: their seed is the one that updates are made with."""
    model, away = made("opt"), made("opt")
    saved = MeZO(model.named_parameters(), lr=1e-2, seed=3)
    optimizer = MeZO(away.named_parameters(), lr=1e-2, seed=4)
    with Offload(away, optimizer, **COPIES):
        optimizer.load_state_dict(saved.state_dict())
        losses = [optimizer.step(loss_of(away)) for _ in range(2)]
    assert losses == [saved.step(loss_of(model)) for _ in range(2)]
    assert same(away, model)


def test_a_log_that_begins_within_the_context_has_the_weights_as_they_are(tmp_path):
    model, base = made("opt"), made("opt")
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=3)
    with Offload(model, optimizer, **COPIES):
        optimizer.step(loss_of(model))
        with trajectory.record(optimizer, tmp_path / "run.mezo", model=model, resume=True):
            base.load_state_dict(model.state_dict())  # record() has written what waited
            optimizer.step(loss_of(model))
    assert same(trajectory.replay(tmp_path / "run.mezo", base), model)


class Strided(torch.nn.Module):
    """A product that torch computes in another way where the matrix asks for a gradient."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(3)]
            self.layers, self.x = torch.nn.ModuleList(layers), torch.randn(8, 9, 64)

    def forward(self):
        return torch.cat([layer(self.x[:, -2:]) for layer in self.layers])


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_products_are_computed_as_of_the_parameters_themselves(tmp_path, frozen):
    """Also under no_grad: torch.nn.functional.linear heeds requires_grad."""

    def run(place):
        model = Strided()
        for layer in model.layers[:frozen]:
            layer.requires_grad_(False)
        with torch.no_grad(), Offload(model, **COPIES) if place else contextlib.nullcontext():
            found = model().flatten().tolist()
        if frozen < 3:
            optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=3, perturbation="in_place")
            with Offload(model, optimizer, **COPIES) if place else contextlib.nullcontext():
                found += [optimizer.step(lambda: model().square().mean()) for _ in range(3)]
        return found

    assert run(True) == run(False)


def test_outputs_come_to_where_the_inputs_were(monkeypatch):
    """As under accelerate's hooks, so that `generate` goes on from there; the cache stays."""
    moved = []

    def send(given, device, skip_keys):
        moved.append((type(given).__name__, device.type, skip_keys))
        return given

    monkeypatch.setattr("accelerate.utils.send_to_device", send)
    model = made("opt")
    with torch.no_grad(), offload(model, device="cpu") as there:
        there.device = torch.device("cuda")
        model(input_ids=WORDS)
    cache = ("past_key_values", "cache")
    expected = [("tuple", "cuda", cache), ("dict", "cuda", cache)]
    assert moved == [*expected, ("CausalLMOutputWithPast", "cpu", cache)]


def test_autocast_around_the_step_holds_in_both_halves():
    def run(model, around):
        optimizer = MeZO(model.named_parameters(), lr=1e-2, eps=1e-1, seed=3)
        with around(optimizer), torch.autocast("cpu", torch.bfloat16):
            return [optimizer.step(loss_of(model)) for _ in range(2)]

    model, away = made("opt"), made("opt")
    expected = run(model, lambda optimizer: contextlib.nullcontext())
    assert run(away, lambda optimizer: Offload(away, optimizer, **COPIES)) == expected


@pytest.mark.parametrize(
    ("settings", "place", "words"),
    [
        ({}, {"write_every": -1}, "write_every must be at least 1"),
        ({}, {"write_every": 0, "folder": "x"}, "folder is for weights that are written"),
        ({"rounding": "master"}, {}, "rounding 'master' keeps a buffer"),
        ({"rule": "momentum"}, {}, "rule momentum cannot be combined with offload"),
        ({"estimator": "one_sided"}, {}, "estimator one_sided cannot be combined with offload"),
    ],
)
def test_refused_in_one_sentence(settings, place, words):
    model = made("opt", torch.bfloat16)
    optimizer = MeZO(model.named_parameters(), **settings)
    with pytest.raises(InputError, match=words):
        offload(model, optimizer, device="cpu", **place)


def test_what_stays_in_files_is_not_pinned(tmp_path):
    """Pinning copies a mapped model into the host's memory."""
    places = {"memory": {}, "file": {"folder": tmp_path}, "base": {"write_every": 0}}
    pins = {name: Offload(made("opt"), device="cuda", **p).pins for name, p in places.items()}
    assert pins == {"memory": True, "file": False, "base": False}


def test_several_processes_are_refused(monkeypatch):
    model = made("opt")
    optimizer = MeZO(model.named_parameters())
    with offload(model, optimizer, device="cpu"), monkeypatch.context() as changed:
        changed.setattr(torch.distributed, "is_initialized", lambda: True)
        changed.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
        with pytest.raises(InputError, match="2 processes cannot use offload"):
            join(optimizer, model)
    optimizer.processes = Link.__new__(Link)
    optimizer.processes.size = 2
    with pytest.raises(InputError, match="2 processes cannot use offload"):
        offload(model, optimizer)


def test_models_elsewhere_are_refused(tmp_path):
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="weight is on the meta device"):
        offload(model)
    with pytest.raises(InputError, match="nowhere"):
        load_offloaded(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="file/weights"),
        offload(made("opt"), device="cpu", folder=tmp_path / "file"),
    ):
        pass


def test_an_optimizer_is_offloaded_once_and_of_this_model():
    model = made("opt")
    optimizer = MeZO(model.named_parameters())
    with offload(model, optimizer, device="cpu"):
        with (
            pytest.raises(InputError, match="offloaded already"),
            offload(model, optimizer, device="cpu"),
        ):
            pass
        assert optimizer.step(loss_of(model)) > 0
    with pytest.raises(InputError, match="is not a parameter of the model"):
        offload(made("opt"), optimizer)
