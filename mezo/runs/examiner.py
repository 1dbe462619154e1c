"""Estimate the gradient, the curvature and a learning rate from a dozen pairs of forward passes.

The scores s of the two passes along z, which a step computes anyway, give for every example i

    g_i       = (loss_i(theta + eps z) - loss_i(theta - eps z)) / (2 eps)    its gradient along z
    z' G_i z  = variance of (s+ - s-) / (2 eps) under p = softmax(s)         its curvature along z

G, the Gauss-Newton part of the Hessian H, is used instead of H, since second differences of the
loss are too noisy. A step of size lr on a batch B changes the loss, averaged over z and B, by

    -lr |grad|^2 + lr^2 / 2 E[g_B^2 z'Gz]

so that `best_step`, |grad|^2 / E[g_B^2 z'Gz], is the best first step. A run of many steps needs a
smaller rate: the loss can fall only so far, while the second term, a random walk of all weights,
accumulates. `Horizon` weighs the two.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from mezo.mezo import MeZO
from mezo.models.modes import to_device
from mezo.objectives import Batch, Feature, Form
from mezo.objectives.progress import SILENT, Progress
from mezo.record import Record
from mezo.trainers.config import default_rounding

ERRORS = 2.0  # a number above this many standard errors is taken to differ from zero
ATTAINABLE = 0.5  # the fraction of the loss that a run is assumed to be able to remove
FADES = 0.5  # the mean of E[g_B^2 z'Gz] over a run, relative to its value at the start
SHAPES = {  # for each schedule, the means of the rate and of its square, relative to the peak
    "constant": (1.0, 1.0),
    "linear": (1 / 2, 1 / 3),
    "cosine": (1 / 2, 3 / 8),
}


def mean_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of two or more values, and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def gradient(grads: np.ndarray, batch_size: int) -> dict[str, float]:
    """Return how much of E[g_B^2] is the gradient, from g_i of shape (directions, examples).

    "signal" is |grad L|^2, the mean of g_i g_j over z and pairs of examples; it is unbiased and so
    may be negative. "noise" is the variance of a batch's mean. "share" is signal / (signal +
    noise), or NaN if both are 0.
    """
    n, squares = grads.shape[1], (grads**2).sum(1)
    signals = (grads.sum(1) ** 2 - squares) / (n * (n - 1))
    powers = signals + (squares / n - signals) / batch_size
    (signal, signal_error), power = mean_error(signals), float(powers.mean())
    share = signal / power if power > 0 else math.nan
    error = mean_error(signals - share * powers)[1] / power if power > 0 else math.nan
    return {
        "signal": signal,
        "signal_error": signal_error,
        "noise": power - signal,
        "share": share,
        "share_error": error,
    }


def gauss_newton(plus: torch.Tensor, minus: torch.Tensor, eps: float) -> float:
    """Return z'Gz of the mean cross-entropy, from both passes' scores (examples, candidates)."""
    slope, p = (plus - minus) / (2 * eps), ((plus + minus) / 2).softmax(-1)
    return float(((p * slope**2).sum(-1) - (p * slope).sum(-1) ** 2).mean())


def best_step(signal: float, pull: float) -> float:
    """Return the step size that lowers the loss most, signal / E[g_B^2 z'Gz]; NaN if none does."""
    return signal / pull if signal > 0 and pull > 0 else math.nan


@dataclass(frozen=True)
class Horizon:
    """Predicts what a run gains at a learning rate, from the loss, gradient and curvature.

    The run can gain at most gap = ATTAINABLE * loss. At rate lr it covers the distance
    x = lr * signal / gap * (sum of the schedule). The squared gradient is assumed to fall as the
    square of the remaining gap, as it does if the curvature follows a power law, so that
    gap / (1 + x) remains at the end. The noise adds lr^2 / 2 * FADES * pull * (sum of the squared
    schedule).

    Args:
        signal: |grad|^2 at the start.
        pull: E[g_B^2 z'Gz] at the start, for the run's batch size.
        loss: Mean cross-entropy at the start, in nats.
        steps: Number of steps of the whole run.
        schedule: The Trainer's name of the schedule; one that is not in SHAPES counts as constant.
    """

    signal: float
    pull: float
    loss: float
    steps: int
    schedule: str = "constant"

    @property
    def _terms(self) -> tuple[float, float, float]:
        """The gap, and the factors to which the gain and the cost of a rate are proportional."""
        first, second = SHAPES.get(self.schedule, SHAPES["constant"])
        gain, cost = self.steps * first * self.signal, FADES * self.steps * second * self.pull
        return ATTAINABLE * self.loss, gain, cost

    def change(self, rate: float) -> float:
        """Return the expected change of the loss at this peak learning rate, in nats."""
        gap, gain, cost = self._terms
        return rate**2 / 2 * cost - gap * (1 - 1 / (1 + rate * gain / gap))

    def best_rate(self) -> float:
        """Return the rate that minimises `change`, or NaN if no rate lowers the loss."""
        gap, gain, cost = self._terms
        if not (gap > 0 and gain > 0 and cost > 0):
            return math.nan
        low, high = 0.0, gain / cost  # the slope of `change` is negative at low, positive at high
        for _ in range(100):
            middle = (low + high) / 2
            if gain / (1 + middle * gain / gap) ** 2 > cost * middle:
                low = middle
            else:
                high = middle
        return high


class Seen(NamedTuple):
    """One estimate on a batch."""

    grads: np.ndarray  # projected gradient of each example
    grad: float  # projected gradient of the batch, as MeZO computes it
    loss: float  # mean of the two passes
    curvature: float  # z'Gz
    seconds: float  # time of the whole step


class Examiner:
    """Makes estimates by MeZO with lr=0.

    With scratch perturbation the weights do not change; in place they change by up to three
    roundings per call. With `perturbation=None` the form is the one that a run would use.
    """

    def __init__(
        self, model: torch.nn.Module, form: Form, seed: int, perturbation: str | None = None
    ):
        self.model, self.form = model, form
        options: dict[str, Any] = {"rounding": default_rounding(model)}
        options["perturbation"] = perturbation
        self.optimizer = MeZO(model.named_parameters(), 0.0, seed=seed, **options)
        self.trained: list[torch.Tensor] = [p for _, p, _ in self.optimizer.trained()]
        self._records: list[Record] = []
        self.optimizer.observers.append(self._records.append)

    def batch(self, features: Sequence[Feature]) -> Batch:
        return to_device(self.form.collate(features), self.model)

    def loss(self, batch: Batch) -> float:
        return float(self.form.loss(self.model, batch))

    def pairs(
        self, features: Sequence[Feature], batch_size: int, directions: int
    ) -> Iterator[tuple[Batch, Batch]]:
        """Yield two disjoint batches for each direction, drawn by the optimizer's seed."""
        rng = np.random.default_rng(self.optimizer.param_groups[0]["seed"])
        for _ in range(directions):
            chosen = [features[i] for i in rng.permutation(len(features))[: 2 * batch_size]]
            yield self.batch(chosen[:batch_size]), self.batch(chosen[batch_size:])

    def __call__(self, batch: Batch, direction: int, eps: float) -> Seen:
        scores: list[torch.Tensor] = []

        def closure() -> torch.Tensor:  # form.loss, with the scores kept
            scores.append(self.form.scores(self.model, batch))
            return F.cross_entropy(scores[-1], batch["labels"])

        for group in self.optimizer.param_groups:
            group["step"], group["eps"] = direction, eps
        began = time.perf_counter()
        self.optimizer.step(closure)
        seconds, record = time.perf_counter() - began, self._records.pop()
        ends = [s.double() for s in scores[:2]]  # the first step may make another pass, to check
        plus, minus = (F.cross_entropy(s, batch["labels"], reduction="none") for s in ends)
        grads = ((plus - minus) / (2 * eps)).cpu().numpy()
        grad, curvature = record.projected_grads[0], gauss_newton(ends[0], ends[1], eps)
        return Seen(grads, grad, record.loss, curvature, seconds)


@dataclass(frozen=True)
class Landscape:
    """The loss around the weights, from pairs of estimates on two batches along each direction.

    `signal` is |grad|^2, or an upper bound of it if the gradient cannot be told from noise (`clear`
    is False). `pull` is E[g_B^2 z'Gz].
    """

    signal: float
    pull: float
    loss: float
    size: float  # mean magnitude of the projected gradient
    clear: bool
    gradient: dict[str, float]  # the numbers that `gradient` returns

    @classmethod
    def of(cls, pairs: Sequence[tuple[Seen, Seen]], batch_size: int) -> "Landscape":
        """Return it from estimates on two disjoint batches along each of two or more directions."""
        parts = gradient(np.array([[*a.grads, *b.grads] for a, b in pairs]), batch_size)
        grads = np.array([[a.grad, b.grad] for a, b in pairs])
        squares, curved = (
            (grads**2).mean(1),
            np.array([(a.curvature + b.curvature) / 2 for a, b in pairs]),
        )
        clear = parts["share"] > ERRORS * parts["share_error"]
        most = min(1.0, parts["share"] + ERRORS * parts["share_error"])
        signal = parts["signal"] if clear else most * float(squares.mean())
        loss = float(np.mean([(a.loss + b.loss) / 2 for a, b in pairs]))
        pull = float(np.mean(squares * curved))
        return cls(signal, pull, loss, float(abs(grads).mean()), clear, parts)

    def best_step(self) -> float:
        """Return the step size that lowers the loss most."""
        return best_step(self.signal, self.pull)

    def horizon(self, steps: int, schedule: str = "constant") -> Horizon:
        """Return the prediction for a run of `steps` steps from these weights."""
        return Horizon(self.signal, self.pull, self.loss, steps, schedule)


def survey(
    examiner: Examiner,
    features: Sequence[Feature],
    eps: float,
    batch_size: int,
    directions: int,
    progress: Progress = SILENT,
) -> list[tuple[Seen, Seen]]:
    """Return estimates on two disjoint batches along each direction, at 4 forward passes each.

    There must be at least 2 batch_size `features`. Pairs whose loss is not finite are left out. The
    batches are drawn with the optimizer's seed, so that repeated runs use the same ones.
    """
    pairs, loop = [], progress.of("direction", directions)
    for direction, batches in enumerate(examiner.pairs(features, batch_size, directions)):
        one, two = (examiner(batch, direction, eps) for batch in batches)
        if math.isfinite(one.loss + one.grad + two.loss + two.grad):
            pairs.append((one, two))
        loop.at(direction + 1)
    return pairs
