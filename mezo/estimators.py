"""Gradient estimators other than the two-point one of mezo.py, and how estimates are combined.

    two_point    (L(theta + eps z) - L(theta - eps z)) / 2 eps      2 forward passes per direction
    one_sided    (L(theta + eps z) - L(theta)) / eps                1, and 1 more per batch
    one_point    (L(theta + eps z) - the last step's loss) / eps    1 (Definition 8)

`shaping` turns the losses of several directions into the numbers that are applied. None leaves the
estimates as they are. "z_scores" divides by the standard deviation of the step's losses (FZOO,
arXiv:2506.09034, which uses one_sided, rademacher and 8 directions). "ranks" replaces losses by
their centred ranks (evolution strategies). With either, eps cancels and lr is about the size of a
weight's step. A single direction is not shaped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mezo.record import Memory
from mezo.rules import Rule

_HISTORY, _ENOUGH = 100, 10  # most and fewest projected gradients that a quantile is taken of


@dataclass(frozen=True)
class Estimate:
    """An estimate along one direction z: the gradient is about `projected_grad` * z."""

    projected_grad: float  # change of the loss per unit of z
    loss: float  # at theta; for two points (loss_plus + loss_minus) / 2 = L(theta) + O(eps^2)
    losses: tuple[float, ...] = ()  # (loss_plus, loss_minus), or (loss_plus,)
    examples: float = 1.0  # the weight of this estimate among those of the same direction


FAILED = Estimate(math.nan, math.nan, (math.nan, math.nan))


@dataclass(frozen=True)
class Estimator:
    """How the projected gradient along a direction is measured, for `MeZO(estimator=...)`.

    A plain function `(closure, direction) -> Estimate` can be passed instead. `closure()` returns
    the loss as a float. The contexts `direction.at(+1)`, `direction.at(-1)` and `direction.home()`
    choose the weights; enter them in this order, and each at most once. The estimate may depend on
    nothing else.

    Args:
        measure: The function `(closure, direction) -> Estimate`.
        sides: 2 if it visits theta - eps z, otherwise 1. With 1, in-place perturbation takes two
            moves instead of three.
        at_home: Whether it calls `direction.loss_at_home(closure)`, which costs one more forward
            pass per batch, shared by all directions.
        looks_back: Whether it reads `direction.before`. Such a run can resume only from a
            checkpoint, since no log holds these losses.
    """

    measure: Callable[[Any, Any], Estimate]
    sides: int = 2
    at_home: bool = False
    looks_back: bool = False

    def __call__(self, closure: Any, direction: Any) -> Estimate:
        return self.measure(closure, direction)

    def passes(self, num_samples: int) -> int:
        """Return the number of forward passes per step on one batch."""
        return self.sides * num_samples + self.at_home


def one_sided(closure: Any, direction: Any) -> Estimate:
    """Estimate by a forward difference, with about half the forward passes of two points.

    Its variance is that of the two-point estimate, but it has a bias of eps/2 z'Hz, which cancels
    for two points. L(theta) is measured once, so that n directions cost n + 1 forward passes.
    """
    clean = direction.loss_at_home(closure)
    with direction.at(+1):
        plus = closure()
    return Estimate((plus - clean) / direction.eps, clean, (plus,))


def one_point(closure: Any, direction: Any) -> Estimate:
    """Estimate from L(theta + eps z) and the same loss of the previous step (Definition 8).

    This is residual feedback, with one forward pass per direction; in a run's first step the
    estimate is 0. It has the expectation of the two-point estimate. Its variance is much larger,
    since it is that of two losses on different batches, divided by eps (Appendix B.5).
    """
    with direction.at(+1):
        plus = closure()
    previous = plus if direction.before is None else direction.before  # NaN - NaN stays NaN
    return Estimate((plus - previous) / direction.eps, plus, (plus,))


ONE_WAY = {
    "one_sided": Estimator(one_sided, sides=1, at_home=True),
    "one_point": Estimator(one_point, sides=1, looks_back=True),
}
_TWO_POINT = Estimator(one_sided)  # only its counts are used, never its function


def passes_of(estimator: str, num_samples: int) -> int:
    """Return the number of forward passes per step on one batch, for an estimator by name."""
    return ONE_WAY.get(estimator, _TWO_POINT).passes(num_samples)


def sides_of(estimator: str) -> int:
    """Return 2 if the estimator of that name visits theta - eps z, otherwise 1."""
    return ONE_WAY.get(estimator, _TWO_POINT).sides


def name_of(estimator: Callable[[Any, Any], Estimate]) -> str:
    """Return the name "module:name" of a user's estimator, as options and logs hold it."""
    measure = estimator.measure if isinstance(estimator, Estimator) else estimator
    kind = measure if hasattr(measure, "__qualname__") else type(measure)
    return f"{kind.__module__}:{kind.__qualname__}"


