"""The run log, format 1, and its reader.

    file    = segment, segment, ...
    segment = magic (8 bytes), length (u32), header (JSON), CRC-32 of the header (u32), records
    record  = projected_grad (f64) a probe, loss (f32), [lr (f64) a group], CRC-32 (u32)

Little-endian, append-only. 16 bytes a step for plain MeZO. Records have no tag: the segment's
header says how they look, and a new segment begins where a setting changes (a resumed run, another
eps, a learning rate that starts to move). docs/trajectory.md is the specification.
"""

import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import noise
from ..errors import InputError
from ..mezo import Record
from ..perturbation import FORMS
from ..rounding import ROUNDINGS

FORMAT = 1
MAGIC = b"\x89MEZO\r\n\x1a"
MAX_HEADER = 2**26
_KNOWN = {"perturbation": FORMS, "rounding": ROUNDINGS, "rule": ("sgd",)}


@dataclass(frozen=True)
class Step:
    """One step of a run: what was measured, and the settings in force."""

    record: Record
    eps: float
    lrs: tuple[float, ...]  # one a parameter group
    weight_decays: tuple[float, ...]


@dataclass(frozen=True)
class Log:
    header: dict[str, Any]  # the first segment's: seed, distribution, tensors, config, versions
    steps: list[Step]
    ends: list[int]  # byte at which each step's record ends
    torn: int  # bytes of an unfinished record at the end, as a killed run leaves them


def layout(settings: dict[str, Any]) -> struct.Struct:
    lrs = len(settings["lr"]) if settings["lr_in_records"] else 0
    return struct.Struct(f"<{len(settings['cycles'])}df{lrs}d")


def checksum(data: bytes, step: int) -> int:
    return zlib.crc32(step.to_bytes(8, "little") + data)


def read(path: str | Path, *, recover: bool = False) -> Log:
    """Read and check a whole log. `recover` keeps what stands before the first damaged byte.

    An unfinished record at the very end is what a killed run leaves: it is left out and counted.
    Raises InputError, with the place, for a file that is no log, is damaged, or is too new.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not data.startswith(MAGIC):
        raise InputError(f"{path} is not a MeZO run log")
    reader = _Reader(data)
    try:
        torn = reader.run()
    except _Damage as damage:
        if not recover or reader.header is None:
            raise InputError(
                f"{path}: {damage} at byte {reader.at}; the {len(reader.steps)} steps before it "
                "are intact"
            ) from None
        torn = len(data) - reader.at
    if reader.header is None:
        raise InputError(f"{path}: the header is cut off; nothing can be read")
    return Log(reader.header, reader.steps, reader.ends, torn)


class _Damage(Exception):
    pass


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.header: dict[str, Any] | None = None
        self.settings: dict[str, Any] = {}
        self.steps: list[Step] = []
        self.ends: list[int] = []

    def run(self) -> int:
        """Reads to the end; returns the bytes that an unfinished segment or record leaves."""
        while self.at < len(self.data):
            if self.data.startswith(MAGIC, self.at):
                done = self.segment()
            elif MAGIC.startswith(self.data[self.at :]):
                done = False  # the first bytes of a magic
            else:
                done = self.record()
            if not done:
                return len(self.data) - self.at
        return 0

    def segment(self) -> bool:
        start = self.at + len(MAGIC)
        if len(self.data) < start + 4:
            return False
        (length,) = struct.unpack_from("<I", self.data, start)
        if length > MAX_HEADER:
            raise _Damage(f"a header of {length} bytes")
        text = self.data[start + 4 : start + 4 + length]
        crc = self.data[start + 4 + length : start + 8 + length]
        if len(crc) < 4:
            return False
        if struct.unpack("<I", crc) != (zlib.crc32(text),):
            raise _Damage("a damaged header")
        header = json.loads(text)
        if self.header is None:
            if header.get("format") != FORMAT or header.get("noise") != noise.CONTRACT:
                raise InputError(
                    f"this log has format {header.get('format')} and noise contract "
                    f"{header.get('noise')}; this version of mezo reads {FORMAT} and "
                    f"{noise.CONTRACT}: upgrade mezo-lm"
                )
            for key, known in _KNOWN.items():
                if header[key] not in known:
                    raise InputError(f"this log has {key} {header[key]!r}: upgrade mezo-lm")
            self.header = header | {"bytes": start + 8 + length}
        if header["start"] != len(self.steps):
            raise _Damage(f"a segment that starts at step {header['start']}")
        self.settings, self.at = header, start + 8 + length
        return True

    def record(self) -> bool:
        form, settings = layout(self.settings), self.settings
        data = self.data[self.at : self.at + form.size]
        crc = self.data[self.at + form.size : self.at + form.size + 4]
        if len(crc) < 4:
            return False
        step = len(self.steps)
        if struct.unpack("<I", crc) != (checksum(data, step),):
            raise _Damage(f"a damaged record (step {step})")
        values, probes = form.unpack(data), len(settings["cycles"])
        seen = Record(step, values[:probes], values[probes], tuple(settings["cycles"]))
        lrs = values[probes + 1 :] or tuple(settings["lr"])
        decays = tuple(settings["weight_decay"])
        self.steps.append(Step(seen, settings["eps"], lrs, decays))
        self.at += form.size + 4
        self.ends.append(self.at)
        return True
