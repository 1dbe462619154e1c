"""Forward passes that take turns at each block, so that all of them share one pass over weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mezo.closures import Loss
from mezo.forms.direction import Direction
from mezo.forms.low_rank import LowRank
from mezo.forms.one_pass import together
from mezo.forms.reads import eager
from mezo.forms.scratch import Moved, Scratch
from mezo.mezo import InPlace
from mezo.noise import Move
from mezo.offload.turns import Turns

if TYPE_CHECKING:
    from mezo.offload.context import Offload

LossPair = tuple[float, float]  # loss_plus, loss_minus


class Walked(Scratch):
    """The perturbed weights of a walk in place, made for each operation that reads them.

    These are theta + eps z, and from there theta - eps z, with the roundings on the way. Theta
    itself stays as it is until the walk is repeated on it together with the update.
    """

    legs = InPlace.legs

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        with eager(), _KeepsRequiresGrad(self, self.moves(sign)):
            yield

    def moves(self, sign: int) -> list[Move]:
        return self.walk[: 1 if sign > 0 else 2]


class _KeepsRequiresGrad(Moved):
    """Gives a perturbed copy the requires_grad of its parameter, by which torch picks kernels."""

    def moved(self, name: str, tensor: torch.Tensor, key) -> torch.Tensor:
        return super().moved(name, tensor, key).requires_grad_(tensor.requires_grad)


class Interleaved(Direction):
    """Computes both losses in one pass over the weights, by forward passes that take turns.

    Attributes:
        group: the directions of this step that are still to be estimated with the same closure. The
            first of them computes the losses of all.
    """

    def __init__(self, inner: Any, offload: "Offload"):
        super().__init__(
            inner.parts,
            inner.settings,
            inner.probe,
            sides=inner.sides,
            memory=inner.memory,
            states=inner.states,
        )
        self.inner, self.offload = inner, offload
        self.ahead = inner.ahead  # one list: what one of them owes
        self.rows = inner.rows[:: len(inner.rows) // 16 + 1]  # to be looked at: all would be read
        self.group: list[Interleaved] = []
        self.known: LossPair | None = None

    def losses(self, closure: Callable) -> LossPair:
        if self.known is not None:
            found, self.known = self.known, None
            return found
        if self in self.group:
            self.group.remove(self)
        if (both := self._in_one(closure)) is not None:
            return both
        others = self.group.copy()
        self.group.clear()
        if isinstance(self.inner, Walked):
            self.inner.ahead[:] = self.inner.walk  # another estimate owes another walk
        with eager():  # for all: each would undo it for the others
            halves = [one._half(closure, sign) for one in (self, *others) for sign in (+1, -1)]
            plus, minus, *rest = Turns(self.offload.threads).run(halves)
        for one, known in zip(others, zip(rest[::2], rest[1::2], strict=True), strict=True):
            one.known = known
        return plus, minus

    def _in_one(self, closure: Callable) -> LossPair | None:
        """Compute both losses in one forward pass, where low-rank directions allow it."""
        if not (isinstance(self.inner, LowRank) and isinstance(closure, Loss)):
            return None
        with self.offload.reading():
            return together(closure, self.inner)

    def _half(self, closure: Callable, sign: int) -> Callable[[Turns, int], float]:
        def run(turns: Turns, number: int) -> float:
            with self.offload.reading(turns, number), self.inner.at(sign):
                return float(closure())

        return run

    def check(self, closure: Callable) -> None:
        """Raise InputError if the loss depends on a weight that torch's functions do not read."""
        with self.offload.reading():
            self.inner.check(closure)
