"""The one exception for what a user can put right, and the one that has to wait."""


class InputError(ValueError):
    """Bad input: one sentence that names the value, file or tensor, and what to do.

    The command line prints it without a traceback and exits with 2; every other exception is a
    fault of the program and keeps its traceback.
    """


class Held:
    """`with held: ...` keeps a KeyboardInterrupt back until `held.release()` raises it."""

    interrupt: BaseException | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, traceback) -> bool:
        if isinstance(error, KeyboardInterrupt):
            self.interrupt = error
        return isinstance(error, KeyboardInterrupt)

    def release(self) -> None:
        if self.interrupt is not None:
            raise self.interrupt
