"""Compute per-tensor scales and masks from a model: norms of layers, and the smallest weights.

named = list(model.named_parameters())
MeZO(named, layers=expectation_modified(parameter_norms(named)))
MeZO(named, layers=small(named, 0.5), perturbation="scratch")     # train each tensor's smaller half
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
    """Return d by tensor name: the norm of the weights of the tensor's layer, which is a block.

    The norms are scaled so that the perturbation is as long as without scales. Raises InputError
    for a layer whose norm is 0 or not finite.
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
    """Return d by tensor name: the norm of the layer's gradient, from forward passes alone.

    One layer at a time is perturbed: |L(theta + eps z_l) - L(theta - eps z_l)| / 2 eps is
    |grad_l . z_l|, whose root mean square is |grad_l| (Proposition 1). The weights stay as they
    are, and the norms are scaled as those of `parameter_norms`.

    Args:
        named: The named parameters that the optimizer will be given.
        closure: Returns the loss of a batch, without side effects.
        eps: Size of the perturbation.
        num_samples: Directions per layer, each of which costs two forward passes. With 4 the
            relative error is about a third.
        seed: Seed of the directions.

    Raises InputError for a layer whose norm is 0 or not finite.
    """
    rows = [(noise.canonical_name(n), p) for n, p in named if p.requires_grad]
    settings = {"eps": eps, "step": 0, "distribution": "gaussian"}
    squares: dict[str, float] = {}
    for layer in dict.fromkeys(layer_of(n) for n, _ in rows):
        keyed = [Row(n, p, noise.tensor_key(seed, n)) for n, p in rows if layer_of(n) == layer]
        total = 0.0
        for probe in range(num_samples):
            perturbed, losses = Scratch([Part({}, noise.Rows(keyed))], settings, probe), []
            for sign in (+1, -1):
                with perturbed.at(sign):
                    losses.append(float(closure()))
            total += ((losses[0] - losses[1]) / (2 * eps)) ** 2 / num_samples
        squares |= {n: total / len(keyed) for n, _, _ in keyed}
    return _by_layer(rows, squares)


def small(named: Named, keep: float) -> dict[str, Any]:
    """Return `layers` that train only the smallest weights of each tensor (Sparse-MeZO).

    The mask of arXiv:2402.15751 compares |theta| with one threshold per tensor whenever it is
    needed, and is never stored. A weight that moves beyond the threshold is trained no more.

    Args:
        named: The named parameters; thresholds are computed from their present values.
        keep: The fraction of each tensor to train, above 0 and at most 1.

    Raises InputError if `keep` is out of range.
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep must be above 0 and at most 1, got {keep}")
    thresholds: dict[str, float] = {}
    for name, p in named:
        if p.requires_grad:
            sizes = p.detach().abs().double().flatten()
            place = max(1, math.ceil(keep * sizes.numel()))
            thresholds[noise.canonical_name(name)] = float(sizes.kthvalue(place).values)
    return {"thresholds": thresholds}


def layer_of(name: str) -> str:
    """Return the block of a parameter, such as "model.layers.3", or its module if it has none."""
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
