"""Fingerprints of tensors, and digests by which a log notices what it does not explain.

A log explains the weights by the moves of its records. What else writes to them between two steps
is in no record, and torch does not count all such writes. `Writer.digest` therefore notes, at
checkpoints and at the end of a run, what the weights are. A replay compares (`Comparison`).
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mezo import noise
from mezo.compatibility import unpacked
from mezo.errors import InputError
from mezo.noise.sharded import is_sharded
from mezo.trajectory.format import Log
from mezo.trajectory.header import DIGITS


def fingerprint(tensor: torch.Tensor) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the elements' bytes, row-major, little-endian.

    For a DTensor they are those of the whole tensor, and every process with a shard must call this.
    """
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    data = whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()[:16]


def frozen_fingerprint(model: torch.nn.Module, trained: set[str]) -> str | None:
    """Return one fingerprint of all untrained parameters (an adapter's base), or None if none."""
    named = {noise.canonical_name(name): p for name, p in model.named_parameters()}
    digests = "".join(fingerprint(unpacked(p)) for name, p in named.items() if name not in trained)
    return hashlib.sha256(digests.encode()).hexdigest()[:16] if digests else None


def place_of(name: str, p: torch.Tensor) -> dict[str, Any]:
    """Return a tensor's name, shape and dtype, as a log has them."""
    dtype = str(p.dtype).removeprefix("torch.")
    return {"name": name, "shape": list(p.shape), "dtype": dtype}


def entry_of(name: str, p: torch.Tensor) -> dict[str, Any]:
    """Return a tensor's name, shape, dtype and fingerprint, as a log has them."""
    return place_of(name, p) | {"sha256": fingerprint(p)}


def digests_of(tensors: Iterable[torch.Tensor]) -> str:
    """Return the first digits of each tensor's fingerprint, one after another."""
    return "".join(fingerprint(tensor)[:DIGITS] for tensor in tensors)


def first_difference(digests: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first tensor that differs from the log's digests, or None."""
    for i, (name, tensor) in enumerate(tensors):
        if fingerprint(tensor)[:DIGITS] != digests[i * DIGITS : (i + 1) * DIGITS]:
            return name
    return None


class Comparison:
    """Compares what a replay makes of each tensor with the digests in the log.

    Attributes:
        steps: The steps before which the log has digests, up to the replay's end.
    """

    def __init__(self, path: str | Path, log: Log, until: int | None = None):
        """`until` is the step before which the replay ends; None is the log's end."""
        self._end = end = log.end if until is None else until
        self._path, self._start = path, log.start
        self._digests = {step: digests for step, digests in log.digests.items() if step <= end}
        self.steps = sorted(self._digests)
        self._places = {entry["name"]: i for i, entry in enumerate(log.header["tensors"])}
        self._same: dict[int, list[int]] = {}  # by place: the steps at which a tensor was the run's
        self._other: dict[int, list[int]] = {}  # and those at which it was not

    def look(self, name: str, step: int, tensor: torch.Tensor) -> None:
        """Compare a tensor as the replay has made it before a step."""
        place = self._places[name]
        digits = self._digests[step][place * DIGITS : (place + 1) * DIGITS]
        kept = self._same if fingerprint(tensor)[:DIGITS] == digits else self._other
        kept.setdefault(place, []).append(step)

    def told(self) -> str:
        """Return a line on what the log has no digests of, or "" if they reach to the end."""
        if self._end in self.steps or self._end == self._start:
            return ""
        last = f"after step {self.steps[-1]}" if self.steps else "of any step"
        return (
            f"{self._path}: the log has no digests of the weights {last}, and cannot show whether "
            "something besides the optimizer wrote to them"
        )

    def finish(self) -> None:
        """Raise InputError if a tensor, when last compared, was not what the run had."""
        last = self.steps[-1] if self.steps else None
        wrong = sorted(place for place, steps in self._other.items() if last in steps)
        if not wrong:
            return
        name = next(name for name, place in self._places.items() if place == wrong[0])
        before = max(self._same.get(wrong[0], [self._start]))
        first = min(step for step in self._other[wrong[0]] if step >= before)
        others = f" (and {len(wrong) - 1} other tensors)" if len(wrong) > 1 else ""
        raise InputError(
            f"{self._path}: something besides the optimizer wrote to {name}{others} between steps "
            f"{before} and {first} of the run: this log gives other weights than the run had from "
            f"there on. Replay until {before} for the run's, or without verifying (--no_verify) "
            "for the log's"
        )
