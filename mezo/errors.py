"""The exception for what a user can put right."""


class InputError(ValueError):
    """Bad input: one sentence that names the value, file or tensor, and what to do.

    The command line prints it without a traceback and exits with 2; every other exception is a
    fault of the program and keeps its traceback.
    """
