"""Replay: rebuild a run's weights from its base model and its log, without data or forward passes.

Steps cannot be undone. theta + c z is rounded, so that different weights often become equal, and
the log does not say what they were before. To get the weights of step N, replay from the base model
until N, at the cost of the additions of N steps.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mezo import noise
from mezo.errors import InputError
from mezo.forms.rounding import ROUNDINGS
from mezo.rules import RULES, Rule
from mezo.rules import known as known_rules
from mezo.trajectory import start_values
from mezo.trajectory.files import read
from mezo.trajectory.fingerprints import Comparison, entry_of, frozen_fingerprint
from mezo.trajectory.format import Log, Step
from mezo.trajectory.program import make_, program_of

FROZEN_DIFFER = "{}: the weights that the run kept frozen are not those of this model"


def replay(
    path: str | Path,
    model: torch.nn.Module,
    *,
    until: int | None = None,
    verify: bool = True,
    rules: Sequence[type[Rule]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> torch.nn.Module:
    """Turn the base model into the trained model, in place and to the bit, and return it.

    The replay makes the run's additions in the same order, one tensor at a time, without data or
    forward passes. Start values that the log holds (start_values.py) replace the model's.

    Args:
        path: The run log.
        model: The base model; its weights are overwritten.
        until: Stop before this step of the run; None replays all steps.
        verify: Compare the weights, trained and frozen, with the log's fingerprints first; and the
            trained ones with its digests, at the steps that have them.
        rules: Your own rule classes that the run used. A log only names them, and no code is
            imported because of it.
        progress: Called as `progress(done, total)` after each tensor.

    Raises InputError if the log cannot be read, if `until` is not in it, if a tensor is missing, or
    (with `verify`) if the model is not what the run started from, or if the run's weights were not
    what its log makes of them, because something else wrote to them. The model then has the log's.
    """
    log, known = read(path), known_rules(rules)
    steps = steps_until(path, log, until)
    named = {noise.canonical_name(name): p for name, p in model.named_parameters()}
    entries = log.header["tensors"]
    start_values.put_(log.header, named)
    for entry in entries:
        match(path, entry, named.get(entry["name"]), verify)
    expected = log.header["frozen"]
    if (
        verify
        and expected
        and expected != frozen_fingerprint(model, {entry["name"] for entry in entries})
    ):
        raise InputError(FROZEN_DIFFER.format(path))
    comparison = Comparison(path, log, until)
    how: dict[str, Any] = {"known": known, "looks": comparison.steps if verify else ()}
    programs = {
        entry["group"]: program_of(log.header, steps, entry["group"], **how) for entry in entries
    }
    for done, entry in enumerate(entries, 1):
        tensor, program = named[entry["name"]], programs[entry["group"]]
        make_(tensor, entry, log.header, program, {}, comparison.look)
        if progress is not None:
            progress(done, len(entries))
    comparison.finish()
    if verify and (line := comparison.told()):
        logging.getLogger("mezo").info("%s", line)
    return model


def steps_until(path: str | Path, log: Log, until: int | None) -> list[Step]:
    """Return the steps before step number `until`, or all of them for None.

    Raises InputError if `until` is outside the log, or if the log lacks steps that the rule or the
    rounding needs.
    """
    if until is not None and (type(until) is not int or not log.start <= until <= log.end):
        raise InputError(
            f"{path} has {len(log.steps)} steps, until must be from {log.start} to {log.end}, "
            f"got {until!r}"
        )
    steps = log.steps[: None if until is None else until - log.start]
    if steps and log.start and (kept := kept_by(log.header)):
        raise InputError(
            f"{path} starts at step {log.start}, without the buffers of {kept}: merge it with the "
            "log of the steps before (mezo log merge)"
        )
    return steps


def kept_by(header: dict) -> str | None:
    """Name the rule or rounding that depends on earlier steps, so that a replay needs them all.

    Returns None if nothing keeps buffers or looks back.
    """
    if header["rule"] not in RULES or RULES[header["rule"]].buffers:
        return f"rule {header['rule']}"
    half = {entry["dtype"] for entry in header["tensors"]} & {"bfloat16", "float16"}
    rounded = half and ROUNDINGS[header["rounding"]].buffer
    return f"{header['rounding']} rounding" if rounded else None


def match(path, entry: dict, tensor: torch.Tensor | None, verify: bool) -> None:
    """Raise InputError if the tensor is missing or, with `verify`, not what the run started from.

    `entry` is the log's description of the tensor; `path` is named in the error.
    """
    if tensor is None:
        raise InputError(f"{path}: the base model has no parameter {entry['name']}")
    actual = entry_of(entry["name"], tensor) if verify else entry
    for what in ("shape", "dtype", "sha256"):
        if actual[what] != entry[what]:
            raise InputError(
                f"{path} starts from another base model: {what} of {entry['name']} is "
                f"{actual[what]}, the log has {entry[what]}"
            )
