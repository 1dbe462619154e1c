"""How far a loop is, in a line every so often: for logs, notebooks and nohup, which show no bars.

    for batch in Progress(print).over(batches, "test batch"):
        ...                    # test batch 12/40, 3.1/s, 9 s left

The first line comes after ten seconds, the next ones every half a minute: a loop that is over
sooner says nothing, unless its end is asked for.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
FIRST, EVERY = 10.0, 30.0  # seconds before the first line, and between two


@dataclass(frozen=True)
class Progress:
    """Where lines about loops go, and the clock that says when one is due.

    Args:
        tell: Takes a line; None says nothing.
        clock: Returns seconds; only differences count.
    """

    tell: Callable[[str], None] | None = None
    clock: Callable[[], float] = time.monotonic

    def of(self, what: str, total: int, done: int = 0) -> "Loop":
        """Return the progress of a loop over `total` of `what`, `done` of which are done."""
        return Loop(self, what, total, done)

    def over(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Yield the items, and say how many of them are done."""
        loop = self.of(what, len(items))
        for done, item in enumerate(items, start=1):
            yield item
            loop.at(done)

    def counted(self, what: str) -> Callable[[int, int], None]:
        """Return a function of (done, total), for a loop that others run and count."""
        loop = self.of(what, 0)

        def told(done: int, total: int) -> None:
            loop.at(done, total=total)

        return told


SILENT = Progress()


class Loop:
    """One loop's progress: `at` is called after each round, `end` says the last line if it lacks.

    Speed and time left are from the whole loop, whatever was done between its rounds. A loss is
    the mean of those since the line before.
    """

    def __init__(self, progress: Progress, what: str, total: int, done: int):
        self._progress, self._what, self._total = progress, what, total
        self._first = self._done = self._told = done
        self._began = progress.clock()
        self._due = self._began + FIRST
        self._losses: list[float] = []

    def at(self, done: int, loss: float | None = None, total: int | None = None) -> None:
        """Note that so many rounds are done, the last one with this loss, and tell if it is due.

        `total` is given where it was not known before.
        """
        self._done, self._total = done, self._total if total is None else total
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        if self._progress.tell is not None and self._progress.clock() >= self._due:
            self._tell()

    def end(self) -> None:
        """Tell where the loop ended, if the last line does not say that."""
        if self._progress.tell is not None and self._told != self._done:
            self._tell()

    def _tell(self) -> None:
        now, tell = self._progress.clock(), self._progress.tell
        parts = [f"{self._what} {self._done}/{self._total}"]
        if self._losses:
            parts.append(f"loss {sum(self._losses) / len(self._losses):.4g}")
        made, spent = self._done - self._first, now - self._began
        if made == 1 and self._done < self._total:  # it compiles, and looks: no measure of the rest
            parts.append(f"{spent:.1f} s for the first")
        elif made > 0 and spent > 0:
            pace = made / spent
            parts.append(f"{pace:.1f}/s" if pace >= 1 else f"{1 / pace:.1f} s each")
            rest = self._total - self._done
            parts.append(f"{span(rest / pace)} left" if rest > 0 else f"{span(spent)} in all")
        self._told, self._due, self._losses = self._done, now + EVERY, []
        if tell is not None:
            tell(", ".join(parts))


def span(seconds: float) -> str:
    """A time as a reader takes it in: 45 s, 12 min, 2 h 23 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
