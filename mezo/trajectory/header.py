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
from mezo.estimators import ESTIMATORS
from mezo.forms.rounding import ROUNDINGS
from mezo.guards import FORMS
from mezo.layers import MODIFIED
from mezo.rules import RULES
from mezo.trajectory import start_values

FORMAT = 1
Keys = dict[str, tuple[Callable[[Any], bool], str]]
MAX_CYCLES = 2**16  # walks a probe and step; each is 3 moves of a replay
_KNOWN = {
    "distribution": noise.DISTRIBUTIONS,
    "perturbation": FORMS,
    "rounding": tuple(ROUNDINGS),
    "rule": tuple(name for name in RULES if name != "scalar_adam"),
    "estimator": ESTIMATORS,
    "modified": MODIFIED,
}
_OPTIONAL = ("estimator", "modified")  # without them: two_point, and no scales
IDENTITY = ("seed", *_KNOWN, "rule_options", "sides", "rank", "interval")  # one for a whole run
_LARGEST = 1e100  # of a setting: products of several are finite, and integers become floats
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_DIGEST = re.compile("[0-9a-f]{16}")
_OF_A_USER = re.compile(r"[\w.]+:[\w.<>]+")  # a rule or an estimator of their own: "module:Name"


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
    for key in _KNOWN:
        if isinstance(header.get(key), str) and not _names(key, header[key]):
            raise InputError(f"this log has {key} {_short(header[key])}: upgrade mezo-lm")


def check(header: dict[str, Any], first: dict[str, Any] | None = None) -> None:
    """Raise Damage, naming the key, unless the header is valid.

    `first` is the header of the file's first segment, or None if `header` itself is that.
    """
    required = {key: rule for key, rule in _FIRST.items() if key not in _OPTIONAL}
    check_keys(header, _EVERY if first is not None else _EVERY | required)
    check_keys(header, dict.fromkeys({"written"} & header.keys(), _WRITTEN))
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
    """Check the keys that only some runs have."""
    if header["perturbation"] == "low_rank":
        check_keys(header, _LOW_RANK)
    check_keys(header, {key: _FIRST[key] for key in _OPTIONAL if key in header})
    if "sides" in header:
        check_keys(header, {"sides": (lambda x: type(x) is int and x in (1, 2), "1 or 2")})
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


def _short(value: Any) -> str:
    """Return a value from a file in a form that is short and safe to print."""
    return ascii(reprlib.repr(value))[1:-1]


def is_count(value: Any, limit: int, least: int = 0) -> bool:
    return type(value) is int and least <= value < limit


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def are(good: Callable, least: int = 0) -> Callable:
    return lambda value: type(value) is list and len(value) >= least and all(map(good, value))


def _names(key: str, value: str) -> bool:
    """Return whether a key may have this name as its value; nothing is imported to find out."""
    own = key in ("rule", "estimator") and _OF_A_USER.fullmatch(value) is not None
    return own or value in _KNOWN[key]


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
    "seed": (lambda x: is_count(x, 2**64), "in [0, 2^64)"),
    "tensors": (lambda x: type(x) is list, "a list"),
    "frozen": (lambda x: x is None or _is_digest(x), "16 hexadecimal digits"),
    "config": (lambda x: type(x) is dict, "an object"),
    "versions": (lambda x: type(x) is dict, "an object"),
} | {
    key: (lambda x, key=key: isinstance(x, str) and _names(key, x), f"one of {', '.join(known)}")
    for key, known in _KNOWN.items()
}
_WRITTEN = (lambda x: type(x) is bool, "true or false")
_LOW_RANK: Keys = {
    "rank": (lambda x: is_count(x, 2**16, 1), "from 1 to 65535"),
    "interval": (lambda x: is_count(x, 2**32, 1), "a number of steps"),
}
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
