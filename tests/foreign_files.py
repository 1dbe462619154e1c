"""What the tests of readers share: strange contents, and an end for a reading that hangs."""

import signal
from contextlib import contextmanager

from mezo.tasks.task import custom_task

LIMIT = 120  # seconds of a reading: the first imports much, and the machine may be busy
DEEP = "[" * 100_000
LONG = "1" * 5_000
ROWS = [{"text": "a charming journey", "label": str(i % 2)} for i in range(4)]
REVIEWS = custom_task("{text} It was", [" terrible", " great"])


class Hang(BaseException):
    """No reader takes this for an error of its own."""


@contextmanager
def in_time(told=""):
    """Ends a reading that hangs."""

    def late(*args):
        raise Hang(f"no end within {LIMIT} s: {told}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
