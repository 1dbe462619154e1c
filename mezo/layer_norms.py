"""Where per-tensor scales and masks come from: norms of layers, and the smallest weights.

named = list(model.named_parameters())
MeZO(named, layers=expectation_modified(parameter_norms(named)))
MeZO(named, layers=small(named, 0.5), perturbation="scratch")     # the smaller half of each
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from mezo import noise
from mezo.errors import InputError
from mezo.forms.direction import Part, Row
from mezo.forms.scratch import Scratch

Named = Iterable[tuple[str, torch.Tensor]]


def parameter_norms(named: Named) -> dict[str, float]:
    """d = the norm of a layer's weights, by tensor; a layer is a block.

    Scaled so that the perturbation is as long as without scales. InputError for a layer of zeros.
    """
    rows = [(noise.canonical_name(n), p.detach()) for n, p in named if p.requires_grad]
    squares = {n: float(p.double().square().sum()) for n, p in rows}
    return _by_layer(rows, squares)


@torch.no_grad()
def gradient_norms(
    named: Named,
    closure: Callable[[], float | torch.Tensor],
    *,
    eps: float = 1e-3,
    num_samples: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """d = the norm of a layer's gradient, estimated by forward passes alone (Proposition 1).

    A layer alone is perturbed: |L(theta + eps z_l) - L(theta - eps z_l)| / 2 eps is |grad_l . z_l|,
    whose root mean square is |grad_l|. Costs 2 num_samples forward passes a layer; `num_samples`
    of 4 know it to a third. In scratch, so that the weights stay as they are; scaled as
    `parameter_norms`. `named` and `closure` are what the optimizer will be given.
    """
    rows = [(noise.canonical_name(n), p) for n, p in named if p.requires_grad]
    settings = {"eps": eps, "step": 0, "distribution": "gaussian"}
    squares: dict[str, float] = {}
    for layer in dict.fromkeys(layer_of(n) for n, _ in rows):
        keyed = [Row(n, p, noise.tensor_key(seed, n)) for n, p in rows if layer_of(n) == layer]
        total = 0.0
        for probe in range(num_samples):
            perturbed, losses = Scratch([Part({}, keyed)], settings, probe), []
            for sign in (+1, -1):
                with perturbed.at(sign):
                    losses.append(float(closure()))
            total += ((losses[0] - losses[1]) / (2 * eps)) ** 2 / num_samples
        squares |= {n: total / len(keyed) for n, _, _ in keyed}
    return _by_layer(rows, squares)


def small(named: Named, keep: float) -> dict[str, Any]:
    """Train where |theta| is among the smallest `keep` of its tensor, as it was at the start.

    Sparse-MeZO's mask (arXiv:2402.15751) is a comparison with one number a tensor, made wherever it
    is needed and never stored. A weight that is moved beyond the threshold stays there.
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep must be above 0 and at most 1, got {keep}")
    found: dict[str, float] = {}
    for name, p in named:
        if p.requires_grad:
            sizes = p.detach().abs().double().flatten()
            place = max(1, math.ceil(keep * sizes.numel()))
            found[noise.canonical_name(name)] = float(sizes.kthvalue(place).values)
    return {"thresholds": found}


def layer_of(name: str) -> str:
    """The block that a parameter is in: "model.layers.3"; outside of blocks, its module."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1])


def _by_layer(rows: Sequence[tuple[str, torch.Tensor]], squares: dict[str, float]):
    layers: dict[str, float] = {}
    for name, _ in rows:
        layer = layer_of(name)
        layers[layer] = layers.get(layer, 0.0) + squares[name]
    for layer, square in layers.items():
        if not (math.isfinite(square) and square > 0):
            raise InputError(f"the norm of layer {layer or 'of the model'} is {math.sqrt(square)}")
    norms = {name: math.sqrt(layers[layer_of(name)]) for name, _ in rows}
    numel = sum(p.numel() for _, p in rows)
    mean = math.sqrt(sum(p.numel() / norms[name] ** 2 for name, p in rows) / numel)
    return {name: norm * mean for name, norm in norms.items()}
