"""The header of a segment: JSON that is checked, key by key, before it is used.

A header comes from a file that anybody may have written. A checked header has the types, ranges and
lengths on which the rest of the package relies; unknown keys are ignored.
"""

import json
import math
import re
import reprlib
from collections.abc import Callable
from typing import Any

from mezo import noise, rules
from mezo.errors import InputError
from mezo.options.option import Key, Logged
from mezo.options.table import OPTIONS
from mezo.rules import RULES
from mezo.trajectory import start_values

FORMAT = 1
Keys = dict[str, tuple[Callable[[Any], bool], str]]
MAX_CYCLES = 2**16  # walks a probe and step; each is 3 moves of a replay
_CONSTANT = [option for option in OPTIONS if option.constant]
_BY_NAME = {key.name: key for option in _CONSTANT for key in option.header_keys}
IDENTITY = tuple(_BY_NAME)  # the keys that hold for a whole run
_LARGEST = 1e100  # of a setting: products of several are finite, and integers become floats
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_DIGEST = re.compile("[0-9a-f]{16}")
DIGESTS = "digests"  # of a segment: of all tensors before its first step
DIGITS = 4  # of each tensor's, hexadecimal
_DIGESTS = re.compile("[0-9a-f]*")


class Damage(Exception):
    """Raised for a malformed log; the message says what is wrong, and readers add the place."""


def parse(text: bytes) -> dict[str, Any]:
    """Return the JSON object in `text`. Raises Damage for anything else, however deep or long."""
    try:
        header = json.loads(text.decode(), parse_constant=str)  # NaN is no JSON, but was written
    except (ValueError, RecursionError):
        raise Damage("a header that is no JSON") from None
    if not isinstance(header, dict):
        raise Damage("a header that is not a JSON object")
    return header


def text_of(header: dict[str, Any]) -> bytes:
    """Return a header as JSON. Raises Damage for values that JSON cannot hold."""
    try:
        return json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Damage(f"what JSON cannot hold: {error}") from None


def check_version(header: dict[str, Any]) -> None:
    """Raise InputError for a log that a newer version of mezo wrote."""
    found = header.get("format"), header.get("noise")
    if found != (FORMAT, noise.CONTRACT):
        raise InputError(
            f"this log has format {_short(found[0])} and noise contract {_short(found[1])}; this "
            f"version of mezo reads {FORMAT} and {noise.CONTRACT}: upgrade mezo-lm"
        )
    for name, key in _BY_NAME.items():
        value = header.get(name)
        if key.domain.choices and isinstance(value, str) and value not in key.domain:
            raise InputError(f"this log has {name} {_short(value)}: upgrade mezo-lm")


def check(header: dict[str, Any], first: dict[str, Any] | None = None) -> None:
    """Raise Damage, naming the key, unless the header is valid.

    `first` is the header of the file's first segment, or None if `header` itself is that.
    """
    check_keys(header, _EVERY if first is not None else _EVERY | _FIRST)
    check_keys(header, dict.fromkeys({"written"} & header.keys(), _WRITTEN))
    if DIGESTS in header:
        _check_digests(header[DIGESTS], len((first or header)["tensors"]))
    if first is None:
        _check_kinds(header)
    groups = len((first or header)["lr"])
    for key in ("lr", "weight_decay"):
        if len(header[key]) != groups:
            raise Damage(f"a header whose {key} is not of {groups} parameter groups")
    if first is None:
        _check_tensors(header["tensors"], groups)
        if problem := start_values.problem_of(header):
            raise Damage(f"a header whose {start_values.KEY} are {problem}")


def places(entries: list[dict[str, Any]]) -> dict[str, tuple]:
    """Return, by name, what is constant: shape, dtype, parameter group, scale and threshold."""
    keys = ("shape", "dtype", "group", *_OWN)
    return {e["name"]: tuple(e.get(key) for key in keys) for e in entries}


def check_keys(header: dict[str, Any], keys: Keys) -> None:
    """Raise Damage unless `header` has all `keys`, each with a valid value."""
    for key, (good, meaning) in keys.items():
        if key not in header:
            raise Damage(f"a header without {key}")
        if not good(header[key]):
            raise Damage(f"a header whose {key} is not {meaning}: {_short(header[key])}")


