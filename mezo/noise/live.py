"""Tables of moves that are read anew each time a captured sequence of kernels is replayed.

A CUDA graph repeats the launches of one step with the same arguments. The number of the step lies
in a table on the device, though, so that the same launches draw the next step's z once the table
has been rewritten. `Tables` remembers every table that a sequence was captured with, and `set_`
writes another step's numbers into all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

# "step"; "probe", the first of the directions of a pass, and "span", to the last one and beyond it;
# "first", the step that began the interval.
Numbers = Mapping[str, int]
Encode = Callable[[np.ndarray], np.ndarray]


class Unrecordable(RuntimeError):
    """Raised if a kernel that would always draw the same step is about to be captured."""


class Tables:
    """The tables of one captured sequence.

    Args:
        numbers: The numbers of the step that is captured. A move at another step is refused.
    """

    def __init__(self, numbers: Numbers):
        self.numbers = dict(numbers)
        self.capturing = False
        self._kept: dict[bytes, tuple[np.ndarray, list[str], np.ndarray, np.ndarray]] = {}
        self._uploaded: list[tuple[np.ndarray, Encode, torch.Tensor]] = []

    def live(self, moves: np.ndarray) -> np.ndarray:
        """Return the array to launch with in place of `moves`; `set_` changes what it holds."""
        content = moves.tobytes()
        if content not in self._kept:
            known, steps = {self.numbers[n]: n for n in ("first", "step")}, moves["step"].tolist()
            if unknown := set(steps) - set(known):
                raise Unrecordable(f"a kernel draws z of steps {sorted(unknown)}")
            beyond = moves["probe"].astype(np.int64) - self.numbers["probe"]
            now = (beyond >= 0) & (beyond < self.numbers.get("span", 1))
            if not (now | (moves["probe"] == 0)).all():
                raise Unrecordable("a kernel draws z of another direction")
            array = moves.copy()
            self._kept[content] = array, [known[step] for step in steps], now, beyond[now]
        return self._kept[content][0]

    def on_device(self, moves: np.ndarray, encode: Encode, device: torch.device) -> torch.Tensor:
        """Return the device's copy of a live array, in the form that `encode` gives it.

        It is made in the warm-up. Raises Unrecordable if it is first asked for in the capture,
        which cannot copy from the host.
        """
        for array, _, tensor in self._uploaded:
            if array is moves and tensor.device == device:
                return tensor
        if self.capturing:
            raise Unrecordable("the capture draws what the warm-up did not draw")
        tensor = torch.from_numpy(encode(moves)).to(device)
        self._uploaded.append((moves, encode, tensor))
        return tensor

    def launch(self, module: Any, tensor, key, moves, *rest) -> None:
        """Have a kernel module apply live moves to a tensor; a stand-in for a graph notes it."""
        module.apply_(tensor, key, self.live(moves), *rest)

    def set_(self, numbers: Numbers) -> None:
        """Write the numbers of another step into every table."""
        for array, names, now, beyond in self._kept.values():
            array["step"] = [numbers[name] for name in names]
            array["probe"][now] = numbers["probe"] + beyond
        for array, encode, tensor in self._uploaded:
            tensor.copy_(torch.from_numpy(encode(array)))


def numbers_of(step: int, probes: Sequence[int], first: int) -> Numbers:
    """Return the numbers of a step whose pass draws directions of these probes."""
    return {"step": step, "probe": probes[0], "span": probes[-1] - probes[0] + 1, "first": first}


_CURRENT: ContextVar[Tables | None] = ContextVar("tables", default=None)


@contextmanager
def using(tables: Tables) -> Iterator[None]:
    """Within the context, this thread's launches read their moves from `tables`."""
    token = _CURRENT.set(tables)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Tables | None:
    """Return the tables of the sequence that this thread is capturing, if it is."""
    return _CURRENT.get()


def refuse(what: str) -> None:
    """Raise Unrecordable if a sequence is being captured, in which `what` would not change."""
    if current() is not None:
        raise Unrecordable(f"{what} has no kernel that a graph can replay at another step")
