"""A direction z of one step: what an estimator asks for the loss at theta, and on either side."""

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch

from mezo.closures import Loss
from mezo.estimators import Estimate
from mezo.layers import PLAIN, TensorScale
from mezo.noise import NEAREST, Move
from mezo.record import Memory

States = MutableMapping[torch.Tensor, dict[str, Any]]  # the optimizer's, by parameter


class Row(NamedTuple):
    """A trained tensor, its canonical name and the key of its z."""

    name: str
    tensor: torch.Tensor
    key: tuple[int, int]


class Part(NamedTuple):
    """The trained tensors of one parameter group, and of one scale: they take the same moves."""

    group: dict[str, Any]
    rows: Sequence[Row]
    scale: TensorScale = PLAIN
    plain: bool = False  # no tensor has 16 bits: a move needs no buffer


class Direction:
    """theta + eps z and theta - eps z, for one z. Subclasses say how the model gets to see them.

    Attributes:
        eps: the distance; an estimator divides by it.
        probe: the number of this direction among those of its step.
        before: loss_plus of this probe in the step before, for an estimator that looks back; None
            in the first step, and for all others.
        estimates: those made along it, which the step averages.
        cycles: how often theta was walked there and back, or how many estimates were made.
    """

    moves_weights: ClassVar[bool] = False  # whether theta itself moves: a replay repeats that
    factored: ClassVar[bool] = False  # whether matrices keep their updates in a factor

    def __init__(
        self,
        parts: Sequence[Part],
        settings: MutableMapping[str, Any],
        probe: int = 0,
        *,
        sides: int = 2,
        memory: Memory | None = None,
        states: States | None = None,
    ):
        self.parts, self.settings, self.probe, self.sides = parts, settings, probe, sides
        self.rows = [row for part in parts for row in part.rows]
        self.eps, self.step = settings["eps"], settings["step"]
        self.distribution = settings["distribution"]
        self.memory, self.states = memory or Memory(), {} if states is None else states
        self.before: float | None = None
        self.estimates: list[Estimate] = []
        self.cycles = 1

    def add(self, found: Estimate, examples: float = 1.0) -> None:
        """One more estimate along this direction, of a loss that is the mean over `examples`."""
        self.estimates.append(found if examples == 1 else replace(found, examples=examples))
        if not self.moves_weights:
            self.cycles = len(self.estimates)

    def at(self, sign: int) -> AbstractContextManager[None]:
        """Within, the model is the one at theta + sign eps z, for a sign of +1, -1 or 0."""
        raise NotImplementedError

    def home(self) -> AbstractContextManager[None]:
        """Within, the model is the one at theta."""
        return self.at(0)

    def losses(self, closure: Callable[[], float]) -> tuple[float, float]:
        """loss_plus and loss_minus: those of `closure` at theta + eps z and theta - eps z."""
        with self.at(+1):
            loss_plus = float(closure())
        with self.at(-1):
            loss_minus = float(closure())
        return loss_plus, loss_minus

    def loss_at_home(self, closure: Loss) -> float:
        """L(theta), which is measured once for all directions of a batch."""
        if closure.home is None:
            with self.home():
                closure.home = closure()
        return closure.home

    def move(self, coefficient: float, rounding: int = NEAREST) -> Move:
        """theta <- theta + coefficient z."""
        return Move(self.step, self.probe, 1.0, coefficient, rounding)

    def way_home(self) -> Sequence[Move]:
        """The moves that every tensor has still to make; the caller makes them."""
        return ()

    def check(self, closure: Callable[[], float]) -> None:
        """InputError if the loss depends on a parameter that is read past this form."""
