"""Norms of layers (Definitions 6 and 7), and masks."""

import math
from statistics import fmean

import pytest
import torch
from models import Quadratic, Regression, gradient, weights

from mezo import MeZO, noise, trajectory
from mezo.errors import InputError
from mezo.layer_norms import gradient_norms, layer_of, parameter_norms, small


def test_norms_are_of_layers_and_keep_the_perturbations_length():
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(7, 3),
            "layers": torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)]),
        }
    )
    named = list(model.named_parameters())
    assert {layer_of(n) for n, _ in named} == {"embed", "layers.0", "layers.1"}
    found = parameter_norms(named)
    assert found["layers.0.weight"] == found["layers.0.bias"]
    ratio = math.sqrt(
        sum(float(p.detach().square().sum()) for p in model["layers"][1].parameters())
    )
    other = float(model["embed"].weight.detach().norm())
    assert found["layers.1.bias"] / found["embed.weight"] == pytest.approx(ratio / other, rel=1e-6)
    numel = sum(p.numel() for _, p in named)
    assert fmean([1 / found[n] ** 2 for n, p in named for _ in range(p.numel())]) == pytest.approx(
        1.0, rel=1e-12
    )
    assert numel == 21 + 24
    with torch.no_grad():
        for p in model["layers"][1].parameters():
            p.zero_()
    with pytest.raises(InputError, match=r"the norm of layer layers\.1 is 0"):
        parameter_norms(named)
    with torch.no_grad():
        model["layers"][1].bias.fill_(math.inf)
    with pytest.raises(InputError, match=r"the norm of layer layers\.1 is inf"):
        parameter_norms(named)


def test_gradient_norms_are_estimated_by_forward_passes():
    """E (z.grad)^2 = |grad|^2 with variance 2 |grad|^4: 400 samples are good to 5 sqrt(2/400)."""
    model = Quadratic()
    before = weights(model)
    found = gradient_norms(
        [("0.a", model.a), ("1.b", model._parameters["b"])], model, num_samples=400, eps=1e-4
    )
    g = gradient(model)
    ratio = float(g[:3].norm() / g[3:].norm())
    assert torch.equal(weights(model), before)
    assert (found["0.a"] / found["1.b"]) ** 2 == pytest.approx(
        ratio**2, rel=2 * 5 * math.sqrt(2 / 400)
    )


def test_gradient_norms_are_root_mean_squares_along_four_directions_of_seed_0():
    """Central differences are exact on a quadratic: |g_l . z_l|^2 of each layer and direction."""
    model, sizes = Quadratic(), {"0.a": 3, "1.b": 5}
    found = gradient_norms([("0.a", model.a), ("1.b", model._parameters["b"])], model)
    squares, start = {}, 0
    for name, size in sizes.items():
        g, key, start = gradient(model)[start : start + size], noise.tensor_key(0, name), size
        where = [{"step": 0, "probe": i, "distribution": "gaussian"} for i in range(4)]
        squares[name] = sum(float(g @ noise.draw(key, 0, size, **w).double()) ** 2 for w in where)
    ratio = math.sqrt(squares["0.a"] / squares["1.b"])
    assert found["0.a"] / found["1.b"] == pytest.approx(ratio, rel=1e-6)


def test_a_mask_of_almost_nothing_keeps_the_smallest_weight():
    assert small([("w", torch.tensor([-3.0, 1.0, 2.0], requires_grad=True))], 1e-9) == {
        "thresholds": {"w": 1.0}
    }


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_trains_the_small_weights_alone(dtype, rounding, tmp_path):
    """Where |theta| is beyond the threshold, nothing moves, in the forward pass nor by updates."""
    model, base = Regression(dtype), Regression(dtype)
    layers = small(model.named_parameters(), 0.5)
    settings = {"perturbation": "scratch", "layers": layers, "rounding": rounding, "eps": 0.1}
    optimizer = MeZO(model.named_parameters(), 1e-2, seed=5, **settings)
    outside = {
        n: p.detach().abs().double() > layers["thresholds"][n] for n, p in base.named_parameters()
    }
    seen = []

    def closure():
        with torch.no_grad():
            seen.append({n: (p * 1.0) for n, p in model.named_parameters()})
        return model().float()

    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        optimizer.watch.looks = False  # at theta, where nothing is masked
        optimizer.step(closure)
        for _ in range(3):
            optimizer.step(model)
    for n, p in base.named_parameters():
        kept = outside[n]
        assert 0 < kept.sum() <= (p.numel() + 1) / 2
        assert torch.equal(dict(model.named_parameters())[n][kept], p[kept])
        assert torch.equal(seen[0][n][kept], p[kept])
        assert not torch.equal(seen[0][n][~kept], p[~kept])
    assert not torch.equal(weights(model), weights(base))
    trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(base), weights(model))


def test_a_mask_of_an_embedding_and_of_one_expert():
    """Rows looked up, and one index of a stack, are masked as the whole is."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6))
    stack = torch.nn.Parameter(torch.linspace(-1, 1, 24).view(4, 2, 3))
    layers = {"thresholds": {"w": 0.5, "s": 0.5}}
    optimizer = MeZO([("w", weight), ("s", stack)], perturbation="scratch", layers=layers)
    optimizer.watch.looks = False  # at theta, where nothing is masked
    seen = []

    def closure():
        rows = torch.nn.functional.embedding(torch.tensor([3, 1]), weight)
        seen.append((rows, (weight + 0)[[3, 1]], stack[2], (stack + 0)[2]))
        return rows.sum() + stack[2].sum()

    optimizer.step(closure)
    rows, whole, one, of = seen[0]
    assert torch.equal(rows, whole)
    assert torch.equal(one, of)
