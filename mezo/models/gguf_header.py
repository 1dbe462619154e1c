"""The header of a GGUF file: what it holds, read with every length checked.

    "GGUF" | version (u32) | tensors, values (u64) | values by key | table of tensors | data

All numbers are little-endian. The readers of `gguf` and transformers trust the lengths in a file
and end in many ways where one is wrong; this reader goes first, so that a file that is cut off, or
is none, is refused in one line. It needs neither of the two packages.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezo.errors import InputError

_VERSIONS = (2, 3)
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct's codes, by type
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8  # ggml has four


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file: its shape in torch's order, ggml's number of its block type."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int  # byte of the file

    @property
    def numel(self) -> int:
        """Return the number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says of itself.

    `values` has its numbers, truth values and texts by key; of an array it has the length alone.
    """

    path: Path
    values: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]
    size: int  # bytes of the whole file

    @property
    def architecture(self) -> str:
        """Return llama.cpp's name of the architecture."""
        return str(self.values["general.architecture"])


class _Torn(Exception):
    """The file ends, or makes no sense, at this byte."""


class _Cursor:
    """A place in the bytes of a file, which moves behind what was read."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple:
        if count * struct.calcsize(f"<{code}") > len(self.data) - self.at:
            raise _Torn
        found = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{code}")
        return found

    def skip(self, length: int) -> int:
        """Move behind so many bytes, and return where they began."""
        start = self.at
        if length > len(self.data) - start:
            raise _Torn
        self.at += length
        return start

    def text(self) -> str:
        length = self.number("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self) -> Any:
        kind = self.number("I")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise _Torn
        of, count = self.number("I"), self.number("Q")
        if of in _NUMBERS:
            self.skip(count * struct.calcsize(f"<{_NUMBERS[of]}"))
        elif of == _TEXT:
            for _ in range(count):  # each has a length of its own; the file's end ends it
                self.skip(self.number("Q"))
        else:
            raise _Torn
        return count


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file.

    Raises InputError for anything that is not a regular file, is no GGUF file of version 2 or 3, is
    one of several parts, or ends within its header.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a regular file, as a GGUF file must be")
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} is no GGUF file: it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parsed(path, _Cursor(data))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _parsed(path: Path, cursor: _Cursor) -> GGUFHeader:
    try:
        cursor.skip(4)
        version = cursor.number("I")
        if version not in _VERSIONS:
            raise InputError(f"{path} has GGUF version {version}; versions 2 and 3 can be read")
        count, keys = cursor.numbers("Q", 2)
        values = {}
        for _ in range(keys):
            key = cursor.text()
            values[key] = cursor.value()
        table = [_row(cursor) for _ in range(count)]
    except _Torn:
        raise InputError(
            f"{path} is cut off or damaged: its header makes no sense at byte {cursor.at} of "
            f"{len(cursor.data)}"
        ) from None
    _check_values(path, values)
    step = values.get("general.alignment", 32)
    begin = -(-cursor.at // step) * step
    tensors = tuple(GGUFTensor(name, shape, kind, begin + at) for name, shape, kind, at in table)
    return GGUFHeader(path, values, tensors, len(cursor.data))


def _row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return the name, shape, block type and offset that the next row of the table has."""
    name, dimensions = cursor.text(), cursor.number("I")
    if dimensions > _MOST_DIMENSIONS:
        raise _Torn
    if not name.isprintable():
        raise _Torn
    shape = cursor.numbers("Q", dimensions)[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _check_values(path: Path, values: dict[str, Any]) -> None:
    name = values.get("general.architecture")
    if not isinstance(name, str) or not name.isprintable():
        raise InputError(f"{path} does not name its architecture (general.architecture)")
    step = values.get("general.alignment", 32)
    if type(step) is not int or step < 1:
        raise InputError(f"{path}: its general.alignment cannot be {step!r:.40}")
    parts = values.get("split.count", 1)
    if type(parts) is int and parts > 1:
        raise InputError(
            f"{path} is one of {parts} parts of a model: join them with llama-gguf-split --merge"
        )
