"""Algorithm 1: the estimate, the update, and what a step leaves when it fails."""

import copy
import math
import signal
from functools import partial

import pytest
import reference
import torch
from models import Regression, walked_home, weights

from mezo import MeZO, noise, trajectory
from mezo.errors import InputError


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_the_estimate_is_exact_on_a_quadratic(distribution):
    """Central differences have no error on a quadratic: g = z . grad L up to rounding."""
    a, b, loss = reference.quadratic(40)
    x = torch.nn.Parameter(torch.ones(40, dtype=torch.float64))
    value = loss(x.detach())
    optimizer = MeZO([("x", x)], eps=1e-3, seed=3, distribution=distribution)
    estimate = optimizer.estimate(lambda: loss(x.detach()))
    z = noise.draw(noise.tensor_key(3, "x"), 0, 40, step=0, distribution=distribution).double()
    exact = float(z @ (a @ torch.ones(40, dtype=torch.float64) + b))
    # 2 losses of 40^2 products each, every one rounded, divided by 2 eps
    assert abs(estimate.projected_grad - exact) < 2 * 1600 * 2.0**-53 * (abs(value) + 40) / 2e-3
    assert abs(estimate.loss - value) < 0.51e-6 * float(z @ a @ z)  # eps^2 / 2 z'Az


def test_the_estimate_is_unbiased():
    """Mean of g z over 1,500 steps within 5 sigma of the gradient, in each coordinate.

    Var(g z_i) = |grad|^2 + grad_i^2 for a Gaussian z.
    """
    a, b, loss = reference.quadratic(8)
    x = torch.nn.Parameter(torch.ones(8))
    gradient = a @ torch.ones(8, dtype=torch.float64) + b
    optimizer = MeZO([("x", x)], lr=0.0, seed=4)
    total, n = torch.zeros(8, dtype=torch.float64), 1500
    for step in range(n):
        g = optimizer.estimate(lambda: loss(x.detach().double())).projected_grad
        total += g * noise.draw(noise.tensor_key(4, "x"), 0, 8, step=step).double()
        optimizer.step()
    sigma = torch.sqrt((gradient.norm() ** 2 + gradient**2) / n)
    assert ((total / n - gradient).abs() < 5 * sigma).all()


@pytest.mark.parametrize(("num_samples", "weight_decay"), [(1, 0.0), (1, 0.1), (4, 0.1)])
def test_20_steps_equal_the_naive_reference(num_samples, weight_decay):
    """The twin stores z and moves nothing in place: the same to rounding in float64."""
    model, twin_model = Regression(), Regression()
    settings = {"lr": 1e-2, "eps": 1e-3, "weight_decay": weight_decay, "num_samples": num_samples}
    twin = {name: p.detach().clone() for name, p in model.named_parameters()}

    def draw(name, step, probe):
        p, key = twin[name], noise.tensor_key(5, name)
        return noise.draw(key, 0, p.numel(), step=step, probe=probe).double().view(p.shape)

    def loss_of(tensors):
        return float(torch.func.functional_call(twin_model, tensors))

    expected = reference.mezo(twin, loss_of, draw, steps=20, **settings)
    optimizer = MeZO(model.named_parameters(), seed=5, **settings)
    losses = [optimizer.step(model) for _ in range(20)]
    # a loss is off by a few roundings; 1 / (2 eps) makes it 500 times as much in g, lr |z| 0.05 of
    # that in theta, and 20 steps add up: about 20 * 25 * 10 roundings
    assert losses == pytest.approx(expected, rel=5000 * 2.0**-53)
    for name, p in model.named_parameters():
        assert (p - twin[name]).abs().max() < 5000 * 2.0**-53 * (1 + p.abs().max())


def test_n_samples_are_the_mean_of_n_estimates():
    """Limit: step(closure) with n = 3 is three estimates and one update of their mean."""
    models = [Regression(), Regression()]
    optimizers = [MeZO(m.named_parameters(), lr=1e-2, seed=1, num_samples=3) for m in models]
    optimizers[0].step(models[0])
    for probe in range(3):
        optimizers[1].estimate(models[1], probe)
    optimizers[1].step()
    assert torch.equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_restoring_with_the_update_has_the_bits_of_restoring_before_it(dtype):
    """step(closure) saves a pass over the weights, not a rounding."""
    models = [Regression(dtype), Regression(dtype)]
    options = {
        "lr": 1e-2,
        "seed": 1,
        "weight_decay": 0.1,
        "perturbation": "in_place",
        "rounding": "nearest",
    }
    optimizers = [MeZO(m.named_parameters(), **options) for m in models]
    for _ in range(5):
        optimizers[0].step(models[0])
        optimizers[1].estimate(models[1])
        optimizers[1].step()
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_accumulated_estimates_share_z_and_are_averaged():
    model = Regression()
    optimizer = MeZO(model.named_parameters(), lr=0.0, seed=1)
    seen = []
    optimizer.observers.append(seen.append)
    grads = [optimizer.estimate(lambda k=k: k * model()).projected_grad for k in (1.0, 3.0)]
    optimizer.step()
    assert grads[1] == pytest.approx(3 * grads[0], rel=1e-9)  # one direction
    assert seen[0].projected_grads == (pytest.approx(sum(grads) / 2),)
    assert seen[0].cycles == (2,)


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_closure_restores_the_weights(fails_at, error, caplog):
    """And is all that is said: the loss that is missing is not told as one that is not finite."""
    model = Regression(torch.float32)
    before, calls = weights(model), []
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1)

    def closure():
        calls.append(1)
        if len(calls) == fails_at:
            raise error("out of memory")
        return model()

    with pytest.raises(error):
        optimizer.step(closure)
    assert caplog.text == ""
    assert ((weights(model) - before).abs() <= walked_home(before, 1e-3)).all()
    assert optimizer.param_groups[0]["step"] == 1  # its z is not drawn again


