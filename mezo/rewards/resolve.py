"""Resolve the name of a reward function, as given on the command line.

    rules.py:short            the function `short` in a file
    my_package.rules:short    in an installed module, or in my_package/rules.py below this folder
    mezo.rewards:token_f1
    python score.py           anything else is a command (command.py)

The user names their own code, and it is loaded as `import` would load it.
"""

import re

from mezo.errors import InputError
from mezo.foreign import imported
from mezo.rewards.command import Command
from mezo.rewards.functions import RewardFunc

_FUNCTION = re.compile(r"(?P<where>[^\s:]+):(?P<name>[A-Za-z_]\w*)")


def resolve(text: str, timeout: float = 10.0) -> RewardFunc:
    """Return the function that `text` names, or a Command with that time limit in seconds.

    Raises InputError if there is no such function or the command is malformed.
    """
    match = _FUNCTION.fullmatch(text.strip())
    if match is None:
        return Command(text, timeout)
    function = imported(text.strip(), "reward")
    if not callable(function):
        raise InputError(f"reward {text} is a {type(function).__name__}, no function")
    return function
