"""The values that an option may have, and the words that say so.

positive.problem("eps", -1.0)      "eps must be positive, got -1.0"
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

_OF_A_USER = re.compile(r"[\w.]+:[\w.<>]+")  # "module:Name", a rule or an estimator of the user


@dataclass(frozen=True)
class Domain:
    """A set of values.

    Attributes:
        told: What a value must be, to complete "eps must be ...".
        holds: Whether a value of the right type belongs to the domain.
        is_typed: Whether a value has the right type.
        type_told: What that type is, as `told`.
        choices: The names that belong to the domain, if it is one of names.
        optional: Whether None belongs to the domain, too.
        plain: Makes Python's own number, which a log can hold, of a value of the domain.
    """

    told: str
    holds: Callable[[Any], bool]
    is_typed: Callable[[Any], bool] = lambda value: True
    type_told: str = ""
    choices: tuple[str, ...] = ()
    optional: bool = False
    plain: Callable[[Any], Any] = lambda value: value

    def __contains__(self, value: Any) -> bool:
        if value is None and self.optional:
            return True
        return self.is_typed(value) and bool(self.holds(value))

    def problem(self, name: str, value: Any) -> str | None:
        """Return the sentence that refuses a value of the option `name`, or None."""
        if value in self:
            return None
        told = self.told if self.is_typed(value) else self.type_told
        if self.is_typed(value) and _is_number(value) and math.isinf(value):
            told = "finite"
        return f"{name} must be {told}, got {value!r}"


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, of Python, numpy, or torch."""
    return hasattr(value, "__float__") and not isinstance(value, str)


def _is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, of Python, numpy, or torch."""
    try:
        return index(value) == value and not isinstance(value, bool)
    except TypeError:
        return False


def number(told: str, holds: Callable[[float], bool], optional: bool = False) -> Domain:
    """Return a domain of finite numbers."""

    def good(value: Any) -> bool:
        return math.isfinite(value) and holds(float(value))

    return Domain(told, good, _is_number, "a number", optional=optional)


def whole(least: int, end: int | None = None, told: str = "") -> Domain:
    """Return a domain of whole numbers from `least` on, below `end` if there is one."""

    def good(value: Any) -> bool:
        return least <= index(value) and (end is None or index(value) < end)

    told = told or (f"at least {least}" if end is None else f"from {least} to {end - 1}")
    return Domain(told, good, _is_whole, "a whole number", plain=index)


def name_of(*choices: str, optional: bool = False, own: bool = False) -> Domain:
    """Return a domain of names. With `own`, a user's "module:Name" belongs to it, too."""

    def good(value: Any) -> bool:
        return value in choices or (own and _OF_A_USER.fullmatch(value) is not None)

    told = " or ".join([", ".join(choices[:-1]), choices[-1]])
    return Domain(told, good, lambda x: isinstance(x, str), told, choices, optional)


def _are_layers(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    tables = [value.get(name, {}) for name in ("scales", "thresholds")]
    numbers = (x for table in tables if isinstance(table, Mapping) for x in table.values())
    return all(isinstance(table, Mapping) for table in tables) and all(map(_is_number, numbers))


ANY = Domain("anything", lambda value: True)
LAYERS = Domain("a dict with numbers by name, as mezo.layers makes it", _are_layers, optional=True)
FLAG = Domain("True or False", lambda value: value in (True, False))
POSITIVE = number("positive", lambda x: x > 0)
POSITIVE_OR_NONE = number("positive", lambda x: x > 0, optional=True)
NOT_NEGATIVE = number("at least 0", lambda x: x >= 0)
FRACTION_OR_NONE = number("between 0 and 1", lambda x: 0 < x < 1, optional=True)
