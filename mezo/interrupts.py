"""Delay Ctrl-C while the weights are inconsistent, and let it through during a forward pass.

    with held():              # a step: walks, the update, its record
        with released():      # a forward pass of the step
            loss = closure()

Between two forward passes thousands of tensors are moved one after another, and a step's record
follows its update. An interrupt in the middle would leave weights that no log describes. Within
`held` a SIGINT is noted, and passed to the previous handler when the section ends or when a forward
pass begins. This works only in the main thread, the only one that receives signals, and only if the
previous handler is a Python function, as Python's default handler is.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_waiting: list[FrameType | None] = []  # frames of the noted signals
_handler: list[Any] = [None]  # the handler to restore when the section ends


@contextmanager
def held() -> Iterator[None]:
    """Delay SIGINT within the context; at its end, call the previous handler if one was noted.

    A nested context does nothing.
    """
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
    """Let SIGINT through within the context; a delayed one is handed over at once."""
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
    if signal.getsignal(signal.SIGINT) is _note:  # otherwise somebody installed another handler
        signal.signal(signal.SIGINT, _handler[0])
    if _waiting:
        frame = _waiting.pop()
        _waiting.clear()
        _handler[0](signal.SIGINT, frame)


def _note(number: int, frame: FrameType | None) -> None:
    _waiting.append(frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
