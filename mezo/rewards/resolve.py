"""A reward function by its name, as the command line takes it.

    rules.py:short            the function `short` in a file
    my_package.rules:short    in an installed module, or in my_package/rules.py below this folder
    mezo.rewards:token_f1
    python score.py           anything else is a command (command.py)

The user names code of their own; it is loaded as `import` would.
"""

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

from mezo.errors import InputError
from mezo.rewards.command import Command
from mezo.rewards.functions import RewardFunc

_FUNCTION = re.compile(r"(?P<where>[^\s:]+):(?P<name>[A-Za-z_]\w*)")


def resolve(text: str, timeout: float = 10.0) -> RewardFunc:
    """The function that `text` names, or a Command with that time limit in seconds."""
    match = _FUNCTION.fullmatch(text.strip())
    if match is None:
        return Command(text, timeout)
    where, name = match["where"], match["name"]
    module = _module(where)
    if not hasattr(module, name):
        raise InputError(f"reward {text}: {where} has no {name}")
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"reward {text} is a {type(function).__name__}, no function")
    return function


def _module(where: str) -> ModuleType:
    path = Path(where) if where.endswith(".py") else Path(where.replace(".", "/") + ".py")
    if path.is_file():
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if where.endswith(".py"):
        raise InputError(f"reward file not found: {where}")
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise InputError(f"reward module {where}: no such module, no file {path}") from None
        raise
