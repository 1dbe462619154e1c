"""MeZO, Algorithm 1 of Malladi et al. (2023), arXiv:2305.17333: tuning by forward passes alone.

    theta <- theta +   eps z ;  loss_plus  = L(theta; batch)        z ~ N(0, I), drawn again from a
    theta <- theta - 2 eps z ;  loss_minus = L(theta; batch)        seed wherever it is needed,
    theta <- theta +   eps z                                        never stored
    projected_grad = (loss_plus - loss_minus) / (2 eps)
    theta <- theta - lr * projected_grad * z

Everything done to a weight is a list of moves: `Move(step, probe, a, b)` is theta <- a theta + b z
with z = z(step, probe), made in one pass over the tensors. One number per step replays a run, as
its moves can be written down again from that number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch

from mezo import noise
from mezo.closures import Closure, Loss
from mezo.estimators import ONE_WAY, Estimate, Estimator
from mezo.forms.direction import Direction
from mezo.forms.low_rank import LowRank
from mezo.forms.rounding import ROUNDINGS
from mezo.forms.stacked import FullRank, OnePass
from mezo.forms.updates import Update
from mezo.interrupts import held
from mezo.optimizer import ZerothOrderOptimizer


class InPlace(OnePass):
    """Theta walks to theta + eps z, to theta - eps z, and home with the update: three roundings."""

    legs: ClassVar = {2: (1, -2, 1), 1: (1, -1)}  # there, across, and home, by sides looked at
    moves_weights = True

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        """The weights are theta + sign eps z within: +1 first, then -1; 0 is home."""
        walked = len(self.walk) - len(self.ahead)
        end = {1: 1, -1: 2, 0: len(self.walk) if walked else 0}[sign]
        again = walked > end  # what was passed already takes another walk
        legs = self.ahead + self.walk[:end] if again else self.walk[walked:end]
        self.ahead[:], self.cycles = self.walk[end:], self.cycles + again
        apply_all_ = self.apply_all_ or noise.apply_all_  # an engine makes the moves elsewhere
        for part in self.parts:
            moves = legs if part.scale.scale == 1 else part.scale.walk(legs)
            apply_all_(part.rows, moves, distribution=self.distribution)
        torch.clear_autocast_cache()  # it would hold casts of the weights as they were
        yield


def spsa(closure, direction: Direction) -> Estimate:
    """Definition 1: the derivative of the loss along z, from its values on both sides of theta."""
    loss_plus, loss_minus = direction.losses(closure)  # closure() at(+1) and at(-1), as floats
    projected_grad = (loss_plus - loss_minus) / (2 * direction.eps)
    return Estimate(projected_grad, (loss_plus + loss_minus) / 2, (loss_plus, loss_minus))


def sgd(update: Update, rounding: str, scale: float = 1.0) -> list[noise.Move]:
    """theta <- (1 - lr weight_decay) theta - lr * mean of projected_grad z, as moves."""
    (step, grads), lr = update.history[update.end - 1], update.lr * scale
    by = [-lr * g / len(grads) for g in grads]
    moves = [noise.Move(step, i, 1.0, by[i], noise.KEEP) for i in range(len(grads))]
    moves.reverse()  # from the last direction, where the walk has ended: its z is drawn once
    moves[0] = moves[0]._replace(scale=1 - update.lr * update.decay)
    moves[-1] = moves[-1]._replace(rounding=ROUNDINGS[rounding].last)  # of 16-bit weights
    return moves


class MeZO(ZerothOrderOptimizer):
    """Fine-tune with forward passes alone: `optimizer.step(lambda: model(**batch).loss)`.

    Options: optimizer.py. Call `model.eval()` first: dropout drowns the difference of losses. Not
    for training from scratch (Section 4). Steps 0, 64, 128, 256, ... call the closure twice more.
    """

    forms: ClassVar = {"in_place": InPlace, "scratch": FullRank, "low_rank": LowRank}
    estimators: ClassVar = {"two_point": Estimator(spsa)} | ONE_WAY

    def estimate(self, closure: Closure | Loss, probe: int = 0) -> Estimate:
        """projected_grad along direction number `probe`; a `step()` without closure applies it.

        Calls for one probe share z and are averaged. A closure that raises refuses the step."""
        with held(self._thread):  # Ctrl-C waits, but for forward passes; one thread at a time
            found = self._estimate(self.loss(closure), probe)
            self._update(None)
        return found

    @torch.no_grad()
    def _estimate(self, loss: Loss, probe: int) -> Estimate:
        direction = self.direction(probe, loss)  # InPlace, FullRank, LowRank: by `perturbation`
        try:
            found = self.plan.estimator.measure(loss, direction)  # spsa, or one_sided, or yours
            if self.watch.unit is None:  # the run's first
                self.watch.first(loss, direction)
            direction.add(found, loss.examples)
        except BaseException:
            self.refuse(direction)
            raise
        return found

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """One update. With `closure`, first num_samples estimates of it. Returns the mean loss."""
        with held(self._thread):
            if closure is not None:
                loss = self.loss(closure)
                self.together = self.processes.share(self.param_groups[0]["num_samples"])
                for probe in self.together:  # this process's directions
                    self._update(None)  # home, from the direction before
                    self._estimate(loss, probe)
            found = self.combined()  # over estimates, processes; clipped, shaped: estimators.py
            return self.finish(found)  # the update, and its record in the run log

    @torch.no_grad()
    def _update(self, made: Update | None) -> None:
        """Every weight: home, and on by the rule's update, in one pass. None: home only."""
        home: list[noise.Move] = []
        for direction in self.directions.values():
            home, direction.ahead[:] = home + direction.ahead, []
        for part in self.plan.parts if home or made else ():  # a group's tensors, of one scale
            group, moves = part.group, home if part.scale.scale == 1 else part.scale.walk(home)
            update = made and made._replace(lr=float(group["lr"]), decay=group["weight_decay"])
            if update and update.rule.linear and part.scale.threshold is None:
                moves, update = moves + sgd(update, group["rounding"], part.scale.factor), None
            if update is None and part.plain and self.weights.here:
                noise.apply_all_(part.rows, moves, distribution=group["distribution"])
            else:
                self.weights.move_(self, part, moves, update)  # momentum, adam, yours: rules.py
