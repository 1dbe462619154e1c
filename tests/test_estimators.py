"""Estimators: exact on a quadratic, unbiased, of the variance and cost that they state."""

import math

import pytest
import torch
from models import ROUNDING, SIZES, Quadratic, Regression, gradient, weights
from torch.autograd import forward_ad

from mezo import MeZO, noise, trajectory
from mezo.errors import InputError
from mezo.estimators import merged, passes_of, shaped
from mezo.layer_norms import small
from mezo.layers import expectation_modified, variance_modified
from mezo.mezo import Estimate

SCALES = {"a": 0.5, "b": 2.0}
ESTIMATORS = {  # options; passes of n directions on one batch
    "two_point": ({}, lambda n: 2 * n),
    "one_sided": ({"estimator": "one_sided"}, lambda n: n + 1),
    "one_point": ({"estimator": "one_point"}, lambda n: n),
    "variance_modified": ({"layers": variance_modified(SCALES)}, lambda n: 2 * n),
    "expectation_modified": ({"layers": expectation_modified(SCALES)}, lambda n: 2 * n),
    "z_scores": ({"shaping": "z_scores", "num_samples": 3}, lambda n: 2 * n),
    "ranks": ({"shaping": "ranks", "num_samples": 3}, lambda n: 2 * n),
    "fzoo": (
        {
            "estimator": "one_sided",
            "shaping": "z_scores",
            "distribution": "rademacher",
            "num_samples": 4,
        },
        lambda n: n + 1,
    ),
}


def direction(seed, step, probe=0, distribution="gaussian"):
    where = {"step": step, "probe": probe, "distribution": distribution}
    parts = [noise.draw(noise.tensor_key(seed, n), 0, s, **where) for n, s in SIZES.items()]
    return torch.cat(parts).double()


def scales():
    return torch.cat([torch.full((s,), SCALES[n], dtype=torch.float64) for n, s in SIZES.items()])


def moved(model, options, steps=1, seed=3):
    """What `steps` steps of lr 1 from the same point take off the weights; and forward passes."""
    optimizer = MeZO(model.named_parameters(), 1.0, seed=seed, **options)
    optimizer.watch.looks = False  # its passes are not the estimator's
    found = []
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        before = weights(model)
        optimizer.step(model)
        found.append((before - weights(model)).double())
    return torch.stack(found), model.calls


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_takes_as_many_passes_as_it_says(name):
    options, passes = ESTIMATORS[name]
    n = options.get("num_samples", 1)
    _, calls = moved(Quadratic(), options)
    assert calls == passes(n)
    assert passes_of(options.get("estimator", "two_point"), n) == passes(n)


def test_estimates_of_a_direction_weigh_as_their_examples():
    """One example unless it is said otherwise: (1 x 1 + 3 x 5) / 4 = 4."""
    found = merged([Estimate(1.0, 2.0, (1.0, 3.0)), Estimate(5.0, 6.0, (5.0, 7.0), examples=3.0)])
    assert found == Estimate(4.0, 5.0, (4.0, 6.0), 4.0)


def test_one_side_is_off_by_half_the_curvature():
    """(L(theta + eps z) - L(theta)) / eps = z.grad + eps/2 z'Hz on a quadratic, exactly."""
    model, eps = Quadratic(), 1e-2
    found, _ = moved(model, {"estimator": "one_sided", "eps": eps})
    z = direction(3, 0)
    g = float(z @ gradient(model) + eps / 2 * z @ model.hessian @ z)
    assert (found[0] - g * z).abs().max() < 1e-6


