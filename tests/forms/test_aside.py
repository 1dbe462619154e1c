"""Few parameters: theta + eps z lies in theta's own place during a pass, and theta beside it."""

import copy

import pytest
import torch
from models import Regression, weights

from mezo import MeZO, noise
from mezo.errors import InputError
from mezo.forms.bundles import Bundles
from mezo.forms.reads import Watched

pytestmark = [
    pytest.mark.few,
    pytest.mark.skipif(noise._kernel("cpu") is None, reason="needs numba"),
]


def optimizer_of(model, **options):
    return MeZO(model.named_parameters(), seed=1, perturbation="scratch", lr=1e-2, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"num_samples": 3}, {"distribution": "rademacher"}])
def test_a_run_has_the_bits_of_one_that_perturbs_each_parameter_when_it_is_read(
    dtype, options, monkeypatch
):
    """Losses and weights of four steps; 16-bit weights are rounded by the same bits."""
    runs = []
    for few in (Bundles.FEW, 0):
        monkeypatch.setattr(Bundles, "FEW", few)
        model = Regression(dtype)
        optimizer = optimizer_of(model, **options)
        losses = [optimizer.step(model) for _ in range(4)]
        assert (optimizer.plan.bundles.aside() is None) == (few == 0)
        runs.append((losses, weights(model)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_theta_is_put_back_if_the_closure_raises():
    """To the bit, and the step is refused as ever."""
    model = Regression(torch.float32)
    optimizer, before = optimizer_of(model), weights(model)

    def fails():
        if not torch.equal(weights(model), before):
            raise ZeroDivisionError
        return model()

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fails)
    assert torch.equal(weights(model), before)


def test_a_pass_that_reads_a_view_made_earlier_is_perturbed_too():
    """It lies in theta's own memory, which no function has to be intercepted for."""
    weight = torch.nn.Parameter(torch.ones(3, 3))
    view = weight.detach().view(-1)
    optimizer = MeZO([("weight", weight)], seed=1, perturbation="scratch", eps=0.1)
    optimizer.watch.looks = False
    seen = []
    optimizer.step(lambda: seen.append(view.clone()) or view.square().sum())
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.add_(1), "writes to the trained parameter weight"),
        (lambda p: setattr(p, "data", torch.zeros(3, 3)), "replaces the trained parameter weight"),
    ],
    ids=["write", "replace"],
)
def test_a_later_pass_that_writes_to_a_parameter_is_refused(change, message):
    """The first look comes before the first step alone; theta stays what it was."""
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = MeZO([("weight", weight)], seed=1, perturbation="scratch")
    optimizer.step(lambda: weight.square().sum())
    before = weight.detach().clone()

    def loss():
        found = weight.square().sum()
        change(weight)
        return found

    with torch.no_grad(), pytest.raises(InputError, match=message):
        optimizer.step(loss)
    assert torch.equal(weight.detach(), before)


def test_a_parameter_is_of_its_own_class_again_after_a_pass_in_which_it_was_watched(monkeypatch):
    """Also if the pass raises; a copy made in the pass is read as any tensor is."""
    monkeypatch.setattr(Bundles, "FEW", 0)
    model, kinds, copies, fails = Regression(torch.float32), set(), [], []
    optimizer = optimizer_of(model)

    def loss():
        kinds.update(type(p) for p in model.parameters())
        copies.append(copy.deepcopy(next(model.parameters())))
        if fails:
            raise ZeroDivisionError
        return model()

    optimizer.step(loss)
    fails.append(True)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(loss)
    assert kinds == {torch.nn.Parameter, Watched}
    assert {type(p) for p in model.parameters()} == {torch.nn.Parameter}
    assert copies[-1].add(1).shape == copies[0].shape


def test_a_function_that_takes_no_subclass_keeps_the_mode(monkeypatch):
    """torch.as_tensor hands a tensor on without asking its class: it would read theta itself."""
    monkeypatch.setattr(Bundles, "FEW", 0)
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = MeZO([("weight", weight)], seed=1, perturbation="scratch", eps=0.1)
    seen = []

    def loss():
        found = torch.as_tensor(weight, dtype=torch.float64).square().sum()
        seen.append(float(found))
        return found

    for _ in range(3):
        optimizer.step(loss)
    assert optimizer.plan.bundles.watched is False
    pairs = seen[-6:]
    assert all(plus != minus for plus, minus in zip(pairs[::2], pairs[1::2], strict=True))