def _check_kinds(header: dict[str, Any]) -> None:
    """Check the keys of the options that only some runs have, or that they leave out."""
    for option in _CONSTANT:
        if option.applies(header):
            must = option.logged is Logged.ONCE and option.only_for is not None
            keys = [key for key in option.header_keys if key.name in header or must]
            check_keys(header, {key.name: _of(key) for key in keys})
    given = header.get("rule_options", {})
    if header["rule"] not in RULES and type(given) is dict:
        return  # the rule's own file checks them
    try:
        known = rules.options({"name": header["rule"]} | given)
        good = given.keys() == known.keys() - {"name"}
    except (InputError, TypeError):
        good = False
    if not good:
        raise Damage(f"a header whose rule_options are none of {header['rule']}: {_short(given)}")


def _check_tensors(entries: list, groups: int) -> None:
    seen: set[str] = set()
    for i, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise Damage("a header that is not a JSON object")
            check_keys(entry, _TENSOR | {k: rule for k, rule in _OWN.items() if k in entry})
            if entry["group"] >= groups:
                raise Damage(f"a group that is not one of {groups}: {entry['group']}")
            if entry["name"] in seen:
                raise Damage(f"the name of another tensor: {_short(entry['name'])}")
        except Damage as damage:
            raise Damage(f"a header whose tensor {i} has {damage}") from None
        seen.add(entry["name"])


def _check_digests(value: Any, tensors: int) -> None:
    good = isinstance(value, str) and len(value) == DIGITS * tensors and _DIGESTS.fullmatch(value)
    if not good:
        raise Damage(f"a header whose digests are not of {tensors} tensors: {_short(value)}")


def _short(value: Any) -> str:
    """Return a value from a file in a form that is short and safe to print."""
    return ascii(reprlib.repr(value))[1:-1]


def is_count(value: Any, limit: int, least: int = 0) -> bool:
    return type(value) is int and least <= value < limit


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def are(good: Callable, least: int = 0) -> Callable:
    return lambda value: type(value) is list and len(value) >= least and all(map(good, value))


def _of(key: Key) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in key.domain, key.domain.told


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


_NUMBERS = (are(_is_number, 1), "a list of finite numbers")
_EVERY: Keys = {
    "start": (lambda x: is_count(x, noise.MAX_STEP), "a step"),
    "eps": (lambda x: _is_number(x) and x > 0, "a positive number"),
    "lr": _NUMBERS,
    "weight_decay": _NUMBERS,
    "cycles": (
        are(lambda x: is_count(x, MAX_CYCLES + 1, 1), 1),
        f"a list of numbers from 1 to {MAX_CYCLES}",
    ),
    "lr_in_records": (lambda x: type(x) is bool, "true or false"),
}
_FIRST: Keys = {
    "tensors": (lambda x: type(x) is list, "a list"),
    "frozen": (lambda x: x is None or _is_digest(x), "16 hexadecimal digits"),
    "config": (lambda x: type(x) is dict, "an object"),
    "versions": (lambda x: type(x) is dict, "an object"),
} | {
    option.header_keys[0].name: _of(option.header_keys[0])
    for option in _CONSTANT
    if option.logged is Logged.ONCE and option.only_for is None
}
_WRITTEN = (lambda x: type(x) is bool, "true or false")
_SIZES = are(lambda x: is_count(x, 2**63))
_OWN: Keys = {
    "scale": (lambda x: _is_number(x) and x > 0, "a positive number"),
    "threshold": (lambda x: _is_number(x) and x >= 0, "a number"),
}
_TENSOR: Keys = {
    "name": (lambda x: isinstance(x, str) and x != "" and x.isprintable(), "a name"),
    "shape": (
        lambda x: _SIZES(x) and len(x) <= 64 and math.prod(x) < 2**63,
        "a list of sizes",
    ),
    "dtype": (lambda x: x in _DTYPES, f"one of {', '.join(_DTYPES)}"),
    "group": (lambda x: is_count(x, 2**32), "a number"),
    "sha256": (_is_digest, "16 hexadecimal digits"),
}
