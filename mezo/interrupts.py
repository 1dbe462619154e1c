"""Ctrl-C waits while the weights are on their way, and goes through during a forward pass.

    with held():              # a step: walks, the update, its record
        with released():      # a forward pass of it
            loss = closure()

Between two forward passes thousands of tensors are moved one after the other, and a step's record
follows its update. An interrupt in the middle would leave weights that no log describes. Within
`held` a SIGINT is noted, and handed to the handler that was there before when the section ends, or
when a forward pass begins. Only the main thread's sections do anything, and only if that handler is
a Python function, as Python's own is: other threads never see the signal.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_waiting: list[FrameType | None] = []  # of the signals that were noted
_handler: list[Any] = [None]  # the one to put back, while a section lasts


@contextmanager
def held() -> Iterator[None]:
    """Within, SIGINT is noted; at the end, the handler from before is called. Nested ones join."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is _note or not callable(handler) or not _in_main_thread():
        yield
        return
    try:
        _hold()
        yield
    finally:
        _hand_over()


@contextmanager
def released() -> Iterator[None]:
    """Within, SIGINT is not held after all; one that waits is handed over at once."""
    if signal.getsignal(signal.SIGINT) is not _note or not _in_main_thread():
        yield
        return
    try:
        _hand_over()
        yield
    finally:
        _hold()


def _hold() -> None:
    _waiting.clear()
    _handler[0] = signal.signal(signal.SIGINT, _note)


def _hand_over() -> None:
    if signal.getsignal(signal.SIGINT) is _note:  # else somebody has installed another within
        signal.signal(signal.SIGINT, _handler[0])
    if _waiting:
        frame = _waiting.pop()
        _waiting.clear()
        _handler[0](signal.SIGINT, frame)


def _note(number: int, frame: FrameType | None) -> None:
    _waiting.append(frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
