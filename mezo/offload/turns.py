"""Calls that take turns: each runs until it needs something absent, and then the next one runs.

A forward pass can only be suspended and resumed in a thread of its own. Here each call has one, and
all but one of them wait at any time, so that the code that is called needs no locks. Only
`Turns.pass_on` decides which of them continues.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from contextvars import copy_context

import torch

Call = Callable[["Turns", int], float]  # given the turns, and its number for `pass_on`


class _Stopped(BaseException):
    """Ends the other calls when one has failed; no `except Exception` catches it."""


class Turns:
    """Runs several calls that hand over to each other wherever they call `pass_on`.

    `run(calls)` returns the float of each. The first call runs in the current thread and the others
    in threads of `pool`, which must have enough of them. They inherit what torch keeps for each
    thread: autocast, the default device, the current stream. An exception in one ends all.
    """

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool
        self._batons: list[threading.Semaphore] = []
        self._done: list[bool] = []
        self._turn = 0  # whose it is
        self._failed = False

    def run(self, calls: Sequence[Call]) -> list[float]:
        self._batons = [threading.Semaphore(0) for _ in calls]
        self._done = [False] * len(calls)
        state = state_of_thread()
        others = [
            self._pool.submit(copy_context().run, self._other, call, number, state)
            for number, call in enumerate(calls[1:], start=1)
        ]
        try:
            first = calls[0](self, 0)
            self._end(0)
            wait(others)
        except BaseException as error:
            self._failed = True
            self._end(0)
            wait(others)  # each ends at its next turn
            if not isinstance(error, _Stopped):
                raise
        for ended in [other.exception() for other in others]:
            if ended is not None and not isinstance(ended, _Stopped):
                raise ended
        return [first, *(other.result() for other in others)]

    def _other(self, call: Call, number: int, context) -> float:
        self._batons[number].acquire()
        try:
            self._go_on()
            with context():
                return call(self, number)
        except BaseException:
            self._failed = True
            raise
        finally:
            self._end(number)

    def pass_on(self, number: int) -> None:
        """Let the others run until they pass on or end. Call number `number` calls this."""
        self._go_on()
        if (following := self._following(number)) is not None:
            self._hand(following)
            self._batons[number].acquire()
        self._go_on()

    def _following(self, number: int) -> int | None:
        """Return the next call that has not ended, or None."""
        n = len(self._done)
        order = ((number + i) % n for i in range(1, n))
        return next((other for other in order if not self._done[other]), None)

    def _hand(self, number: int) -> None:
        self._turn = number
        self._batons[number].release()

    def _go_on(self) -> None:
        if self._failed:
            raise _Stopped

    def _end(self, number: int) -> None:
        self._done[number] = True
        if self._turn == number and (following := self._following(number)) is not None:
            self._hand(following)


def state_of_thread() -> Callable:
    """Return a context that gives another thread this one's autocast, device, stream and modes."""
    kinds = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    casts = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in sorted(kinds)]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    device = torch.get_default_device()
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    @contextmanager
    def context() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype, enabled in casts:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            if device.type != "cpu":
                stack.enter_context(device)
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            yield

    return context
