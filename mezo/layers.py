"""Per-tensor settings as data: scales of the perturbation (Definitions 6 and 7), and masks.

    named = list(model.named_parameters())
    MeZO(named, layers=expectation_modified(parameter_norms(named)))

`layers` is a dict of plain numbers, which the run log keeps; `|` joins two. layer_norms.py has the
numbers of a model: norms of its layers, thresholds of the smallest weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mezo.errors import InputError
from mezo.noise import Move

MODIFIED = ("variance", "expectation")


@dataclass(frozen=True)
class TensorScale:
    """What sets one tensor apart from the others: the scale of its perturbation, and its mask."""

    scale: float = 1.0  # d: it is perturbed by eps z / d
    modified: str = "variance"  # or "expectation": whether the estimate is along d z, or along z
    threshold: float | None = None  # it is trained only where |theta| is at most this

    @property
    def factor(self) -> float:
        """What lr is multiplied by for this tensor."""
        return self.scale if self.modified == "variance" else 1.0

    @property
    def masked(self) -> bool:
        return self.threshold is not None

    def walk(self, moves: Sequence[Move]) -> list[Move]:
        """The moves of a perturbation, over d."""
        if self.scale == 1.0:
            return [*moves]
        return [move._replace(coefficient=move.coefficient / self.scale) for move in moves]


PLAIN = TensorScale()


def scales_of(layers: Mapping[str, Any] | None) -> dict[str, TensorScale]:
    """By tensor name, from MeZO's option; a name that is missing is PLAIN."""
    layers = layers or {}
    scales, thresholds = layers.get("scales", {}), layers.get("thresholds", {})
    modified = layers.get("modified", "variance")
    return {
        name: TensorScale(scales.get(name, 1.0), modified, thresholds.get(name))
        for name in {*scales, *thresholds}
    }


def check_layers(layers: Mapping[str, Any] | None, form: Any, known: set[str]) -> None:
    """InputError for what a form (forms.Direction) cannot do; `known` are the trained tensors."""
    if not layers:
        return
    if unknown := layers.keys() - {"scales", "modified", "thresholds"}:
        raise InputError(f"layers has scales, modified and thresholds, not {', '.join(unknown)}")
    if layers.get("modified", "variance") not in MODIFIED:
        raise InputError(f"modified must be {' or '.join(MODIFIED)}, got {layers['modified']!r}")
    if form.factored:
        raise InputError("layers does not go with low_rank: perturb in scratch or in place")
    if layers.get("thresholds") and form.moves_weights:
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