def test_one_point_takes_the_last_steps_loss():
    """g = (L(theta_t + eps z_t) - L(theta_t-1 + eps z_t-1)) / eps, 0 in the first step."""
    model, eps = Quadratic(), 1e-1
    found, calls = moved(model, {"estimator": "one_point", "eps": eps}, steps=4)
    losses = [model.value(1 + eps * direction(3, t)) for t in range(4)]
    assert calls == 4
    assert found[0].abs().max() < 1e-9  # the walk there and back
    for t in (1, 2, 3):
        expected = (losses[t] - losses[t - 1]) / eps * direction(3, t)
        assert (found[t] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("estimator", ["two_point", "one_sided", "one_point"])
def test_estimates_are_unbiased(estimator, distribution):
    """Their mean over 1,000 steps is the gradient, within 5 standard errors of that mean."""
    model, steps = Quadratic(torch.float32), 1000
    options = {"estimator": estimator, "eps": 1e-2, "distribution": distribution}
    found, _ = moved(model, options, steps=steps)
    found = found[1:]
    error = found.std(0) / math.sqrt(len(found))
    bias = 1e-2 * 8 * float(model.hessian.norm())  # of one side, eps/2 E|z'Hz z|
    assert ((found.mean(0) - gradient(model)).abs() < 5 * error + bias).all()


def test_the_variance_of_two_points_is_as_stated():
    """Gaussian: |grad|^2 + grad_i^2 in coordinate i; Rademacher: |grad|^2 - grad_i^2.

    Over 1,000 steps a sample variance of what has kurtosis below 25 is off by at most 5 sqrt(24/n).
    """
    for distribution, sign in (("gaussian", 1), ("rademacher", -1)):
        model = Quadratic(torch.float32)
        found, _ = moved(model, {"distribution": distribution}, steps=1000)
        g = gradient(model)
        expected = g.square().sum() + sign * g.square()
        assert ((found.var(0) / expected - 1).abs() < 5 * math.sqrt(24 / 1000)).all()


def test_n_directions_divide_the_variance_by_n():
    model = Quadratic(torch.float32)
    single, _ = moved(model, {}, steps=800)
    several, _ = moved(model, {"num_samples": 4}, steps=800)
    ratio = single.var(0).sum() / several.var(0).sum()
    assert abs(ratio / 4 - 1) < 5 * math.sqrt(2 * 24 / 800)


@pytest.mark.parametrize("perturbation", ["in_place", "scratch"])
def test_modified_estimates_are_definitions_6_and_7(perturbation):
    """g = [L(theta + eps z/d) - L(theta - eps z/d)] / 2 eps, exact; along d z, or along z."""
    for make, factor in ((variance_modified, scales()), (expectation_modified, 1.0)):
        model = Quadratic()
        found, _ = moved(model, {"layers": make(SCALES), "perturbation": perturbation})
        z = direction(3, 0)
        g = float((z / scales()) @ gradient(model))
        assert (found[0] - g * factor * z).abs().max() < 1e-6


def test_one_keeps_the_mean_and_the_other_the_variance():
    """Definition 6: the mean is the gradient. Definition 7: the gradient over d."""
    for make, expected in (
        (variance_modified, gradient(Quadratic())),
        (expectation_modified, gradient(Quadratic()) / scales()),
    ):
        found, _ = moved(Quadratic(torch.float32), {"layers": make(SCALES)}, steps=1000)
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - expected).abs() < 5 * error + 1e-4).all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_the_oracle_of_a_small_eps_is_the_directional_derivative():
    """The forward gradient along z: what every estimate tends to; central differences by eps^2."""
    model, z = Regression(), {}
    optimizer = MeZO(model.named_parameters(), seed=3, eps=1e-4)
    for name, p in model.named_parameters():
        z[name] = noise.draw(noise.tensor_key(3, name), 0, p.numel(), step=0).double().view(p.shape)
    with forward_ad.dual_level():
        named = {name: p.detach() for name, p in model.named_parameters()}
        dual = {name: forward_ad.make_dual(p, z[name]) for name, p in named.items()}
        loss = torch.func.functional_call(model, dual, ())
        derivative = forward_ad.unpack_dual(loss).tangent
    found = optimizer.estimate(model).projected_grad
    assert abs(found - float(derivative)) < 1e-5 * abs(float(derivative))


def test_shaping_by_hand():
    """z-scores over the standard deviation of all losses; ranks from -1/2 to 1/2, ties shared."""
    means = {
        i: Estimate((p - m) / 2e-3, (p + m) / 2, (p, m))
        for i, (p, m) in enumerate([(3.0, 1.0), (5.0, 1.0)])
    }
    spread = torch.tensor([3.0, 1.0, 5.0, 1.0]).double().std().item()
    found = shaped(means, "z_scores", 1e-3)
    assert found == pytest.approx({0: 1 / spread, 1: 2 / spread}, rel=1e-12)
    # ranks of 3, 1, 5, 1 are 2, 0.5, 3, 0.5 of 0..3
    found = shaped(means, "ranks", 1e-3)
    assert found == pytest.approx({0: 1.5 / 3 / 2, 1: 2.5 / 3 / 2}, rel=1e-12)
    flat = {i: Estimate(0.0, 1.0, (1.0, 1.0)) for i in range(2)}
    for kind in ("z_scores", "ranks"):
        assert shaped(flat, kind, 1e-3) == {0: 0.0, 1: 0.0}


