"""What is a tensor's own: the scale of its perturbation (Definitions 6 and 7), and a mask.

    named = list(model.named_parameters())
    MeZO(named, layers=expectation_modified(parameter_norms(named)))
    MeZO(named, layers=small(named, 0.5), perturbation="scratch")     # the smaller half of each

`layers` is a dict of plain numbers, which the run log keeps; `|` joins two.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mezo.errors import InputError

MODIFIED = ("variance", "expectation")


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
