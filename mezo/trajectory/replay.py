"""Replay: the weights of a run from its base model and its log, without data or forward passes.

There is no way back. theta + c z is rounded, two numbers often become one, and the log does not say
which it was: to get the weights of step N, replay from the base model until N, at the cost of N
steps' additions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mezo import noise
from mezo.errors import InputError
from mezo.forms.rounding import ROUNDINGS
from mezo.rules import RULES, Rule
from mezo.rules import known as known_rules
from mezo.trajectory import start_values
from mezo.trajectory.files import read
from mezo.trajectory.format import Log, Step
from mezo.trajectory.program import make_, program_of
from mezo.trajectory.writer import entry_of, frozen_fingerprint

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
    """Rebuild the trained weights in place: `model` is the base model, the result is the run's.

    Bitwise: the same additions in the same order, without data or forward passes, one tensor at a
    time. Values of the start that the log holds (start_values.py) take the place of the model's.
    `until` stops before that step of the run. `rules` are classes of your own that the run was made
    with: a log names them, and no code is imported for it. `progress(done, total)` is told of each
    tensor.
    Raises InputError if a tensor is missing or (with `verify`) is not what the run started from,
    trained or frozen.
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
    programs = {
        entry["group"]: program_of(log.header, steps, entry["group"], known=known)
        for entry in entries
    }
    for done, entry in enumerate(entries, 1):
        make_(named[entry["name"]], entry, log.header, programs[entry["group"]], {})
        if progress is not None:
            progress(done, len(entries))
    return model


def steps_until(path: str | Path, log: Log, until: int | None) -> list[Step]:
    """The steps up to that number of the run's; None: all. InputError if the log has them not."""
    if until is not None and not log.start <= until <= log.end:
        raise InputError(
            f"{path} has {len(log.steps)} steps, until must be from {log.start} to {log.end}, "
            f"got {until}"
        )
    steps = log.steps[: None if until is None else until - log.start]
    if steps and log.start and (kept := kept_by(log.header)):
        raise InputError(
            f"{path} starts at step {log.start}, without the buffers of {kept}: merge it with the "
            "log of the steps before (mezo log merge)"
        )
    return steps


def kept_by(header: dict) -> str | None:
    """What keeps buffers, or looks back at earlier steps: a replay then begins with the first."""
    if header["rule"] not in RULES or RULES[header["rule"]].buffers:
        return f"rule {header['rule']}"
    half = {entry["dtype"] for entry in header["tensors"]} & {"bfloat16", "float16"}
    rounded = half and ROUNDINGS[header["rounding"]].buffer
    return f"{header['rounding']} rounding" if rounded else None


def match(path, entry: dict, tensor: torch.Tensor | None, verify: bool) -> None:
    """InputError unless it is there and, with `verify`, what the run started from."""
    if tensor is None:
        raise InputError(f"{path}: the base model has no parameter {entry['name']}")
    found = entry_of(entry["name"], tensor) if verify else entry
    for what in ("shape", "dtype", "sha256"):
        if found[what] != entry[what]:
            raise InputError(
                f"{path} starts from another base model: {what} of {entry['name']} is "
                f"{found[what]}, the log has {entry[what]}"
            )
