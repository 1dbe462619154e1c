"""Per-tensor settings as data: scales of the perturbation (Definitions 6 and 7), and masks.

    named = list(model.named_parameters())
    MeZO(named, layers=expectation_modified(parameter_norms(named)))

`layers` is a dict of plain numbers, which the run log keeps; `|` joins two of them. layer_norms.py
computes the numbers of a model: the norms of its layers and the thresholds of its smallest weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mezo.errors import InputError
from mezo.noise import Move
from mezo.options.table import MODIFIED


@dataclass(frozen=True)
class TensorScale:
    """One tensor's scale (d of Definitions 6 and 7) and mask."""

    scale: float = 1.0  # d: the tensor is perturbed by eps z / d
    modified: str = "variance"  # the update is along d z, or along z with "expectation"
    threshold: float | None = None  # if set, only weights with |theta| <= threshold are trained

    @cached_property
    def factor(self) -> float:
        """The factor by which lr is multiplied for this tensor."""
        return self.scale if self.modified == "variance" else 1.0

    def walk(self, moves: Sequence[Move]) -> list[Move]:
        """Return the moves of a perturbation, divided by d."""
        return [move._replace(coefficient=move.coefficient / self.scale) for move in moves]


PLAIN = TensorScale()


def scales_of(layers: Mapping[str, Any] | None) -> dict[str, TensorScale]:
    """Return the scales by tensor name, from the option `layers`; a missing name is PLAIN."""
    layers = layers or {}
    scales, thresholds = layers.get("scales", {}), layers.get("thresholds", {})
    modified = layers.get("modified", "variance")
    return {
        name: TensorScale(scales.get(name, 1.0), modified, thresholds.get(name))
        for name in {*scales, *thresholds}
    }


def check_layers(layers: Mapping[str, Any] | None, form: Any, known: set[str]) -> None:
    """Raise InputError if `layers` is malformed or the form (forms.Direction) cannot use it.

    `known` are the names of the trained tensors.
    """
    if not layers:
        return
    if unknown := layers.keys() - {"scales", "modified", "thresholds"}:
        raise InputError(f"layers has scales, modified and thresholds, not {', '.join(unknown)}")
    if layers.get("modified", "variance") not in MODIFIED:
        raise InputError(f"modified must be {' or '.join(MODIFIED)}, got {layers['modified']!r}")
    if form.factored:
        raise InputError("layers cannot be used with low_rank: perturb in scratch or in place")
    if layers.get("thresholds") and form.moves_weights:
        raise InputError("a mask depends on the weights, which must not move: perturb in scratch")
    for kind, least in (("scales", 0.0), ("thresholds", -1.0)):
        for name, value in layers.get(kind, {}).items():
            if name not in known:
                raise InputError(f"layers: {kind} names {name}, which is not trained")
            if not (least < value < math.inf):
                raise InputError(f"layers: {kind} of {name} must be positive, got {value}")


def variance_modified(scales: Mapping[str, float]) -> dict[str, Any]:
    """Return `layers` for Definition 6: perturb by eps z / d and update along d z.

    The estimate is unbiased. `scales` are d by tensor name, all positive.
    """
    return {"scales": dict(scales), "modified": "variance"}


def expectation_modified(scales: Mapping[str, float]) -> dict[str, Any]:
    """Return `layers` for Definition 7: perturb by eps z / d and update along z.

    The mean of the estimate is the gradient divided by d. `scales` are d by tensor name, all
    positive.
    """
    return {"scales": dict(scales), "modified": "expectation"}


def within(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return where |x| <= threshold, compared in float64 so that all forms agree."""
    return x.abs().double() <= threshold