@pytest.mark.parametrize("kind", ["z_scores", "ranks"])
def test_shaping_ignores_the_scale_of_the_loss_and_a_population_of_one(kind):
    found = {}
    for scale in (1.0, 1024.0):
        model = Regression()
        optimizer = MeZO(model.named_parameters(), 1e-2, seed=3, shaping=kind, num_samples=4)
        for _ in range(3):
            optimizer.step(lambda model=model, scale=scale: scale * model())
        found[scale] = weights(model)
    assert torch.equal(found[1.0], found[1024.0])
    alone = []
    for options in ({}, {"shaping": kind}):
        model = Regression()
        MeZO(model.named_parameters(), 1e-2, seed=3, **options).step(model)
        alone.append(weights(model))
    assert torch.equal(*alone)


@pytest.mark.parametrize("perturbation", ["in_place", "scratch", "low_rank"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_run_of_each_replays_to_the_bit(name, perturbation, tmp_path):
    options, _ = ESTIMATORS[name]
    if "layers" in options:
        if perturbation == "low_rank":
            return  # refused, below
        own = {"first": 0.7, "bias": 1.3, "last": 2.0}
        options = {"layers": options["layers"] | {"scales": own}}
    dtype = torch.float32
    model = Regression(dtype)
    settings = {"lr": 1e-3, "weight_decay": 0.1, "perturbation": perturbation, "interval": 3}
    optimizer = MeZO(model.named_parameters(), seed=5, **settings, **options)
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        for _ in range(5):
            optimizer.step(model)
    optimizer.write()
    base = trajectory.replay(tmp_path / "run.mezo", Regression(dtype))
    assert torch.equal(weights(base), weights(model))
    assert not torch.equal(weights(base), weights(Regression(dtype)))


def test_one_point_goes_on_from_a_checkpoint_alone(tmp_path):
    model = Regression(torch.float32)
    optimizer = MeZO(model.named_parameters(), seed=5, estimator="one_point")
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        optimizer.step(model)
    base = Regression(torch.float32)
    other = MeZO(base.named_parameters(), seed=5, estimator="one_point")
    with pytest.raises(InputError, match="a run with estimator one_point can only resume"):
        trajectory.catch_up(tmp_path / "run.mezo", other)


def test_what_cannot_work_is_refused_by_name():
    model = Regression(torch.float32)
    scales = variance_modified({"first": 1.0})
    cases = [
        ({"estimator": "three_point"}, "estimator must be two_point, one_sided or one_point"),
        ({"shaping": "softmax"}, "shaping must be z_scores or ranks, got 'softmax'"),
        ({"layers": {"scale": {}}}, "layers has scales, modified and thresholds, not scale"),
        ({"layers": {"scales": {"first": 1.0}, "modified": "x"}}, "modified must be variance or"),
        ({"layers": variance_modified({"fist": 1.0})}, "scales names fist, which is not trained"),
        ({"layers": variance_modified({"first": 0.0})}, "scales of first must be positive"),
        ({"layers": scales, "perturbation": "low_rank"}, "layers cannot be used with low_rank"),
        ({"layers": {"thresholds": {"first": 0.1}}}, "perturb in scratch"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            MeZO(model.named_parameters(), **given)
    MeZO(model.named_parameters(), layers={"thresholds": {"first": 0.0}}, perturbation="scratch")
    with pytest.raises(InputError, match="keep must be above 0 and at most 1, got 0"):
        small(model.named_parameters(), 0)


def test_walks_of_one_side_come_home_by_two_roundings():
    model = Regression(torch.float32)
    before = weights(model)
    optimizer = MeZO(model.named_parameters(), estimator="one_sided", seed=1)
    optimizer.estimate(model)
    bound = 2 * ROUNDING[torch.float32] * (before.abs() + 6e-3)
    assert ((weights(model) - before).abs() <= bound).all()


def test_a_one_point_run_whose_first_loss_is_nan_refuses_that_step_alone():
    """A first difference of 0.0 kept the NaN as the loss before: every later step was refused."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = MeZO([("p", p)], lr=1e-2, seed=1, estimator="one_point")
    optimizer.step(lambda: float("nan"))
    assert optimizer.memory.before == []
    for _ in range(2):
        optimizer.step(lambda: p.square().sum())
    assert optimizer.memory.number == 2
