"""The exception for mistakes that the user can correct."""


class InputError(ValueError):
    """Bad input: its message is one sentence that names the value, file or tensor and the remedy.

    The command line prints the message without a traceback and exits with code 2. Every other
    exception is an error in the program and keeps its traceback.
    """
