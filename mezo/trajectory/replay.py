"""Replay: the weights of a run from its base model and its log, without data or forward passes."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .. import noise
from ..errors import InputError
from ..perturbation import walk
from ..rounding import update_
from ..rules import sgd
from .format import Step, read
from .writer import entry_of, frozen_fingerprint


def replay(
    path: str | Path,
    model: torch.nn.Module,
    *,
    until: int | None = None,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> torch.nn.Module:
    """Rebuild the trained weights in place: `model` is the base model, the result is the run's.

    Bitwise: the same additions in the same order, without data or forward passes, one tensor at a
    time. `until` stops after that many steps. `progress(done, total)` is told of each tensor.
    Raises InputError if a tensor is missing or (with `verify`) is not what the run started from,
    trained or frozen.
    """
    log = read(path)
    steps = log.steps[:until]
    named = {noise.canonical_name(name): p for name, p in model.named_parameters()}
    entries = log.header["tensors"]
    for entry in entries:
        _match(path, entry, named.get(entry["name"]), verify)
    expected = log.header["frozen"]
    if (
        verify
        and expected
        and expected != frozen_fingerprint(model, {entry["name"] for entry in entries})
    ):
        raise InputError(
            f"{path}: the weights that the run kept frozen are not those of this model"
        )
    tables = {entry["group"]: _moves(log.header, steps, entry["group"]) for entry in entries}
    for done, entry in enumerate(entries, 1):
        _replay_tensor(named[entry["name"]], entry, log.header, tables[entry["group"]])
        if progress is not None:
            progress(done, len(entries))
    return model


def _match(path, entry: dict, tensor: torch.Tensor | None, verify: bool) -> None:
    if tensor is None:
        raise InputError(f"{path}: the base model has no parameter {entry['name']}")
    found = entry_of(entry["name"], tensor) if verify else entry
    for what in ("shape", "dtype", "sha256"):
        if found[what] != entry[what]:
            raise InputError(
                f"{path} starts from another base model: {what} of {entry['name']} is "
                f"{found[what]}, the log has {entry[what]}"
            )


def _moves(header: dict, steps: list[Step], group: int) -> np.ndarray:
    """All that the run did to a weight of a parameter group, as one table of moves."""
    moves: list[noise.Move] = []
    walked = header["perturbation"] == "in_place"
    for step in steps:
        seen, grads = step.record, dict(enumerate(step.record.projected_grads))
        if walked:
            for probe, cycles in enumerate(seen.cycles):
                moves += walk(seen.step, probe, step.eps) * cycles
        if all(map(math.isfinite, grads.values())):
            settings = {"lr": step.lrs[group], "weight_decay": step.weight_decays[group]}
            moves += sgd(seen.step, grads, settings | {"rounding": header["rounding"]})
    return noise.table(moves)


def _replay_tensor(tensor: torch.Tensor, entry: dict, header: dict, moves: np.ndarray) -> None:
    """Step by step where a buffer lies between two steps, else in one pass."""
    key, state = noise.tensor_key(header["seed"], entry["name"]), dict[str, torch.Tensor]()
    ends = np.flatnonzero(np.diff(moves["step"].astype(np.int64))) + 1
    for part in np.split(moves, ends) if header["rounding"] == "compensated" else [moves]:
        update_(tensor, key, part, header["rounding"], header["distribution"], state)
