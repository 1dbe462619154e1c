"""Replay: the weights of a run from its base model and its log, without data or forward passes."""

from collections.abc import Callable
from pathlib import Path

import torch

from .. import noise
from ..errors import InputError
from .format import read
from .moves import make_, moves_of
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
    tables = {entry["group"]: moves_of(log.header, steps, entry["group"]) for entry in entries}
    for done, entry in enumerate(entries, 1):
        make_(named[entry["name"]], entry["name"], log.header, tables[entry["group"]], {})
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
