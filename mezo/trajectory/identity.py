"""What must stay the same during a run, since its log says it once: settings and tensors."""

from typing import Any

import torch

from mezo import rules
from mezo.errors import InputError
from mezo.layers import PLAIN, scales_of
from mezo.mezo import MeZO
from mezo.options.option import Logged
from mezo.options.table import ESTIMATORS, OPTIONS
from mezo.trajectory.fingerprints import place_of
from mezo.trajectory.header import IDENTITY, places


def identity(optimizer: MeZO) -> dict[str, Any]:
    """Return the settings of the whole run that a replay depends on, besides the tensors."""
    settings = optimizer.settings | {"perturbation": optimizer.perturbation}
    keys: dict[str, Any] = {}
    for option in OPTIONS:
        value = settings.get(option.name)
        dropped = option.logged is Logged.UNLESS_DEFAULT and value == option.default
        if option.constant and option.applies(settings) and not dropped:
            fill = _FILLED.get(option.name)
            keys |= {option.name: value} if fill is None else fill(optimizer, value)
    return keys


def _of_rule(optimizer: MeZO, value: Any) -> dict[str, Any]:
    """Return the rule that a replay applies, and its options if it has any."""
    given = rules.options(optimizer.rule.replayed, optimizer.rules)
    return {"rule": given.pop("name")} | ({"rule_options": given} if given else {})


def _of_estimator(optimizer: MeZO, value: str) -> dict[str, Any]:
    """Return the estimator's name and, for a user's own, how many sides it visits if not both."""
    one_sided = value not in ESTIMATORS and optimizer.estimator.sides == 1
    return {"estimator": value} | ({"sides": 1} if one_sided else {})


def _of_layers(optimizer: MeZO, value: dict[str, Any]) -> dict[str, Any]:
    """Return how the tensors are scaled; the scales themselves are with the tensors."""
    return {"modified": value.get("modified", "variance")} if value.get("scales") else {}


# The options that fill other keys of the header than one of their name.
_FILLED = {"rule": _of_rule, "estimator": _of_estimator, "layers": _of_layers}


def constants(optimizer: MeZO) -> dict[str, Any]:
    """Return what must stay constant during a log: the settings of `identity`, and the tensors."""
    entries = places([entry for entry, _ in entries_of(optimizer)])
    return identity(optimizer) | {f"parameter {name}": place for name, place in entries.items()}


def in_words(value: Any) -> Any:
    """Return a value of `constants` in words."""
    if not isinstance(value, tuple):
        return "frozen" if value is None else value
    shape, dtype, group, scale, threshold = value
    words = f"{dtype} of shape {shape}, in parameter group {group}"
    words += "" if scale is None else f", of scale {scale}"
    return words + ("" if threshold is None else f", under threshold {threshold}")


def check_identity(header: dict[str, Any], optimizer: MeZO, told: str) -> None:
    """Raise InputError, beginning with `told`, if the header is not of the optimizer's run."""
    here = identity(optimizer)
    for key in IDENTITY:
        if header.get(key) != here.get(key):
            known = header.get(key), here.get(key)
            raise InputError(f"{told}: its {key} is {known[0]}, not {known[1]}")
    if places(header["tensors"]) != places([entry for entry, _ in entries_of(optimizer)]):
        raise InputError(f"{told}: its tensors, or their parameter groups, differ")


def entries_of(optimizer: MeZO) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Return the log's entry, without the fingerprint, of every trained tensor, and the tensor."""
    index = {id(g): i for i, g in enumerate(optimizer.param_groups)}
    own = scales_of(optimizer.param_groups[0]["layers"])
    entries: list[tuple[dict[str, Any], torch.Tensor]] = []
    for name, p, group in optimizer.trained():
        entry = place_of(name, p) | {"group": index[id(group)]}
        mine = own.get(name, PLAIN)
        entry |= {"scale": mine.scale} if mine.scale != 1.0 else {}
        entry |= {"threshold": mine.threshold} if mine.threshold is not None else {}
        entries.append((entry, p))
    return entries
