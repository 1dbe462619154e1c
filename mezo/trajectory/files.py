"""Run logs as files: reading either form, writing a new file, and making a log compact."""

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mezo import noise
from mezo.errors import InputError
from mezo.foreign import check_file
from mezo.trajectory import columns
from mezo.trajectory.compact import decode, encode, without_losses
from mezo.trajectory.format import COMPACT, MAGIC, Log, Segment, checksum, layout
from mezo.trajectory.header import Damage, check, check_version, parse

MAX_HEADER = 2**26  # bytes


def read(path: str | Path, *, recover: bool = False) -> Log:
    """Read and check a whole log, in either form. Nothing in it is executed.

    An unfinished record at the very end is what a killed run leaves: it is left out and counted in
    `Log.torn`.

    Args:
        recover: keep everything before the first damaged byte instead of refusing the file. Of a
            damaged compact log nothing can be kept.

    Raises InputError, with the position, for a file that is no log, is damaged, or was written by a
    newer version.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(len(MAGIC))  # before the rest, which may be endless
            data = magic + (file.read() if magic in (MAGIC, COMPACT) else b"")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if magic == COMPACT:
        try:
            return decode(data)
        except (Damage, InputError) as error:
            raise InputError(f"{path}: {error}") from None
    if magic != MAGIC:
        raise InputError(f"{path} is not a MeZO run log")
    reader = _Reader(data)
    try:
        torn = reader.run()
    except Damage as damage:
        if not recover or not reader.segments:
            intact = f"; the {len(reader.ends)} steps before it are intact"
            raise InputError(f"{path}: {damage} at byte {reader.at}{intact}") from None
        torn = len(data) - reader.at
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not reader.segments:
        raise InputError(f"{path}: the header is cut off; nothing can be read")
    return Log(reader.columns(), torn, ends=reader.ends, first_record=reader.segments[0][1])


def save(path: str | Path, data: bytes) -> None:
    """Write `data` to a new file. Raises InputError, and leaves no file, if it exists or is full.

    A file that exists is never overwritten.
    """
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        raise InputError(f"{path} exists: a log is not overwritten") from None
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        raise InputError(f"{path}: {error.strerror}") from None


def begun(path: str | Path) -> bool:
    """Return whether there is a log at `path` with a whole header at its beginning.

    A run that is killed while its log begins leaves an empty file, or the first bytes of a header:
    there is no step in it, and it may be replaced. Every other file counts as a log, damaged ones
    and those of another kind too, so that `read` says what is wrong with them.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(MAGIC) + 4)
            if start.startswith(COMPACT) or not MAGIC.startswith(start[: len(MAGIC)]):
                return True
            if len(start) < len(MAGIC) + 4:
                return False
            (length,) = struct.unpack_from("<I", start, len(MAGIC))
            text = file.read(min(length, MAX_HEADER) + 4)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        _check_cut(text, length)
    except Damage:
        return True
    return len(text) == length + 4 or length > MAX_HEADER


def compact(path: str | Path, out: str | Path, *, losses: bool = True) -> None:
    """Write the log at `path` to a new file in compact form, from which the same log is read.

    The two agree bit for bit, except that an unfinished record at the end is dropped.

    Args:
        losses: False leaves the losses out, which are half of the bytes. A replay is the same; the
            learning curve is lost.

    Raises InputError for a log that cannot be read or is too large, and if `out` exists or has no
    room.
    """
    segments = read(path).segments
    if not losses:
        segments = [replace(s, losses=without_losses(len(s.losses))) for s in segments]
        segments[0] = replace(segments[0], header=segments[0].header | {"losses": False})
    try:
        data = encode(segments, losses)
    except Damage as damage:
        raise InputError(f"{path} cannot be made compact: it has {damage}") from None
    if not _same(segments, decode(data).segments):
        raise RuntimeError(f"{path}: its compact form is not the same")
    save(out, data)


def _same(left: list[Segment], right: list[Segment]) -> bool:
    return [s.header for s in left] == [s.header for s in right] and all(
        np.array_equal(columns.bits(getattr(one, name)), columns.bits(getattr(other, name)))
        for one, other in zip(left, right, strict=True)
        for name in ("grads", "losses", "lrs")
    )


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.segments: list[tuple[dict[str, Any], int, int]] = []  # header, first byte, steps
        self.ends: list[int] = []
        self.step = 0  # the number of the next record's

    def run(self) -> int:
        """Reads to the end; returns the bytes that an unfinished segment or record leaves."""
        while self.at < len(self.data):
            if self.data.startswith(MAGIC, self.at):
                done = self.segment()
            elif MAGIC.startswith(self.data[self.at : self.at + len(MAGIC)]):
                done = False  # the first bytes of a magic
            else:
                done = self.records()
            if not done:
                return len(self.data) - self.at
        return 0

    def segment(self) -> bool:
        start = self.at + len(MAGIC)
        if len(self.data) < start + 4:
            return False
        (length,) = struct.unpack_from("<I", self.data, start)
        if length > MAX_HEADER:
            raise Damage(f"a header of {length} bytes")
        text = self.data[start + 4 : start + 4 + length]
        crc = self.data[start + 4 + length : start + 8 + length]
        if len(crc) < 4:
            _check_cut(text, length)
            return False
        if struct.unpack("<I", crc) != (zlib.crc32(text),):
            raise Damage("a damaged header")
        header, first = parse(text), self.segments[0][0] if self.segments else None
        if first is None:
            check_version(header)
        check(header, first)
        if first is not None and header["start"] != self.step:
            raise Damage(f"a segment that starts at step {header['start']}, not {self.step}")
        self.step, self.at = header["start"], start + 8 + length
        self.segments.append((header, self.at, 0))
        return True

    def records(self) -> bool:
        """All records up to the next segment, or to what is no whole record."""
        header, first, _ = self.segments[-1]
        size, steps = layout(header).itemsize, len(self.ends)
        try:
            while not self.data.startswith(MAGIC, self.at):
                data = self.data[self.at : self.at + size]
                if len(data) < size:
                    return len(data) == 0
                if self.step == noise.MAX_STEP:
                    raise Damage(f"a record of step {self.step}, which no run has")
                if struct.unpack("<I", data[-4:]) != (checksum(data[:-4], self.step),):
                    raise Damage(f"a damaged record (step {self.step})")
                self.at, self.step = self.at + size, self.step + 1
                self.ends.append(self.at)
        finally:
            self.segments[-1] = (header, first, len(self.ends) - steps)
        return True

    def columns(self) -> list[Segment]:
        found = []
        for header, first, steps in self.segments:
            rows = np.frombuffer(self.data, layout(header), steps, first)
            found.append(Segment(header, rows["grads"], rows["loss"], rows["lrs"]))
        return found


def _check_cut(text: bytes, length: int) -> None:
    """Damage if what the end of the file seems to cut off is whole, and its length is wrong."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.decode(errors="replace"))
    except (ValueError, RecursionError):
        return
    if end < length:
        raise Damage(f"a header of {end} bytes whose length is said to be {length}")