@dataclass(frozen=True)
class Combined:
    """What a step applies, combined from all its estimates."""

    grads: dict[int, float]  # projected gradients by probe
    loss: float
    finite: bool  # if False, nothing is applied
    cycles: tuple[int, ...] = ()  # walks per probe


def combined(
    seen: Mapping[int, Sequence[Estimate]],
    settings: Mapping[str, Any],
    memory: Memory,
    rule: Rule,
    estimator: Estimator,
) -> Combined:
    """Combine a step's estimates into the projected gradients that are applied.

    Args:
        seen: The estimates of each direction, by probe; they are averaged (`merged`).
        settings: The options, of which shaping and clipping are used.
        memory: What clipping, the rule and the estimator remember; updated in place, unless an
            estimate is not finite.
        rule: The rule, which may scale the gradients.
        looks_back: Whether the estimator reads the losses of the previous step.
    """
    means = {i: es[0] if len(es) == 1 else merged(es) for i, es in seen.items()}
    grads = {i: e.projected_grad for i, e in means.items()}
    loss = sum([e.loss for e in means.values()]) / len(means)
    if not all(map(math.isfinite, grads.values())):
        return Combined(grads, loss, False)
    if estimator.looks_back:
        memory.before = [e.losses[0] if e.losses else e.loss for e in means.values()]
    if settings["shaping"] and len(seen) > 1:
        grads = shaped(means, settings["shaping"], settings["eps"])
    if settings["clip"] is not None or settings["clip_quantile"] is not None:
        grads, memory.history = clipped(grads, settings, memory.history)
    if type(rule).scaled is not Rule.scaled:
        grads = rule.scaled(grads, memory)
    return Combined(grads, loss, True)


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
    """Return the shaped projected gradients, from one estimate per direction.

    `kind` is "z_scores" or "ranks". The gradients are 0 if all losses are equal.
    """
    flat = torch.tensor([x for e in means.values() for x in e.losses], dtype=torch.float64)
    if kind == "z_scores":
        spread = float(flat.std())
        return {i: e.projected_grad * eps / spread if spread > 0 else 0.0 for i, e in means.items()}
    ranks = _ranks(flat)
    if len(flat) == 2 * len(means):
        return {i: (ranks[2 * k] - ranks[2 * k + 1]) / 2 for k, i in enumerate(means)}
    return dict(zip(means, ranks, strict=True))


def _ranks(values: torch.Tensor) -> list[float]:
    """Return ranks from -1/2 (lowest) to 1/2 (highest); equal values share their mean rank."""
    below = (values[None] < values[:, None]).sum(1).double()
    equal = (values[None] == values[:, None]).sum(1).double()
    return ((below + (equal - 1) / 2) / (len(values) - 1) - 0.5).tolist()


def clipped(
    grads: dict[int, float], settings: Mapping[str, Any], history: tuple[float, ...] = ()
) -> tuple[dict[int, float], tuple[float, ...]]:
    """Return the clipped projected gradients, and the history for the next step.

    The history holds magnitudes as measured, not as clipped, so that a bound does not tighten
    itself.
    """
    bound = settings["clip"] or float("inf")
    if settings["clip_quantile"] is not None:
        if len(history) >= _ENOUGH:
            bound = min(bound, float(np.quantile(history, settings["clip_quantile"])))
        history = (*history, *map(abs, grads.values()))[-_HISTORY:]
    return {i: max(-bound, min(bound, g)) for i, g in grads.items()}, history
