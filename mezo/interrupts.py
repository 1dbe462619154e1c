"""Delay Ctrl-C while the weights are inconsistent, and let it through during a forward pass.

    with held():              # a step: walks, the update, its record
        with released():      # a forward pass of the step
            loss = closure()

Between two forward passes thousands of tensors are moved one after another, and a step's record
follows its update. An interrupt in the middle would leave weights that no log describes. Within
`held` a SIGINT is noted, and passed to the previous handler when the section ends or when a forward
pass begins; one that arrives during the pass is handed over at once. This works only in the main
thread, the only one that receives signals, and only if the previous handler is a Python function,
as Python's default handler is.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_waiting: list[FrameType | None] = []  # frames of the noted signals
_handler: list[Any] = [None]  # the handler to restore when the section ends
_passing = [False]  # whether a forward pass is being made, which a signal may end


@contextmanager
def held(lock: "threading.Lock | None" = None) -> Iterator[None]:
    """Delay SIGINT within the context; at its end, call the previous handler if one was noted.

    A nested context does nothing. A `lock` is kept until the context ends. Raises RuntimeError if
    the lock is taken.
    """
    handler = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    within = handler is _note and _passing[0]  # a section within a forward pass of another
    mine = main and (within or (handler is not _note and callable(handler)))
    taken = False
    try:
        if mine:
            _waiting.clear()
            _passing[0] = False
            _handler[0] = _handler[0] if within else signal.signal(signal.SIGINT, _note)
        if lock is not None:
            taken = lock.acquire(blocking=False)
            if not taken:
                raise RuntimeError("this optimizer is making a step already: in another thread?")
        yield
    finally:
        if taken and lock is not None:
            lock.release()
        if mine:
            _passing[0] = within
            if not within and signal.getsignal(signal.SIGINT) is _note:  # else another is there
                signal.signal(signal.SIGINT, _handler[0])
            if _waiting:
                _hand_over()


@contextmanager
def released() -> Iterator[None]:
    """Let SIGINT through within the context; a delayed one is handed over at once."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not _note:
        yield
        return
    try:
        _passing[0] = True
        if _waiting:
            _hand_over()
        yield
    finally:
        _passing[0] = False
        if signal.getsignal(signal.SIGINT) is not _note:  # the pass has installed another
            _handler[0] = signal.signal(signal.SIGINT, _note)


def _hand_over() -> None:
    frame = _waiting.pop()
    _waiting.clear()
    _handler[0](signal.SIGINT, frame)


def _note(number: int, frame: FrameType | None) -> None:
    if _passing[0]:
        _handler[0](number, frame)
    else:
        _waiting.append(frame)
