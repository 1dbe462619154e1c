"""What is a tensor's own: the scale of its perturbation (Definitions 6 and 7), and a mask.

    named = list(model.named_parameters())
    MeZO(named, layers=expectation_modified(parameter_norms(named)))
    MeZO(named, layers=small(named, 0.5), perturbation="scratch")     # the smaller half of each

`layers` is a dict of plain numbers, which the run log keeps; `|` joins two.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mezo import noise
from mezo.errors import InputError

MODIFIED = ("variance", "expectation")
Named = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Own:
    """What is a weight's own beside its name."""

    scale: float = 1.0  # d: it is perturbed by eps z / d
    modified: str = "variance"  # or "expectation": is the estimate along d z, or along z
    threshold: float | None = None  # only where |theta| is at most this is it trained

    @property
    def factor(self) -> float:
        return self.scale if self.modified == "variance" else 1.0


PLAIN = Own()


def own_of(layers: Mapping[str, Any] | None, name: str) -> Own:
    if not layers:
        return PLAIN
    scale, limit = layers.get("scales", {}).get(name, 1.0), layers.get("thresholds", {}).get(name)
    return Own(scale, layers.get("modified", "variance"), limit)


def owns(layers: Mapping[str, Any] | None) -> dict[str, Own]:
    """By name, from MeZO's option."""
    layers = layers or {}
    names = {*layers.get("scales", {}), *layers.get("thresholds", {})}
    return {name: own_of(layers, name) for name in names}


def check_layers(layers: Mapping[str, Any] | None, perturbation: str, known: set[str]) -> None:
    """InputError for what MeZO cannot do with `layers`; `known` are the trained tensors."""
    if not layers:
        return
    if unknown := layers.keys() - {"scales", "modified", "thresholds"}:
        raise InputError(f"layers has scales, modified and thresholds, not {', '.join(unknown)}")
    if layers.get("modified", "variance") not in MODIFIED:
        raise InputError(f"modified must be {' or '.join(MODIFIED)}, got {layers['modified']!r}")
    if perturbation == "low_rank":
        raise InputError("layers does not go with low_rank: perturb in scratch or in place")
    if layers.get("thresholds") and perturbation == "in_place":
        raise InputError("a mask is read off the weights: perturb in scratch, which leaves them")
    for kind, least in (("scales", 0.0), ("thresholds", -1.0)):
        for name, value in layers.get(kind, {}).items():
            if name not in known:
                raise InputError(f"layers: {kind} names {name}, which is not trained")
            if not (least < value < math.inf):
                raise InputError(f"layers: {kind} of {name} must be positive, got {value}")


def variance_modified(scales: Mapping[str, float]) -> dict[str, Any]:
    """Definition 6: theta is moved by eps z / d, the estimate goes along d z. Unbiased."""
    return {"scales": dict(scales), "modified": "variance"}


def expectation_modified(scales: Mapping[str, float]) -> dict[str, Any]:
    """Definition 7: the estimate goes along z, so that its mean is the gradient over d."""
    return {"scales": dict(scales), "modified": "expectation"}


def within(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where the mask lets x be trained; in float64, so that every form of a run agrees."""
    return x.abs().double() <= threshold


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
    from mezo.perturbation import Scratch

    rows = [(noise.canonical_name(n), p) for n, p in named if p.requires_grad]
    squares: dict[str, float] = {}
    for layer in dict.fromkeys(layer_of(n) for n, _ in rows):
        keyed = [(n, p, noise.tensor_key(seed, n)) for n, p in rows if layer_of(n) == layer]
        total = 0.0
        for probe in range(num_samples):
            perturbed, losses = Scratch(keyed, eps, 0, probe, "gaussian"), []
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
