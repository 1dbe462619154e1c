"""MeZO, Algorithm 1 of Malladi et al. (2023), arXiv:2305.17333: tuning by forward passes alone.

    theta <- theta +   eps z ;  loss_plus  = L(theta; batch)        z ~ N(0, I), drawn again from a
    theta <- theta - 2 eps z ;  loss_minus = L(theta; batch)        seed wherever it is needed,
    theta <- theta +   eps z                                        never stored
    projected_grad = (loss_plus - loss_minus) / (2 eps)
    theta <- theta - lr * projected_grad * z

Everything done to a weight is a list of moves: `Move(step, probe, a, b)` is theta <- a theta + b z
with z = z(step, probe), and `noise.apply_all_` makes such a list in one pass over the tensors. That
is why one number per step replays a run: its moves can be written down again from that number.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch

from mezo import noise
from mezo.closures import Closure, Loss
from mezo.estimators import ONE_WAY, Combined, Estimate, Estimator
from mezo.forms.direction import Direction
from mezo.forms.low_rank import LowRank
from mezo.forms.rounding import last_rounding
from mezo.forms.scratch import Scratch
from mezo.forms.updates import Update
from mezo.noise import KEEP, Move
from mezo.optimizer import ZerothOrderOptimizer

LEGS = {2: (1, -2, 1), 1: (1, -1)}  # there, across, and home, by the sides that are looked at


class InPlace(Direction):
    """The paper's form: theta walks to theta + eps z, to theta - eps z, and home with the update.
    After the walk an element differs by at most three roundings."""

    moves_weights = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.walk = [self.move(leg * self.eps) for leg in LEGS[self.sides]]
        self.walked = 0  # legs; all are made in the end: each rounds, and a replay repeats it

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        """The weights are theta + sign eps z within: +1 first, then -1; 0 is home."""
        end = {1: 1, -1: 2, 0: len(self.walk) if self.walked else 0}[sign]
        if self.walked > end:  # what was passed already takes another walk
            self._go(len(self.walk))
            self.walked, self.cycles = 0, self.cycles + 1
        self._go(end)
        yield

    def _go(self, end: int) -> None:
        legs, self.walked = self.walk[self.walked : end], end
        for part in self.parts:
            noise.apply_all_(part.rows, part.scale.walk(legs), distribution=self.distribution)
        torch.clear_autocast_cache()  # it would hold casts of the weights as they were

    def way_home(self) -> Sequence[Move]:
        legs, self.walked = self.walk[self.walked :], len(self.walk)
        return legs


@torch.no_grad()
def spsa(closure, direction: Direction) -> Estimate:
    """Definition 1: the derivative of the loss along z, from its values on both sides of theta."""
    loss_plus, loss_minus = direction.losses(closure)  # closure() at(+1) and at(-1), as floats
    projected_grad = (loss_plus - loss_minus) / (2 * direction.eps)
    return Estimate(projected_grad, (loss_plus + loss_minus) / 2, (loss_plus, loss_minus))


def sgd(update: Update, rounding: str, scale: float = 1.0) -> list[Move]:
    """theta <- (1 - lr weight_decay) theta - lr * mean of projected_grad z, as moves."""
    lr, n, step = update.lr * scale, len(update.grads), update.step
    moves = [Move(step, i, 1.0, -lr * g / n, KEEP) for i, g in enumerate(update.grads)]
    moves.reverse()  # from the last direction, where the walk has ended: its z is drawn once
    moves[0] = moves[0]._replace(scale=1 - update.lr * update.weight_decay)
    moves[-1] = moves[-1]._replace(rounding=last_rounding(rounding))  # of 16-bit weights
    return moves


class MeZO(ZerothOrderOptimizer):
    """Fine-tune with forward passes alone: `optimizer.step(lambda: model(**batch).loss)`.

    Options: optimizer.py. Call `model.eval()` first: dropout would drown the difference of losses.
    Not for training from scratch: a good start leaves few directions to learn (Section 4).
    """

    forms: ClassVar = {"in_place": InPlace, "scratch": Scratch, "low_rank": LowRank}
    estimators: ClassVar = {"two_point": Estimator(spsa)} | ONE_WAY

    def estimate(self, closure: Closure | Loss, probe: int = 0) -> Estimate:
        """projected_grad along direction number `probe`; a `step()` without closure applies it.

        Calls for one probe share z and are averaged. A closure that raises refuses the step.
        """
        with self.running():
            found = self._estimate(self.loss(closure), probe)
            self._update(None)
        return found

    def _estimate(self, loss: Loss, probe: int) -> Estimate:
        direction = self.direction(probe)  # InPlace, Scratch, LowRank: what `perturbation` names
        with self.refused_if_raised(direction):
            found = self.estimator(loss, direction)  # spsa, or one_sided, or a function of yours
            direction.add(found, loss.examples)
            self.watch.first(loss, direction)
        return found

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """One update. With `closure`, first num_samples estimates of it. Returns the mean loss."""
        with self.running():
            for probe, loss in self.estimates_of(closure):
                self._update(None)  # home, from the direction before
                self._estimate(loss, probe)
            found = self.combined()  # over estimates, processes; clipped, shaped: estimators.py
            self.finish(found)  # the update, and its record in the run log
        return found.loss

    @torch.no_grad()
    def _update(self, found: Combined | None) -> None:
        """Every weight: home, and on by the rule's update, in one pass. None: home only."""
        home = [leg for direction in self.directions.values() for leg in direction.way_home()]
        for part in self.parts():  # of the tensors: a parameter group's, or those of one scale
            moves, update = part.scale.walk(home), self.update_of(part, found)
            if update is not None and update.rule.linear and not part.scale.masked:
                moves, update = moves + sgd(update, self.rounding, part.scale.factor), None
            self.weights.move_(self, part, moves, update)  # momentum, adam, yours: rules.py
