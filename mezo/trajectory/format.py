"""The run log, format 1: a log in memory, and the bytes of its records.

    file    = segment, segment, ...
    segment = magic (8 bytes), length (u32), header (JSON), CRC-32 of the header (u32), records
    record  = projected_grad (f64) a probe, loss (f32), [lr (f64) a group], CRC-32 (u32)

Little-endian, append-only. 16 bytes a step for plain MeZO. Records have no tag: the segment's
header says how they look, and a new segment begins where a setting changes (a resumed run, another
eps, a learning rate that starts to move). docs/trajectory.md is the specification. compact.py has
the other form of a log, a third as long, to which nothing can be appended; files.py reads both.
"""

import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, overload

import numpy as np

from mezo.record import Record
from mezo.trajectory.header import FORMAT, text_of

__all__ = ["COMPACT", "FORMAT", "MAGIC", "Log", "Segment", "Step", "Steps", "checksum", "encode"]
__all__ += ["frame", "layout"]
MAGIC, COMPACT = b"\x89MEZO\r\n\x1a", b"\x89MEZC\r\n\x1a"


@dataclass(frozen=True)
class Step:
    """One step of a run: what was measured, and the settings in force."""

    record: Record
    eps: float
    lrs: tuple[float, ...]  # one a parameter group
    weight_decays: tuple[float, ...]
    written: bool = False  # low-rank updates were written to the matrices before it


@dataclass(frozen=True)
class Segment:
    """Successive records under one header, as columns."""

    header: dict[str, Any]  # the whole one in the first segment; else the settings alone
    grads: np.ndarray  # (steps, probes), float64
    losses: np.ndarray  # (steps,), float32; NaN where they were left out
    lrs: np.ndarray  # (steps, parameter groups), float64; (steps, 0) where the header has them

    @property
    def start(self) -> int:
        return self.header["start"]

    @property
    def end(self) -> int:
        return self.start + len(self.grads)

    @property
    def refused(self) -> int:
        """The number of steps that applied nothing: a projected_grad was not finite."""
        return int((~np.isfinite(self.grads).all(1)).sum())

    def step(self, i: int) -> Step:
        """Its i-th step."""
        header = self.header
        grads, cycles = tuple(self.grads[i].tolist()), tuple(header["cycles"])
        seen = Record(self.start + i, grads, float(self.losses[i]), cycles)
        lrs = tuple(self.lrs[i].tolist()) or tuple(header["lr"])
        written = i == 0 and header.get("written", False)
        return Step(seen, header["eps"], lrs, tuple(header["weight_decay"]), written)


class Steps(Sequence[Step]):
    """The steps of all segments, each made when it is asked for: a log may have millions."""

    def __init__(self, segments: Sequence[Segment]):
        self._segments = segments
        self._ends = list(accumulate(len(segment.grads) for segment in segments))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, i: int) -> Step: ...

    @overload
    def __getitem__(self, i: slice) -> list[Step]: ...

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]  # an IndexError or a negative index, as of a list
        segment = self._segments[bisect_right(self._ends, i)]
        return segment.step(self._segments[0].start + i - segment.start)

    def __iter__(self) -> Iterator[Step]:
        for segment in self._segments:
            for i in range(len(segment.grads)):
                yield segment.step(i)


@dataclass(frozen=True)
class Log:
    """A log in memory. Steps are counted from `start`: steps[0] is step number `start`."""

    segments: list[Segment]
    torn: int  # bytes of an unfinished record at the end, as a killed run leaves them
    compact: bool = False  # it is complete: nothing can be appended to the file
    ends: list[int] = field(default_factory=list)  # byte where each record ends; not of a compact
    first_record: int = 0  # byte where the first record begins; not of a compact log

    @property
    def header(self) -> dict[str, Any]:
        """The first segment's: seed, distribution, tensors, config, versions."""
        return self.segments[0].header

    @property
    def start(self) -> int:
        """The number of the first step; not 0 in the log of a run that was resumed without one."""
        return self.segments[0].start

    @property
    def end(self) -> int:
        """The number of the step after the last."""
        return self.segments[-1].end

    @cached_property
    def steps(self) -> Steps:
        return Steps(self.segments)


def layout(settings: dict[str, Any]) -> np.dtype:
    """A record as the header `settings` describes it, the checksum included."""
    probes, groups = len(settings["cycles"]), len(settings["lr"]) * settings["lr_in_records"]
    columns = [("grads", "<f8", (probes,)), ("loss", "<f4"), ("lrs", "<f8", (groups,))]
    return np.dtype([*columns, ("crc", "<u4")])


def checksum(data: bytes, step: int) -> int:
    return zlib.crc32(step.to_bytes(8, "little") + data)


def frame(header: dict[str, Any]) -> bytes:
    """A segment's first bytes. Raises Damage for what JSON or a header cannot hold."""
    text = text_of(header)
    return MAGIC + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text))


def encode(segments: Sequence[Segment]) -> bytes:
    """A log's file, from its segments."""
    parts = []
    for segment in segments:
        parts.append(frame(segment.header))
        rows = np.empty(len(segment.grads), layout(segment.header))
        rows["grads"], rows["loss"], rows["lrs"] = segment.grads, segment.losses, segment.lrs
        data, size = rows.tobytes(), rows.itemsize
        for i in range(len(rows)):
            record = data[i * size : (i + 1) * size - 4]
            parts += [record, struct.pack("<I", checksum(record, segment.start + i))]
    return b"".join(parts)
