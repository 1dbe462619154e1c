"""The losses of a direction, or of several, from one forward pass over copies of the batch.

A closure offers it (`closures.Paired`), a form provides `both`, and here is what relies on it: one
pass is compared with separate passes before it is first used. If they disagree, or if a row cannot
be assigned to a sign of a direction, a warning says so, and every later step takes a pass for each
direction, or two.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mezo.closures import Loss, number
from mezo.errors import InputError
from mezo.forms.rounding import HALF
from mezo.record import Memory

_FAR = 16  # one pass and separate passes are compared at this multiple of eps


class Unpaired(InputError):
    """Raised if the rows of a tensor cannot be assigned to the signs of the directions."""


class Both(Protocol):
    """A direction that can have both signs in one pass."""

    probe: int
    together: Sequence[int]
    memory: Memory
    placed: Any
    dtypes: set[torch.dtype]  # in which products were computed

    def both(self, batch_size: int, others: Sequence[Any] = ()) -> AbstractContextManager[None]: ...

    def at(self, sign: int) -> AbstractContextManager[None]: ...

    def check(self, closure: Loss) -> None:
        """Raise InputError if the loss depends on a parameter that was not perturbed."""

    def most(self) -> int:
        """Return how many directions a pass may take."""

    def beside(self, probe: int) -> Any:
        """Return another direction of the same step."""

    def with_eps(self, times: float) -> Any:
        """Return the same direction, in a form of its own, with `times` the eps."""


@dataclass(frozen=True)
class Copies:
    """What a closure's `halves` is given: `both` of several directions."""

    directions: Sequence[Both]

    @property
    def copies(self) -> int:
        return 2 * len(self.directions)

    def __call__(self, batch_size: int) -> AbstractContextManager[None]:
        first, *others = self.directions
        return first.both(batch_size, others)


def together(closure: Loss, direction: Both) -> tuple[float, float] | None:
    """Return loss_plus and loss_minus from one forward pass, or None if it takes two.

    Directions of the step that follow are measured in the same pass, as many as the closure and the
    form allow. The closure keeps their losses until they ask for them.
    """
    if closure.paired is None:
        return None
    if (known := closure.known.pop(direction.probe, None)) is not None:
        return known
    memory = direction.memory
    if memory.paired is False:
        return None
    if memory.stacked is not False and (others := _others(closure, direction)):
        told = "one direction a forward pass instead of several: %s"
        if found := _measured(closure, [direction, *others], "stacked", told):
            later = zip(others, found[1:], strict=True)
            closure.known.update({other.probe: pair for other, pair in later})
            return found[0]
    told = "two forward passes a step instead of one: %s"
    found = _measured(closure, [direction], "paired", told)
    return found[0] if found else None


def _others(closure: Loss, direction: Both) -> list[Both]:
    """Return the directions that can share this one's pass."""
    assert closure.paired is not None
    if direction.placed is not None:  # each process may have a batch of another size
        return []
    most = min(closure.paired.directions, direction.most())
    later = [probe for probe in direction.together if probe > direction.probe]
    return [direction.beside(probe) for probe in later[: most - 1]]


def _measured(
    closure: Loss, directions: Sequence[Both], what: str, told: str
) -> list[tuple[float, float]] | None:
    """Return the losses of each direction from one pass, or None if it cannot be relied on.

    The memory's field `what` remembers whether it can.
    """
    memory = directions[0].memory
    tried = getattr(memory, what)
    if tried is False:
        return None
    try:
        if not tried and not _agree(closure, directions):
            return None
        found = closure.halves(Copies(directions))
        if not tried:  # in place, what torch's functions do not read is perturbed all the same
            directions[0].check(closure)
    except (InputError, RuntimeError, IndexError) as error:  # the copies may not fit in memory, say
        if tried and len(directions) == 1 and not isinstance(error, Unpaired):
            raise
        logging.getLogger("mezo").warning(told, error)
        setattr(memory, what, False)
        return None
    setattr(memory, what, True)
    return found


def _agree(closure: Loss, directions: Sequence[Both]) -> bool:
    """Return True if one pass gives the losses of two, and False if they are not finite.

    Raises Unpaired if they differ. At 16 eps the losses are so far apart that a parameter read with
    the wrong sign is noticed. A loss may be off by two units in the last place of its own dtype: a
    bfloat16 loss of 12.5 moves in steps of 0.06.
    """
    far = [direction.with_eps(_FAR) for direction in directions]
    measured = closure.halves(Copies(far))
    units = [0.0]

    def at(direction: Both, sign: int) -> float:
        with direction.at(sign):
            found = closure.raw()
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            units.append(torch.finfo(found.dtype).eps)
        return number(found)

    expected = [(at(direction, +1), at(direction, -1)) for direction in far]
    home = at(far[0], 0)
    pairs = list(zip(measured, expected, strict=True))
    if not all(math.isfinite(x) for pair in pairs for x in (*pair[0], *pair[1], home)):
        return False
    share = 0.05 if far[0].dtypes & set(HALF) else 0.01
    for found, two in pairs:
        around = (*two, home)
        slack = share * (max(around) - min(around))
        slack += max(1e-5, 2 * max(units)) * max(map(abs, around))
        if any(abs(one - other) > slack for one, other in zip(found, two, strict=True)):
            raise Unpaired(f"one pass gives the losses {[*found]}, two passes give {[*two]}")
    return True
