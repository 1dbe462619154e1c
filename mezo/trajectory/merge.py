"""Join the logs of one run, each of which covers a range of its steps."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mezo.errors import InputError
from mezo.trajectory.files import read, save
from mezo.trajectory.format import Log, Segment, Step, Steps, encode
from mezo.trajectory.header import DIGESTS, IDENTITY, Damage, places
from mezo.trajectory.resume import resumable

_OF_A_SEGMENT = ("start", "eps", "lr", "weight_decay", "cycles", "lr_in_records")


def merge(paths: Sequence[str | Path], out: str | Path) -> None:
    """Write one log, with all the steps that the logs of one run hold, to a new file.

    The logs may overlap where they agree. Refused steps at the end of one log, such as an
    interrupted step, are replaced by another log's records of the same steps. `out` is in the long
    form, which can be appended to, even if the logs are compact; `paths` may be a single log.

    Raises InputError, naming file and step, if steps between two logs are missing, if two logs
    disagree about a step, if the logs are not of one run, if one cannot be read, or if `out` exists
    or cannot be written.
    """
    logs = [(path, read(path)) for path in paths]
    if not logs:
        raise InputError("there is no log to merge")
    frozen = {log.header["frozen"] for _, log in logs} - {None}
    if len(frozen) > 1:
        names = ", ".join(str(path) for path, _ in logs)
        raise InputError(f"{names} are not logs of one run: their frozen weights differ")
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
            more = [s for s in other.segments if s.end > end or s.start > end]
            segments += [_from(s, end) for s in more]
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
    """Raise InputError unless both logs are of one run, as far as their first headers show."""
    left, right = log.header, other.header
    problem = f"{path} and {other_path} are not logs of one run: "
    for key in IDENTITY:
        if left.get(key) != right.get(key):
            raise InputError(f"{problem}their {key} is {left.get(key)} and {right.get(key)}")
    if places(left["tensors"]) != places(right["tensors"]):
        raise InputError(f"{problem}their tensors differ")
    if log.start == other.start:
        digests = {entry["name"]: entry["sha256"] for entry in right["tensors"]}
        for entry in left["tensors"]:
            if entry["sha256"] != digests[entry["name"]]:
                raise InputError(f"{problem}{entry['name']} differs at step {log.start}")


def _first_difference(segments: list[Segment], other: Log) -> int | None:
    """Return the first step whose records differ between `segments` and `other`, or None."""
    steps, losses = Steps(segments), _has_losses(other) and _has_losses(Log(segments, torn=0))
    for step in range(other.start, min(segments[-1].end, other.end)):
        left, right = steps[step - segments[0].start], other.steps[step - other.start]
        if _comparable(left, losses) != _comparable(right, losses):
            return step
    return None


def _comparable(step: Step, losses: bool) -> tuple[Any, ...]:
    """Return what must agree: the bits of all numbers (0 has a sign), but not a NaN's payload."""
    record = step.record
    numbers = [*record.projected_grads, *step.lrs, *step.weight_decays, step.eps]
    numbers += [record.loss] if losses else []
    return record.cycles, step.written, [float(x).hex() for x in numbers]


def _before(segments: list[Segment], step: int) -> list[Segment]:
    """Return the segments up to a step, exclusive; the first keeps its header even if empty."""
    first = segments[0]
    kept = [s for s in segments if s is first or s.start < step]
    return [Segment(s.header, *(c[: step - s.start] for c in _columns(s))) for s in kept]


def _from(segment: Segment, step: int) -> Segment:
    """Return the segment from a step on, under the short header of a file's later segments."""
    header, skipped = {key: segment.header[key] for key in _OF_A_SEGMENT}, step - segment.start
    if skipped <= 0:
        header |= {key: segment.header[key] for key in {"written", DIGESTS} & segment.header.keys()}
        return replace(segment, header=header)
    return Segment(header | {"start": step}, *(c[skipped:] for c in _columns(segment)))


def _columns(segment: Segment) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return segment.grads, segment.losses, segment.lrs
