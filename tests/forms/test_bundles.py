"""Tensors that are moved or perturbed in one launch have the bits of one after another."""

import copy
from functools import partial

import pytest
import torch
from models import Regression, weights
from noise_checks import plain

from mezo import MeZO, noise
from mezo.forms.low_rank import LowRank
from mezo.forms.one_sign import OneSign
from mezo.noise import Move

MOVES = [Move(2, 0, 1.0, 1e-2)]


class Layers(torch.nn.Module):
    """Biases, a bias that two layers share, one that is read twice, and a list of tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(5, 7), torch.nn.Linear(7, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.second.bias = self.first.bias
        self.more = torch.nn.ParameterList([torch.randn(n, 7) * 0.1 for n in (1, 3)])
        self.unread = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        h = self.norm(self.second(torch.tanh(self.first(x))) + self.norm.bias)
        return (h @ torch.cat([*self.more]).T).square().mean()


def rows(tensors):
    return [(str(i), x, noise.tensor_key(1, str(i))) for i, x in enumerate(tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bundles_give_the_losses_of_one_parameter_after_another(dtype):
    """The first pass perturbs each when it is read; from the second on they are bundled."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Layers().to(dtype), torch.randn(4, 5).to(dtype)
    optimizer = MeZO(model.named_parameters(), eps=1e-2, seed=1, perturbation="scratch")
    with torch.no_grad():
        direction = optimizer.direction(0)
        first = direction.losses(lambda: float(model(x)))
        bundles = optimizer.plan.bundles
        bundled = direction.losses(lambda: float(model(x)))
        assert len({id(of) for of in bundles.of.values()}) == 1
        assert "first.bias" in bundles.of
        assert "unread" not in bundles.of
        direction.bundles = None
        alone = direction.losses(lambda: float(model(x)))
    assert first == bundled == alone
    assert first[0] != first[1]


def test_a_large_parameter_stays_out_of_the_bundles():
    """Memory: a pass holds at most a megabyte that it has not yet read."""
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 9))
    optimizer = MeZO(model.named_parameters(), seed=1, perturbation="scratch")
    optimizer.step(lambda: model(torch.ones(2, 300)).square().mean())
    assert set(optimizer.plan.bundles.of) == {"0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.set_(x.detach().clone()),
        lambda x: setattr(x, "data", x.detach().clone()),
        lambda x: setattr(x, "data", torch.zeros(3000)),
    ],
    ids=["set_", "data", "longer"],
)
def test_a_tensor_that_lies_elsewhere_is_found_there(change):
    """What was gathered holds addresses: another memory must not be written, nor this one left."""
    tensors = [torch.ones(5), torch.ones(40, 50)]
    known = noise.Rows(rows(tensors))
    noise.apply_all_(known, MOVES)
    old = tensors[0].detach()
    kept = old.clone()
    with torch.no_grad():
        change(tensors[0])
    expected = copy.deepcopy(tensors)
    noise.apply_all_(rows(expected), MOVES)
    noise.apply_all_(known, MOVES)
    assert all(map(torch.equal, tensors, expected))
    if old.data_ptr() != tensors[0].data_ptr():
        assert torch.equal(old, kept)


