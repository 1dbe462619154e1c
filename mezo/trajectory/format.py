"""The run log, format 1: a log in memory, and the bytes of its records.

    file    = segment, segment, ...
    segment = magic (8 bytes), length (u32), header (JSON), CRC-32 of the header (u32), records
    record  = projected_grad (f64) per probe, loss (f32), [lr (f64) per group], CRC-32 (u32)

The file is little-endian and append-only; plain MeZO takes 16 bytes per step. Records carry no tag:
the segment's header defines their layout, and a new segment begins where a setting changes (a
resumed run, another eps, a learning rate that starts to move). docs/trajectory.md is the
specification. compact.py has the other form of a log, a third as long, to which nothing can be
appended; files.py reads both.
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
from mezo.trajectory.header import DIGESTS, FORMAT, text_of

__all__ = ["COMPACT", "FORMAT", "MAGIC", "Log", "Segment", "Step", "Steps", "checksum", "encode"]
__all__ += ["frame", "layout"]
MAGIC, COMPACT = b"\x89MEZO\r\n\x1a", b"\x89MEZC\r\n\x1a"


@dataclass(frozen=True)
class Step:
    """One step of a run: what was measured, and the settings that were in force."""

    record: Record
    eps: float
    lrs: tuple[float, ...]  # one per parameter group
    weight_decays: tuple[float, ...]
    written: bool = False  # whether low-rank updates were written to the matrices just before it


@dataclass(frozen=True)
class Segment:
    """Successive records under one header, as columns."""

    header: dict[str, Any]  # complete in the first segment, only the settings in later ones
    grads: np.ndarray  # (steps, probes), float64
    losses: np.ndarray  # (steps,), float32; NaN if they were left out
    lrs: np.ndarray  # (steps, parameter groups), float64; (steps, 0) if the header has them

    @property
    def start(self) -> int:
        return self.header["start"]

    @property
    def end(self) -> int:
        return self.start + len(self.grads)

    @property
    def refused(self) -> int:
        """The number of steps that applied nothing, since a projected_grad was not finite."""
        return int((~np.isfinite(self.grads).all(1)).sum())

    def step(self, i: int) -> Step:
        """Return the i-th step of the segment, counted from 0."""
        header = self.header
        grads, cycles = tuple(self.grads[i].tolist()), tuple(header["cycles"])
        record = Record(self.start + i, grads, float(self.losses[i]), cycles)
        lrs = tuple(self.lrs[i].tolist()) or tuple(header["lr"])
        written = i == 0 and header.get("written", False)
        return Step(record, header["eps"], lrs, tuple(header["weight_decay"]), written)


class Steps(Sequence[Step]):
    """The steps of all segments, created on access, since a log may have millions."""

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
        i = range(len(self))[i]  # negative indices and IndexError work as for a list
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
    torn: int  # bytes of an unfinished record that a killed run left at the end
    compact: bool = False  # whether it was read from the compact form, which cannot be appended to
    ends: list[int] = field(default_factory=list)  # end of each record in bytes; empty if compact
    first_record: int = 0  # byte at which the first record begins; 0 if compact

    @property
    def header(self) -> dict[str, Any]:
        """The first segment's header: seed, distribution, tensors, config, versions."""
        return self.segments[0].header

    @property
    def start(self) -> int:
        """The number of the first step; above 0 if the run was resumed without its earlier log."""
        return self.segments[0].start

    @property
    def end(self) -> int:
        """One more than the number of the last step."""
        return self.segments[-1].end

    @property
    def digests(self) -> dict[int, str]:
        """The digests of the weights, by the step before which they were taken."""
        headers = (segment.header for segment in self.segments)
        return {header["start"]: header[DIGESTS] for header in headers if DIGESTS in header}

    @cached_property
    def steps(self) -> Steps:
        return Steps(self.segments)


def layout(settings: dict[str, Any]) -> np.dtype:
    """Return the dtype of a record under the header `settings`, including the checksum."""
    probes, groups = len(settings["cycles"]), len(settings["lr"]) * settings["lr_in_records"]
    columns = [("grads", "<f8", (probes,)), ("loss", "<f4"), ("lrs", "<f8", (groups,))]
    return np.dtype([*columns, ("crc", "<u4")])


def checksum(data: bytes, step: int) -> int:
    return zlib.crc32(step.to_bytes(8, "little") + data)


def frame(header: dict[str, Any]) -> bytes:
    """Return the bytes with which a segment begins: magic number, length, header and checksum.

    Raises Damage if JSON cannot hold the header.
    """
    text = text_of(header)
    return MAGIC + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text))


def encode(segments: Sequence[Segment]) -> bytes:
    """Return the bytes of the log file that consists of these segments."""
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
