"""Both losses of a direction from one forward pass over the batch and its copy.

A closure offers it (`closures.Paired`), a form provides `both`, and here is what relies on it: one
pass is compared with two passes before it is first used, and if they disagree, or if a row cannot
be assigned to a half, a warning says so and every later step takes two passes.
"""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from mezo.closures import Loss, number
from mezo.errors import InputError
from mezo.forms.rounding import HALF
from mezo.record import Memory

_FAR = 16  # one pass and two passes are compared at this multiple of eps


class Unpaired(InputError):
    """Raised if the rows of a tensor cannot be assigned to theta + eps z and theta - eps z."""


class Both(Protocol):
    """A direction that can have both signs in one pass."""

    memory: Memory
    dtypes: set[torch.dtype]  # in which products were computed

    def both(self, batch_size: int) -> AbstractContextManager[None]: ...

    def at(self, sign: int) -> AbstractContextManager[None]: ...

    def with_eps(self, times: float) -> Any:
        """Return the same direction, in a form of its own, with `times` the eps."""


def together(closure: Callable[[], float], direction: Both) -> tuple[float, float] | None:
    """Return loss_plus and loss_minus from one forward pass, or None if it takes two."""
    if not isinstance(closure, Loss) or closure.paired is None:
        return None
    memory = direction.memory
    tried = memory.paired
    if tried is False:
        return None
    try:
        if not tried and not _agree(closure, direction):
            return None
        plus, minus = closure.halves(direction.both)
    except (Unpaired, RuntimeError) as error:  # RuntimeError: twice the batch may not fit in memory
        if tried and not isinstance(error, Unpaired):
            raise
        logging.getLogger("mezo").warning("two forward passes a step instead of one: %s", error)
        memory.paired = False
        return None
    memory.paired = True
    return plus, minus


def _agree(closure: Loss, direction: Both) -> bool:
    """Return True if one pass gives the losses of two, and False if they are not finite.

    Raises Unpaired if they differ. At 16 eps the losses are so far apart that a parameter read with
    the wrong sign is noticed. A loss may be off by two units in the last place of its own dtype: a
    bfloat16 loss of 12.5 moves in steps of 0.06.
    """
    far = direction.with_eps(_FAR)
    measured = list(closure.halves(far.both))
    expected, unit = [], 0.0
    for sign in (+1, -1, 0):
        with far.at(sign):
            found = closure.raw()
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            unit = max(unit, torch.finfo(found.dtype).eps)
        expected.append(number(found))
    if not all(map(math.isfinite, measured + expected)):
        return False
    share = 0.05 if far.dtypes & set(HALF) else 0.01
    slack = share * (max(expected) - min(expected))
    slack += max(1e-5, 2 * unit) * max(map(abs, expected))
    if any(abs(one - other) > slack for one, other in zip(measured, expected, strict=False)):
        raise Unpaired(f"one pass gives the losses {measured}, two passes give {expected[:2]}")
    return True
