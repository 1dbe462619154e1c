"""Estimates beside the two-point one of mezo.py, and what becomes of a step's estimates.

    two_point    (L(theta + eps z) - L(theta - eps z)) / 2 eps      2 forward passes a direction
    one_sided    (L(theta + eps z) - L(theta)) / eps                1, and 1 for all of a batch
    one_point    (L(theta + eps z) - the last step's) / eps         1: Definition 8

`shaping` turns the losses of several directions into the numbers that are applied: None leaves the
estimates; "z_scores" divides by the standard deviation of the step's losses (FZOO,
arXiv:2506.09034: one_sided, rademacher, 8 directions), "ranks" replaces losses by their centred
ranks (evolution strategies). With either, lr is about the size of a weight's step, eps cancels, and
a population of one is left as it is.
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mezo.closures import Closure, Mean

ESTIMATORS = ("two_point", "one_sided", "one_point")
SHAPINGS = (None, "z_scores", "ranks")
_HISTORY, _ENOUGH = 100, 10  # projected gradients that a quantile is taken of


@dataclass(frozen=True)
class Estimate:
    """The gradient is about `projected_grad` * z."""

    projected_grad: float  # change of the loss a unit of z
    loss: float  # at theta: for two points (loss_plus + loss_minus) / 2 = L(theta) + O(eps^2)
    losses: tuple[float, ...] = ()  # (loss_plus, loss_minus), or loss_plus alone
    examples: float = 1.0  # its weight among the estimates of one direction


FAILED = Estimate(math.nan, math.nan, (math.nan, math.nan))


def passes_of(estimator: str, num_samples: int) -> int:
    """Forward passes a step, on one batch."""
    return {"two_point": 2 * num_samples, "one_sided": num_samples + 1}.get(estimator, num_samples)


@torch.no_grad()
def one_way(
    closure: Closure, perturbed: Any, group: Mapping[str, Any], probe: int, clean: float | None
) -> Estimate:
    """The estimate that the group's estimator, one_sided or one_point, makes of a direction."""
    if group["estimator"] == "one_sided":
        return one_sided(closure, perturbed, clean)
    return one_point(closure, perturbed, dict(enumerate(group.get("before", ()))).get(probe))


def one_sided(closure: Closure, perturbed: Any, clean: float | None = None) -> Estimate:
    """A forward difference: biased by eps/2 z'Hz, which two points cancel; half the passes.

    Variance as of two points. `clean` is L(theta) of the same batch, if it is known: n directions
    then cost n + 1 forward passes. In place, it leaves the weights at theta + eps z.
    """
    if clean is None:
        with perturbed.home():
            clean = float(closure())
    with perturbed.at(+1):
        plus = float(closure())
    return Estimate((plus - clean) / perturbed.eps, clean, (plus,))


def one_point(closure: Closure, perturbed: Any, before: float | None) -> Estimate:
    """Residual feedback: L(theta + eps z) less that of the step `before`, of its own z and batch.

    One forward pass; without `before`, in a run's first step, 0. The expectation is the two-point
    estimate's, the variance that of two losses: of two batches, and over eps (Appendix B.5).
    """
    with perturbed.at(+1):
        plus = float(closure())
    return Estimate(0.0 if before is None else (plus - before) / perturbed.eps, plus, (plus,))


def applied(
    seen: Mapping[int, Sequence[Estimate]], group: MutableMapping[str, Any]
) -> tuple[dict[int, float], float, bool]:
    """(projected gradients, loss, whether they are finite) of a step's directions, as applied.

    The estimates of one direction are averaged (`merged`). `group` has the shaping, bounds and
    scalar rule, and keeps what these remember; a step that is not finite leaves that as it was.
    """
    means = {i: merged(es) for i, es in seen.items()}
    grads = {i: e.projected_grad for i, e in means.items()}
    loss = _mean([e.loss for e in means.values()])
    if not all(map(math.isfinite, grads.values())):
        return grads, loss, False
    if group.get("estimator") == "one_point":
        group["before"] = [e.losses[0] for e in means.values()]
    if group.get("shaping") and len(seen) > 1:
        grads = shaped(means, group["shaping"], group["eps"])
    grads, group["history"] = clipped(grads, group)
    if group["rule"]["name"] == "scalar_adam":
        grads = _scaled(grads, group)
    return grads, loss, True


def weighed(found: Estimate, closure: Closure) -> Estimate:
    """The estimate, with the number of examples that its closure is the mean over."""
    return replace(found, examples=closure.examples) if isinstance(closure, Mean) else found


def merged(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of one direction's estimates, each weighted by its number of examples."""
    if len(estimates) == 1:
        return estimates[0]
    weights = [e.examples for e in estimates]

    def mean(values: Sequence[float]) -> float:
        return sum(x * w for x, w in zip(values, weights, strict=True) if w) / sum(weights)

    if not sum(weights):
        return FAILED
    losses = zip(*(e.losses for e in estimates), strict=True)
    grad, loss = mean([e.projected_grad for e in estimates]), mean([e.loss for e in estimates])
    return Estimate(grad, loss, tuple(map(mean, losses)), sum(weights))


def shaped(means: Mapping[int, Estimate], kind: str, eps: float) -> dict[int, float]:
    """Projected gradients of a population, one estimate a direction; 0 where all losses are the
    same."""
    flat = torch.tensor([x for e in means.values() for x in e.losses], dtype=torch.float64)
    if kind == "z_scores":
        spread = float(flat.std())
        return {i: e.projected_grad * eps / spread if spread > 0 else 0.0 for i, e in means.items()}
    ranks = _ranks(flat)
    if len(flat) == 2 * len(means):
        return {i: (ranks[2 * k] - ranks[2 * k + 1]) / 2 for k, i in enumerate(means)}
    return dict(zip(means, ranks, strict=True))


def _ranks(values: torch.Tensor) -> list[float]:
    """From -1/2 for the lowest to 1/2 for the highest; equal values share the mean of theirs."""
    below = (values[None] < values[:, None]).sum(1).double()
    equal = (values[None] == values[:, None]).sum(1).double()
    return ((below + (equal - 1) / 2) / (len(values) - 1) - 0.5).tolist()


def clipped(
    grads: Mapping[int, float], group: Mapping[str, Any]
) -> tuple[dict[int, float], tuple[float, ...]]:
    """projected_grads within the bounds that the group sets, and the history for the next step.

    The history is of the sizes measured, not of those applied: a bound does not tighten itself.
    """
    bound, history = group["clip"] or float("inf"), group.get("history", ())
    if group["clip_quantile"] is not None:
        if len(history) >= _ENOUGH:
            bound = min(bound, float(np.quantile(history, group["clip_quantile"])))
        history = (*history, *map(abs, grads.values()))[-_HISTORY:]
    return {i: max(-bound, min(bound, g)) for i, g in grads.items()}, history


def _scaled(grads: Mapping[int, float], group: MutableMapping[str, Any]) -> dict[int, float]:
    """ScalarAdam: over the root of the mean square of all projected gradients up to now."""
    rule, (mean, weight) = group["rule"], group.get("second_moment", (0.0, 0.0))
    square = _mean([g * g for g in grads.values()])
    mean = mean * rule["beta"] + square * (1 - rule["beta"])
    weight = weight * rule["beta"] + (1 - rule["beta"])
    group["second_moment"] = [mean, weight]
    return {i: g / (math.sqrt(mean / weight) + rule["eps"]) for i, g in grads.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
