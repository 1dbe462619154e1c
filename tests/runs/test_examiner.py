"""The gradient, the curvature and the best rate, from estimates: on closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mezo.runs import examiner
from mezo.runs.examiner import Horizon

UNIT = 2.0**-24  # rounding of float32, half a unit in the last place


def signs(width):
    """All directions of -1 and 1: means over them are expectations, exactly."""
    return np.array(list(itertools.product((-1.0, 1.0), repeat=width)))


def test_the_signal_is_the_gradient_that_examples_share():
    """E[(z.a)(z.b)] = a.b, so the signal is the mean product of two examples' gradients."""
    each = np.random.default_rng(0).normal(size=(6, 5))  # gradients of 6 examples
    found = examiner.gradient(signs(5) @ each.T, batch_size=3)
    pairs = [a @ b for i, a in enumerate(each) for j, b in enumerate(each) if i != j]
    variance = np.sum((each - each.mean(0)) ** 2) / 5
    rounding = 1e-12  # of some 200 products of size 10 in float64
    assert found["signal"] == pytest.approx(np.mean(pairs), abs=rounding)
    assert found["noise"] == pytest.approx(variance / 3, abs=rounding)
    share = found["signal"] / (found["signal"] + found["noise"])
    assert found["share"] == pytest.approx(share, abs=rounding)


def test_a_known_noise_is_found_within_its_error():
    """Two batches of 8 with gradients v + noise: within 5 standard errors of the truth."""
    rng = np.random.default_rng(1)
    v, z = rng.normal(size=20), rng.normal(size=(400, 20))
    noise = 3 * rng.normal(size=(400, 16, 20))  # fresh examples along every direction
    found = examiner.gradient(np.einsum("dk,dek->de", z, v + noise), batch_size=8)
    assert abs(found["signal"] - v @ v) < 5 * found["signal_error"]
    truth = v @ v / (v @ v + 9 * 20 / 8)
    assert abs(found["share"] - truth) < 5 * found["share_error"] < 0.5


def test_examples_that_agree_are_all_signal_and_those_that_cancel_none():
    same = examiner.gradient(np.array([[2.0, 2.0], [1.0, 1.0]]), 1)
    assert (same["signal"], same["noise"], same["share"]) == (2.5, 0.0, 1.0)
    against = examiner.gradient(np.array([[2.0, -2.0], [1.0, -1.0]]), 1)
    assert (against["signal"], against["noise"], against["share"]) == (-2.5, 5.0, -1.0)
    assert math.isnan(examiner.gradient(np.zeros((2, 4)), 1)["share"])


def test_the_curvature_is_the_hessian_where_scores_are_linear():
    """Then H = G: against autograd, and for two candidates p (1 - p) slope^2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    w, z = torch.randn(2, 6, 3, dtype=torch.float64, generator=generator)
    labels, eps = torch.tensor([0, 2, 1, 1]), 0.1
    got = examiner.gauss_newton(x @ (w + eps * z), x @ (w - eps * z), eps)
    t = torch.zeros((), dtype=torch.float64)
    loss = lambda t: F.cross_entropy(x @ (w + t * z), labels)  # noqa: E731
    second = torch.autograd.functional.hessian(loss, t)
    assert got == pytest.approx(float(second), rel=1e-13)  # roundings of 2^-53, some hundreds
    one = examiner.gauss_newton(torch.tensor([[0.0, 0.3]]), torch.tensor([[0.0, -0.3]]), 0.1)
    assert one == pytest.approx(0.25 * 3.0**2, rel=4 * UNIT)


def test_the_best_step_is_the_minimum_of_a_quadratic():
    """The mean loss after a step, over all directions: least at lr, as before at twice lr."""
    rng = np.random.default_rng(2)
    root, x, z = rng.normal(size=(4, 4)), rng.normal(size=4), signs(4)
    hessian = root @ root.T
    grads, curvatures = z @ hessian @ x, np.einsum("di,ij,dj->d", z, hessian, z)

    def change(lr):
        moved = x - lr * grads[:, None] * z
        after = np.einsum("di,ij,dj->d", moved, hessian, moved) / 2
        return float(after.mean() - x @ hessian @ x / 2)

    gradient = hessian @ x
    best = examiner.best_step(gradient @ gradient, float(np.mean(grads**2 * curvatures)))
    size = -change(best)
    assert size == pytest.approx(best * (gradient @ gradient) / 2, rel=1e-12)
    assert min(change(0.9 * best), change(1.1 * best)) > -size
    assert change(2 * best) == pytest.approx(0, abs=1e-12 * size)


@pytest.mark.parametrize(("signal", "pull"), [(-1.0, 1.0), (1.0, -1.0), (math.nan, 1.0)])
def test_no_rate_follows_from_no_slope_or_no_curvature(signal, pull):
    assert math.isnan(examiner.best_step(signal, pull))
    assert math.isnan(Horizon(signal, pull, 1.0, 10).best_rate())


def test_the_best_rate_of_a_run_is_where_the_expected_loss_is_least():
    """Beside it on both sides the expected change is higher; at rate 0 nothing changes."""
    for schedule in ("constant", "linear", "cosine"):
        run = Horizon(signal=115.0, pull=4.2e5, loss=0.85, steps=500, schedule=schedule)
        best = run.best_rate()
        assert run.change(best) < min(run.change(0.98 * best), run.change(1.02 * best), 0.0)
        assert run.change(0.0) == 0.0


def test_a_run_of_one_step_takes_the_best_step():
    """Where the gap is far away the gain is linear: |grad|^2 over half of the pull at the start."""
    run = Horizon(signal=1.0, pull=1e6, loss=1e6, steps=1)
    assert run.best_rate() == pytest.approx(examiner.best_step(1.0, 0.5e6), rel=1e-9)


def test_longer_runs_take_smaller_rates_and_decaying_schedules_larger_ones():
    rates = [Horizon(115.0, 4.2e5, 0.85, steps).best_rate() for steps in (100, 1000, 10_000)]
    assert rates[0] > rates[1] > rates[2]
    decaying = Horizon(115.0, 4.2e5, 0.85, 1000, "linear").best_rate()
    assert decaying > Horizon(115.0, 4.2e5, 0.85, 1000).best_rate()
    unknown = Horizon(115.0, 4.2e5, 0.85, 1000, "inverse_sqrt")
    assert unknown.best_rate() == rates[1]


@pytest.mark.parametrize(
    ("model", "run", "trained_well"),
    [
        ("causal-lm on SST-2", Horizon(114.8, 262.6 * 1604, 0.847, 500), 3e-5),
        ("causal-lm on opinions", Horizon(192.6, 227.2 * 2123, 0.672, 200, "linear"), 6e-5),
        ("minilm on opinions", Horizon(28.35, 77.84 * 781, 0.529, 250, "linear"), 1.4e-4),
        ("the model of 3.0 M on SST-2", Horizon(27.37, 35.8 * 75, 0.849, 600, "linear"), 1e-3),
    ],
)
def test_the_rates_that_were_found_by_search_are_near_the_derived_ones(model, run, trained_well):
    """Within the factor of three that a search by hand leaves open; measured numbers, 16 z each."""
    assert 1 / 3 <= run.best_rate() / trained_well <= 3