@pytest.mark.parametrize("num_samples", [1, 2])
def test_an_interrupt_within_a_sweep_leaves_what_the_log_says(num_samples, monkeypatch, tmp_path):
    """Ctrl-C after any leg of a walk or any tensor's update: the run goes on and replays."""
    originals = {name: getattr(noise, name) for name in ("apply_", "apply_all_")}
    for fails_at in range(1, 3 * num_samples + 1):
        model = Regression(torch.float32)
        base, calls = copy.deepcopy(model), []

        def interrupted(name, *args, calls=calls, fails_at=fails_at, **kwargs):
            originals[name](*args, **kwargs)
            calls.append(name)
            if len(calls) == fails_at:
                signal.raise_signal(signal.SIGINT)

        options = {"lr": 1e-2, "seed": 1, "num_samples": num_samples}
        optimizer = MeZO(model.named_parameters(), **options)
        with trajectory.record(optimizer, tmp_path / "run.mezo"):
            for name in originals:
                monkeypatch.setattr(noise, name, partial(interrupted, name))
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(model)
            monkeypatch.undo()
            optimizer.step(model)
        assert len(trajectory.read(tmp_path / "run.mezo").steps) == 2
        trajectory.replay(tmp_path / "run.mezo", base)
        assert torch.equal(weights(base), weights(model))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_refuses_the_update(loss, caplog):
    model = Regression(torch.float32)
    before, seen = weights(model), []
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, num_samples=2)
    optimizer.observers.append(seen.append)
    optimizer.step(lambda: loss)
    assert ((weights(model) - before).abs() <= walked_home(before, 1e-3, steps=2)).all()
    assert not math.isfinite(seen[0].loss)
    assert "step 0: loss" in caplog.text
    assert "update refused" in caplog.text
    optimizer.step(model)
    assert math.isfinite(seen[1].loss)


def test_a_model_that_cannot_run_backward_trains():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("MeZO asked for a gradient")

    model = Regression()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1)
    losses = [optimizer.step(lambda: NoBackward.apply(model())) for _ in range(200)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_both_forward_passes_run_without_autograd():
    """The two calls of the first step's look, too."""
    model, modes = Regression(), []
    MeZO(model.named_parameters()).step(lambda: modes.append(torch.is_grad_enabled()) or model())
    assert modes == [False] * 4


def test_the_autocast_cache_is_cleared_between_the_passes():
    """Inside one autocast context the second pass would reuse casts of the first one's weights."""
    model, x = torch.nn.Linear(64, 64), torch.ones(4, 64)
    optimizer = MeZO(model.named_parameters(), lr=0.0, eps=1e-1, seed=1)

    def loss():
        return (model(x).float() ** 2).mean()

    def loss_in_its_own_context():
        with torch.autocast("cpu", torch.bfloat16):
            return loss()

    expected = optimizer.estimate(loss_in_its_own_context).projected_grad
    with torch.autocast("cpu", torch.bfloat16):
        found = optimizer.estimate(loss).projected_grad
    assert found == pytest.approx(expected, rel=1e-3)  # the walk's own roundings, seen through bf16


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation creates."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not any(
            isinstance(a, torch.Tensor) and a.data_ptr() == out.data_ptr() for a in args
        ):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("kernel", [True, False])
def test_nothing_of_a_parameters_size_is_allocated(kernel, monkeypatch):
    """No z, no gradient, no copy: pieces of 2^16 elements, or the kernel's 4 KB and a sample."""
    if not kernel:
        monkeypatch.setattr(noise, "_kernel", lambda device: None)
    p = torch.nn.Parameter(torch.zeros(1000, 1000))
    optimizer = MeZO([("p", p)], lr=1.0, num_samples=2, weight_decay=0.1)
    with Counter() as counter:
        optimizer.step(lambda: p.sum() * 1.0)
    assert counter.largest <= (2 * 4096 if kernel else 4 * 2**16)
    assert not optimizer.state


def test_a_step_without_an_estimate_and_probes_out_of_order_are_refused():
    model = Regression()
    optimizer = MeZO(model.named_parameters())
    with pytest.raises(RuntimeError, match="step\\(\\) needs a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="in order from 0: not 1 now"):
        optimizer.estimate(model, probe=1)  # a log would replay it as probe 0
    for probe in (0, 0, 1, 1):
        optimizer.estimate(model, probe)
    with pytest.raises(ValueError, match="in order"):
        optimizer.estimate(model, probe=0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "returned None"),
        ((1.0, 2.0), "returned a tuple"),
        ({"loss": 1.0}, "returned a dict"),
        (torch.ones(3), r"a tensor of shape \(3,\)"),
    ],
)
def test_what_is_no_loss_is_refused_in_one_sentence(loss, message):
    model = Regression()
    with pytest.raises(InputError, match=message):
        MeZO(model.named_parameters()).step(lambda: loss)
