"""A direction z of one step, through which an estimator measures losses at theta and around it."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch

from mezo.closures import Loss
from mezo.errors import InputError
from mezo.estimators import Estimate
from mezo.layers import PLAIN, TensorScale
from mezo.noise import NEAREST, Move, Rows
from mezo.record import Memory

States = MutableMapping[torch.Tensor, dict[str, Any]]  # the optimizer's state, by parameter


class Row(NamedTuple):
    """A trained tensor, its canonical name and the key of its z."""

    name: str
    tensor: torch.Tensor
    key: tuple[int, int]


class Part(NamedTuple):
    """Trained tensors that take the same moves: they share a parameter group and a scale."""

    group: dict[str, Any]
    rows: Rows  # of Row
    scale: TensorScale = PLAIN
    plain: bool = False  # whether its moves need no buffer and no factor: one launch makes them


def replaced_by_pass(name: str) -> InputError:
    """Return the error for a forward pass that puts another tensor in a parameter's place."""
    return InputError(
        f"the forward pass replaces the trained parameter {name} (.data =, or module.to() with "
        "another dtype or device): convert the model before the first step"
    )


class Direction:
    """One direction z. Subclasses define how the model sees theta + eps z and theta - eps z.

    Attributes:
        eps: The size of the perturbation, by which an estimator divides.
        probe: The number of this direction within its step.
        before: loss_plus of the same probe in the previous step, for an estimator that looks back;
            None in the first step and for all other estimators.
        estimates: The estimates made along this direction, which the step averages.
        cycles: How often theta was walked there and back, or how many estimates were made.
        walk: The moves of one walk there and back.
        ahead: The moves that every tensor has still to make. All of them are made in the end,
            because each one rounds and a replay repeats it.
    """

    legs: ClassVar[Mapping[int, Sequence[int]]] = {2: (), 1: ()}  # a walk in eps z, by `sides`
    moves_weights: ClassVar[bool] = False  # whether theta itself moves; a replay repeats its walks
    apply_all_: Any = None  # makes the moves instead of noise.apply_all_, where theta is elsewhere
    bundles: Any = None  # bundles.Bundles, where every tensor stays in place during a pass
    together: Sequence[int] = ()  # probes of the directions that are measured with one closure
    factored: ClassVar[bool] = False  # whether a matrix's updates are accumulated in a factor

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
        past = self.memory.before
        self.before: float | None = past[probe] if probe < len(past) else None
        self.estimates: list[Estimate] = []
        self.cycles = 1
        self.walk = [Move(self.step, probe, 1.0, leg * self.eps) for leg in self.legs[sides]]
        self.ahead = [*self.walk]

    def add(self, estimate: Estimate, examples: float = 1.0) -> None:
        """Add an estimate along this direction, whose loss is the mean over `examples`."""
        self.estimates.append(estimate if examples == 1 else replace(estimate, examples=examples))
        if not self.moves_weights:
            self.cycles = len(self.estimates)

    def at(self, sign: int) -> AbstractContextManager[None]:
        """Return a context in which the model is at theta + sign eps z; `sign` is +1, -1 or 0."""
        raise NotImplementedError

    def home(self) -> AbstractContextManager[None]:
        """Return a context in which the model is at theta."""
        return self.at(0)

    def losses(self, closure: Callable[[], float]) -> tuple[float, float]:
        """Return loss_plus and loss_minus: `closure` at theta + eps z and at theta - eps z."""
        if getattr(closure, "paired", None) and (pair := self.in_one_pass(closure)) is not None:
            return pair
        with self.at(+1):
            loss_plus = float(closure())
        with self.at(-1):
            loss_minus = float(closure())
        return loss_plus, loss_minus

    def in_one_pass(self, closure: Any) -> tuple[float, float] | None:
        """Return both losses of a `Paired` closure from one forward pass; None if it takes two."""
        return None

    def loss_at_home(self, closure: Loss) -> float:
        """Return L(theta), which is measured once for all directions of a batch."""
        if closure.home is None:
            with self.home():
                closure.home = closure()
        return closure.home

    def move(self, coefficient: float, rounding: int = NEAREST) -> Move:
        """Return the move theta <- theta + coefficient z."""
        return Move(self.step, self.probe, 1.0, coefficient, rounding)

    def check(self, closure: Callable[[], float]) -> None:
        """Raise InputError if the loss depends on a parameter that this form does not perturb."""
