"""Joining the logs of one run, each of a range of its steps."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mezo.errors import InputError
from mezo.trajectory.files import read, save
from mezo.trajectory.format import Log, Segment, Step, Steps, encode
from mezo.trajectory.header import IDENTITY, Damage, places
from mezo.trajectory.resume import resumable

_OF_A_SEGMENT = ("start", "eps", "lr", "weight_decay", "cycles", "lr_in_records")


def merge(paths: Sequence[str | Path], out: str | Path) -> None:
    """Write to a new file the log of all steps that the logs of one run have together.

    They may overlap where they say the same. What was refused at the end of one, as an interrupted
    step is, gives way to what another says of those steps. `out` can be appended to, whatever the
    form of the others: of one compact log it is the long form.

    Raises InputError, naming file and step, if steps are missing between two logs or are told in
    two ways, if they are not of one run, if one cannot be read, or if `out` exists or has no room.
    """
    logs = [(path, read(path)) for path in paths]
    if not logs:
        raise InputError("there is no log to merge")
    frozen = {log.header["frozen"] for _, log in logs} - {None}
    if len(frozen) > 1:
        names = ", ".join(str(path) for path, _ in logs)
        raise InputError(f"{names}: the weights kept frozen differ, this is not one run")
    logs.sort(key=lambda row: (row[1].start, not _has_losses(row[1])))
    (first, log), *rest = logs
    segments, end, last = list(log.segments), log.end, first
    for (before, one), (path, other) in zip(logs, rest, strict=False):
        _check_run(before, one, path, other)
        if other.start > end:
            raise InputError(
                f"{path} starts at step {other.start}, and {last} ends at step {end}: the steps "
                "between them are missing"
            )
        step = _first_difference(segments, other)
        if step is not None and step >= resumable(Log(segments, torn=0)):
            segments, end = _before(segments, step), step
        elif step is not None and step < resumable(other):
            raise InputError(f"{last} and {path} have different records of step {step}")
        elif step is not None:
            continue
        if other.end > end:
            segments += [_from(s, end) for s in other.segments if s.end > end]
            end, last = other.end, path
    header = segments[0].header | {"frozen": max(frozen, default=None)}
    if not all(_has_losses(one) for _, one in logs):
        header |= {"losses": False}
    segments[0] = replace(segments[0], header=header)
    try:
        save(out, encode(segments))
    except Damage as damage:
        raise InputError(f"{out}: the log cannot have {damage}") from None


def _has_losses(log: Log) -> bool:
    return log.header.get("losses") is not False


def _check_run(path: str | Path, log: Log, other_path: str | Path, other: Log) -> None:
    """InputError unless both are logs of one run, as far as their first headers tell."""
    one, two, told = log.header, other.header, f"{path} and {other_path} are not logs of one run: "
    for key in IDENTITY:
        if one.get(key) != two.get(key):
            raise InputError(f"{told}their {key} is {one.get(key)} and {two.get(key)}")
    if places(one["tensors"]) != places(two["tensors"]):
        raise InputError(f"{told}their tensors differ")
    if log.start == other.start:
        digests = {entry["name"]: entry["sha256"] for entry in two["tensors"]}
        for entry in one["tensors"]:
            if entry["sha256"] != digests[entry["name"]]:
                raise InputError(f"{told}{entry['name']} differs at step {log.start}")


def _first_difference(segments: list[Segment], other: Log) -> int | None:
    """The first step that `segments` and another log tell in two ways. None: there is none."""
    steps, losses = Steps(segments), _has_losses(other) and _has_losses(Log(segments, torn=0))
    for step in range(other.start, min(segments[-1].end, other.end)):
        left, right = steps[step - segments[0].start], other.steps[step - other.start]
        if _told(left, losses) != _told(right, losses):
            return step
    return None


def _told(step: Step, losses: bool) -> tuple[Any, ...]:
    """What is to be the same: bits (0 has a sign), but of a NaN not its payload."""
    seen = step.record
    numbers = [*seen.projected_grads, *step.lrs, *step.weight_decays, step.eps]
    numbers += [seen.loss] if losses else []
    return seen.cycles, step.written, [float(x).hex() for x in numbers]


def _before(segments: list[Segment], step: int) -> list[Segment]:
    """What the segments have before a step; of the first one, at least the header."""
    first = segments[0]
    kept = [s for s in segments if s is first or s.start < step]
    return [Segment(s.header, *(c[: step - s.start] for c in _columns(s))) for s in kept]


def _from(segment: Segment, step: int) -> Segment:
    """What the segment has from a step on, under a header that is not a file's first."""
    header, skipped = {key: segment.header[key] for key in _OF_A_SEGMENT}, step - segment.start
    if skipped <= 0:
        header |= {key: segment.header[key] for key in {"written"} & segment.header.keys()}
        return replace(segment, header=header)
    return Segment(header | {"start": step}, *(c[skipped:] for c in _columns(segment)))


def _columns(segment: Segment) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return segment.grads, segment.losses, segment.lrs
