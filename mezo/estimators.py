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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mezo.record import Memory
from mezo.rules import Rule

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


@dataclass(frozen=True)
class Estimator:
    """How the projected gradient along a direction is measured: a value for `MeZO(estimator=...)`.

    A function `(closure, direction) -> Estimate` will do in its place. `closure()` is the loss as a
    float; `with direction.at(+1):`, `at(-1)` and `home()` say at which weights, in this order, each
    at most once; the result may depend on nothing else.

    Args:
        measure: the function.
        sides: 2 if it visits theta - eps z, 1 if not. In place, weights then walk home by two moves
            instead of three.
        at_home: whether it calls `direction.loss_at_home(closure)`, which is one forward pass more
            for all directions of a batch.
        looks_back: whether it reads `direction.before`. Such a run resumes from checkpoints alone,
            as no log has these losses.
    """

    measure: Callable[[Any, Any], Estimate]
    sides: int = 2
    at_home: bool = False
    looks_back: bool = False

    def __call__(self, closure: Any, direction: Any) -> Estimate:
        return self.measure(closure, direction)

    def passes(self, num_samples: int) -> int:
        """Forward passes a step, on one batch."""
        return self.sides * num_samples + self.at_home


def one_sided(closure: Any, direction: Any) -> Estimate:
    """A forward difference: biased by eps/2 z'Hz, which two points cancel; half the passes.

    Its variance is that of two points. As L(theta) is measured once, n directions cost n + 1
    forward passes.
    """
    clean = direction.loss_at_home(closure)
    with direction.at(+1):
        plus = closure()
    return Estimate((plus - clean) / direction.eps, clean, (plus,))


def one_point(closure: Any, direction: Any) -> Estimate:
    """Residual feedback: L(theta + eps z) less that of the step before, of its own z and batch.

    One forward pass; in a run's first step, 0. The expectation is the two-point estimate's, the
    variance that of two losses: of two batches, and over eps (Appendix B.5).
    """
    with direction.at(+1):
        plus = closure()
    known = direction.before is not None
    return Estimate((plus - direction.before) / direction.eps if known else 0.0, plus, (plus,))


ONE_WAY = {
    "one_sided": Estimator(one_sided, sides=1, at_home=True),
    "one_point": Estimator(one_point, sides=1, looks_back=True),
}
ESTIMATORS = ("two_point", *ONE_WAY)  # the first is mezo.spsa
_TWO_POINT = Estimator(one_sided)  # for its numbers


def passes_of(estimator: str, num_samples: int) -> int:
    """Forward passes a step, on one batch, of the estimator of that name."""
    return ONE_WAY.get(estimator, _TWO_POINT).passes(num_samples)


def sides_of(estimator: str) -> int:
    """How many of theta + eps z and theta - eps z the estimator of that name looks at."""
    return ONE_WAY.get(estimator, _TWO_POINT).sides


def name_of(estimator: Callable[[Any, Any], Estimate]) -> str:
    """The name in options and logs of an estimator that is not of this file: "module:name"."""
    measure = estimator.measure if isinstance(estimator, Estimator) else estimator
    kind = measure if hasattr(measure, "__qualname__") else type(measure)
    return f"{kind.__module__}:{kind.__qualname__}"


@dataclass(frozen=True)
class Combined:
    """What a step applies, from all its estimates."""

    grads: dict[int, float]  # by probe
    loss: float
    finite: bool  # else nothing is applied
    cycles: tuple[int, ...] = ()  # walks a probe


def combined(
    seen: Mapping[int, Sequence[Estimate]],
    settings: Mapping[str, Any],
    memory: Memory,
    rule: Rule,
    looks_back: bool = False,
) -> Combined:
    """The projected gradients of a step's directions, as they are applied.

    The estimates of one direction are averaged (`merged`). `settings` has the shaping and bounds;
    `memory` what these and the rule remember, which a step that is not finite leaves as it was.
    """
    means = {i: merged(es) for i, es in seen.items()}
    grads = {i: e.projected_grad for i, e in means.items()}
    loss = sum([e.loss for e in means.values()]) / len(means)
    if not all(map(math.isfinite, grads.values())):
        return Combined(grads, loss, False)
    if looks_back:
        memory.before = [e.losses[0] if e.losses else e.loss for e in means.values()]
    if settings["shaping"] and len(seen) > 1:
        grads = shaped(means, settings["shaping"], settings["eps"])
    grads, memory.history = clipped(grads, settings, memory.history)
    return Combined(rule.scaled(grads, memory), loss, True)


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
    grads: dict[int, float], settings: Mapping[str, Any], history: tuple[float, ...] = ()
) -> tuple[dict[int, float], tuple[float, ...]]:
    """projected_grads within the bounds that are set, and the history for the next step.

    The history is of the sizes measured, not of those applied: a bound does not tighten itself.
    """
    if settings["clip"] is None and settings["clip_quantile"] is None:
        return grads, history
    bound = settings["clip"] or float("inf")
    if settings["clip_quantile"] is not None:
        if len(history) >= _ENOUGH:
            bound = min(bound, float(np.quantile(history, settings["clip_quantile"])))
        history = (*history, *map(abs, grads.values()))[-_HISTORY:]
    return {i: max(-bound, min(bound, g)) for i, g in grads.items()}, history
