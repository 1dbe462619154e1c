"""Run logs as files: reading either form, writing a new file, and making a log compact."""

import json
import os
import struct
import zlib
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, cast

import numpy as np

from mezo import noise
from mezo.errors import InputError
from mezo.foreign import check_file
from mezo.trajectory import columns
from mezo.trajectory.compact import decode, encode, without_losses
from mezo.trajectory.format import COMPACT, MAGIC, Log, Segment, checksum, layout
from mezo.trajectory.header import Damage, check, check_version, parse

try:
    import fcntl
except ImportError:  # Windows: two runs that write one log are not noticed there
    fcntl = None  # type: ignore[assignment]

MAX_HEADER = 2**26  # bytes


def read(path: str | Path, *, recover: bool = False) -> Log:
    """Read and check a whole log, in either form. Nothing in it is executed.

    A killed run can leave an unfinished record at the very end: it is dropped, and its bytes are
    counted in `Log.torn`.

    Args:
        recover: Keep everything before the first damaged byte instead of refusing the file. Nothing
            of a damaged compact log can be recovered.

    Raises InputError, with the position, if the file is not a log, is damaged, or was written by a
    newer version.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(len(MAGIC))  # check it first: another file could be endless
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
    """Write `data` to a new file; an existing file is never overwritten.

    Raises InputError if the file exists or cannot be written, and then leaves no partial file.
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
    """Return whether the file at `path` begins with the whole header of a log.

    A run that is killed while its log begins leaves an empty file, or the first bytes of a header.
    Such a file holds no step and may be replaced. Every other file counts as a log, even a damaged
    one or one of another kind, so that `read` says what is wrong with it.
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


def locked(path: str | Path) -> FileIO:
    """Open and lock the file for writing, with its contents unchanged; create it if necessary."""

    def create(name: str, flags: int) -> int:  # "wb" would empty another run's log before the lock
        return os.open(name, flags | os.O_CREAT, 0o666)

    try:
        file = open(path, "r+b", buffering=0, opener=create)  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"{path}: another run is writing this log") from None
        except OSError:  # a file system without locks
            pass
    return cast(FileIO, file)


def compact(path: str | Path, out: str | Path, *, losses: bool = True) -> None:
    """Write the log at `path` to a new file `out` in compact form.

    Both files hold the same log, bit for bit, except that an unfinished record at the end is
    dropped.

    Args:
        losses: Whether to keep the losses, which are half of the bytes. Without them a replay gives
            the same weights, but the learning curve is lost.

    Raises InputError if the log cannot be read or is too large, or if `out` exists or cannot be
    written.
    """
    segments = read(path).segments
    if not losses:
        segments = [replace(s, losses=without_losses(len(s.losses))) for s in segments]
        segments[0] = replace(segments[0], header=segments[0].header | {"losses": False})
    try:
        data = encode(segments, losses)
    except Damage as damage:
        raise InputError(f"{path} cannot be compacted: it has {damage}") from None
    if not _same(segments, decode(data).segments):
        raise RuntimeError(f"{path}: the compact form differs from the log")
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
        self.step = 0  # number of the step that the next record belongs to

    def run(self) -> int:
        """Read to the end, and return the number of bytes of an unfinished segment or record."""
        while self.at < len(self.data):
            if self.data.startswith(MAGIC, self.at):
                done = self.segment()
            elif MAGIC.startswith(self.data[self.at : self.at + len(MAGIC)]):
                done = False  # only the first bytes of a magic number are there
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
        """Read all records up to the next segment; return False at an unfinished record."""
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
        segments = []
        for header, first, steps in self.segments:
            rows = np.frombuffer(self.data, layout(header), steps, first)
            segments.append(Segment(header, rows["grads"], rows["loss"], rows["lrs"]))
        return segments


def _check_cut(text: bytes, length: int) -> None:
    """Raise Damage if a header that seems cut off is in fact whole, so that its length is wrong."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.decode(errors="replace"))
    except (ValueError, RecursionError):
        return
    if end < length:
        raise Damage(f"a header of {end} bytes whose length is said to be {length}")