@pytest.mark.parametrize("perturbation", ["in_place", "scratch", "low_rank"])
def test_a_model_that_changes_between_steps_is_trained_as_it_is(perturbation):
    """A dtype, a transposed view of the same memory: the step's tables are made anew."""
    runs = []
    for fresh in (False, True):
        model = Regression(torch.float32)
        options = {"lr": 1e-2, "eps": 1e-2, "seed": 1, "perturbation": perturbation}
        optimizer = MeZO(model.named_parameters(), **options)
        for step in range(4):
            if fresh:
                optimizer._known = None
            optimizer.step(model)
            with torch.no_grad():
                for p in model.parameters():
                    if step == 1 and p.dim() == 2 and perturbation != "low_rank":
                        p.data = p.data.t().contiguous().t()
        optimizer.write()
        runs.append(weights(model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_written_as_the_tensors_would_be_moved(distribution, dtype):
    """Sizes around a block of 256 numbers: short tensors draw a part of one."""
    sizes = (1, 31, 32, 33, 255, 256, 257, 511, 513, 1023, 1025, 2048, 2049, 70_000)
    tensors = [torch.linspace(-1, 1, n).to(dtype) for n in sizes]
    before, known = copy.deepcopy(tensors), noise.Rows(rows(tensors))
    moves = noise.table([Move(2, 1, 1.0, 1e-2, noise.ROUND_PERTURBED)])
    outs = noise.moved_all(known, moves, distribution=distribution)
    assert all(map(torch.equal, tensors, before))
    assert noise.moved_all(noise.Rows(), moves) == []
    for out, (_, x, key) in zip(outs, known, strict=True):
        plain(x, key, moves, distribution=distribution)
        assert torch.equal(out, x)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 2, "num_samples": 2, "distribution": "gaussian16"}]
)
def test_low_rank_drawn_together_has_the_bits_of_one_tensor_after_another(options, monkeypatch):
    """Over intervals, groups with rates and decay of their own, and a writing within one."""
    runs = []
    for together in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x = Layers(), torch.randn(4, 5)
        named = list(model.named_parameters())
        groups = [{"params": named[:2], "lr": 1e-2}, {"params": named[2:], "weight_decay": 0.1}]
        how = {"seed": 1, "eps": 1e-2, "lr": 1e-3, "interval": 3, "perturbation": "low_rank"}
        optimizer = MeZO(groups, **how | options)
        if not together:
            monkeypatch.setattr(LowRank, "_together", lambda self: None)
        losses, closure = [], partial(model, x)
        for step in range(8):
            losses.append(optimizer.estimate(closure).losses)
            if step == 4:
                optimizer.write()  # A is written and forgotten, and the estimate begun again
                losses.append(optimizer.estimate(closure).losses)
            losses.append(optimizer.step())
        assert (optimizer.plan.bundles.drawn is not None) is together
        sums = [optimizer.state[p].get("low_rank", torch.zeros(1)) for p in model.parameters()]
        optimizer.write()
        runs.append((losses, [*sums, *(p.detach() for p in model.parameters())]))
    (losses, found), (expected_losses, expected) = runs
    assert losses == expected_losses
    assert all(map(torch.equal, found, expected))


class Norms(torch.nn.Module):
    """Linear layers with a frozen bias or none, a norm, and a parameter as a layer's input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(5, 7), torch.nn.Linear(7, 6, bias=False)
        self.norm, self.prompt = torch.nn.LayerNorm(7), torch.nn.Parameter(torch.randn(1, 4, 6))
        self.last, self.unread = torch.nn.Linear(6, 3), torch.nn.Parameter(torch.ones(3))
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        h = self.second(self.norm(torch.tanh(self.first(x))))
        return (self.last(h).mean() + self.last(self.prompt).sum()).square()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_that_take_what_was_made_ready_have_the_losses_of_all_others(
    dtype, autocast, monkeypatch
):
    """A pass at one sign makes products of small parts at once: the numbers are the same, what was
    not read is not said to have been, and other steps, signs and sums are not mixed up."""
    runs = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(OneSign, "at_once", lambda *_: None)
            monkeypatch.setattr(LowRank, "_together", lambda self: None)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x = Norms().to(dtype), torch.randn(4, 2, 5).to(dtype)
        how = {"seed": 1, "eps": 1e-1, "lr": 1e-2, "interval": 2, "perturbation": "low_rank"}
        optimizer, losses = MeZO(model.named_parameters(), **how), []

        def closure(model=model, x=x):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, autocast):
                return model(x)

        for _ in range(5):
            with torch.no_grad():
                direction = optimizer.direction(0)
                for sign in (-1, +1, 0, -1):
                    with direction.at(sign):
                        losses.append(float(closure()))
                assert direction.read == {row.name for row in direction.rows} - {"unread"}
            losses.append(optimizer.step(closure))
        runs.append(losses)
    assert runs[0] == runs[1]
    assert len({*runs[0]}) > 10
