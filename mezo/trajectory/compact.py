"""The compact form of a log: the whole log in a third of the bytes; nothing can be appended to it.

    file = magic (8 bytes), bytes of the head (u32), bytes of its xz stream (u32), xz(head, JSON),
           an xz stream for each column, CRC-32 of all preceding bytes (u32)

The idea: projected_grad = (loss_plus - loss_minus) / (2 eps), and the difference of two float32
losses is k 2^-q for an integer k of some 20 bits. columns.py finds q; docs/trajectory.md is the
specification.
"""

import struct
import zlib
from typing import Any

import numpy as np

from mezo import noise
from mezo.errors import InputError
from mezo.trajectory import columns
from mezo.trajectory.format import COMPACT, Log, Segment, layout
from mezo.trajectory.header import (
    Damage,
    Keys,
    are,
    check,
    check_keys,
    check_version,
    is_count,
    parse,
    text_of,
)

VERSION = 1
MAX_HEAD = 2**24  # bytes of JSON
MAX_VALUES = 2**23  # numbers in the records of a log


def without_losses(steps: int) -> np.ndarray:
    """Return the losses of a log that was compacted without them: NaN, of shape (steps,)."""
    return np.full(steps, np.nan, "<f4")


def encode(segments: list[Segment], losses: bool) -> bytes:
    """Return the bytes of the compact log with these segments.

    With `losses=False` the losses are left out. Raises Damage if the log is too large for the form.
    """
    rows = []
    parts: dict[str, list[np.ndarray]] = {"grads": [], "exceptions": [], "lrs": [], "losses": []}
    for segment in segments:
        eps, grads = segment.header["eps"], segment.grads.reshape(-1)
        codes, exceptions, exponents = columns.codes_of_grads(grads, eps)
        rates, order = columns.codes_of_lrs(segment.lrs)
        row = {"header": segment.header, "steps": len(segment.grads)}
        rows.append(row | {"exponents": exponents, "order": order})
        encoded = codes, exceptions, rates, columns.bits(segment.losses)
        for name, part in zip(parts, encoded, strict=True):
            parts[name].append(part)
    if not losses:
        del parts["losses"]
    about, streams = {}, []
    for name, arrays in parts.items():
        values = np.concatenate(arrays)
        planes, stream = columns.planes_of(values)
        about[name] = {"values": len(values), "planes": planes, "bytes": len(stream)}
        streams.append(stream)
    text = text_of({"compact": VERSION, "segments": rows, "columns": about})
    if len(text) > MAX_HEAD or sum(column["values"] for column in about.values()) > MAX_VALUES:
        raise Damage(f"more than {MAX_VALUES} numbers in its records, or {MAX_HEAD} bytes beside")
    head = columns.packed(text)
    data = COMPACT + struct.pack("<II", len(text), len(head)) + head + b"".join(streams)
    return data + struct.pack("<I", zlib.crc32(data))


def decode(data: bytes) -> Log:
    """Return the log whose compact form is `data`.

    Raises Damage unless `data` is whole, and InputError if a newer version of mezo wrote it.
    """
    if len(data) < 20 or struct.unpack("<I", data[-4:]) != (zlib.crc32(data[:-4]),):
        raise Damage("damaged or cut off; a compact log can be read whole only")
    length, size = struct.unpack_from("<II", data, 8)
    if length > MAX_HEAD:
        raise Damage(f"a head of {length} bytes")
    head, at = parse(columns.unpacked(data[16 : 16 + size], length)), 16 + size
    check_keys(head, {"compact": _HEAD["compact"]})
    if head["compact"] != VERSION:
        raise InputError(f"this log is compact, version {head['compact']}: upgrade mezo-lm")
    check_keys(head, _HEAD)
    values: dict[str, np.ndarray] = {}
    for name, due in _values_due(head["segments"]).items():
        column = head["columns"].get(name)
        if column is None and name == "losses":
            continue
        check_keys({name: column}, {name: (_is_column, "a column")})
        number, stream = column["values"], data[at : at + column["bytes"]]
        if number > due or (number < due and name != "exceptions"):
            raise Damage(f"{number} {name}, where {due} are due")
        values[name], at = columns.values_of(stream, number, column["planes"]), at + len(stream)
    if at != len(data) - 4:
        raise Damage("columns that do not end where the file does")
    return Log(_segments(head["segments"], values), 0, compact=True)


def _values_due(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Return the number of values that each column must have; for exceptions, the largest number.

    Raises Damage if the rows of the head contradict each other.
    """
    first, end = None, 0
    for row in rows:
        check_keys(row, _ROW)
        header = row["header"]
        if first is None:
            check_version(header)
        check(header, first)
        if first is not None and header["start"] != end:
            raise Damage(f"a segment that starts at step {header['start']}, not {end}")
        if len(row["exponents"]) != -(-row["steps"] * len(header["cycles"]) // columns.BLOCK):
            raise Damage(f"{len(row['exponents'])} exponents for {row['steps']} steps")
        first, end = first or header, header["start"] + row["steps"]
    grads, losses, lrs = (sum(sizes) for sizes in zip(*map(_sizes, rows), strict=True))
    if grads + losses + lrs > MAX_VALUES or end > noise.MAX_STEP:
        raise Damage(f"more than {MAX_VALUES} numbers in its records")
    return {"grads": grads, "exceptions": grads, "lrs": lrs, "losses": losses}


def _sizes(row: dict[str, Any]) -> tuple[int, int, int]:
    """Return how many projected gradients, losses and learning rates a segment holds."""
    steps, form = row["steps"], layout(row["header"])
    return steps * form["grads"].shape[0], steps, steps * form["lrs"].shape[0]


def _segments(rows: list[dict[str, Any]], values: dict[str, np.ndarray]) -> list[Segment]:
    exceptions, segments = values["exceptions"], []
    if np.count_nonzero(values["grads"] == 0) != len(exceptions):
        raise Damage("exceptions that are not as many as the codes for them")
    at = np.zeros(3, int)  # position in each column
    for row in rows:
        header, steps, sizes = row["header"], row["steps"], np.array(_sizes(row))
        grads, losses, lrs = map(slice, at, at + sizes)
        codes, at = values["grads"][grads], at + sizes
        bits = columns.bits(columns.grads_of_codes(codes, row["exponents"], header["eps"]))
        number = np.count_nonzero(codes == 0)
        bits[codes == 0], exceptions = exceptions[:number], exceptions[number:]
        segments.append(
            Segment(
                header,
                bits.view("<f8").reshape(steps, len(header["cycles"])),
                values["losses"][losses].astype("<u4").view("<f4")
                if "losses" in values
                else without_losses(steps),
                columns.lrs_of_codes(values["lrs"][lrs], row["order"], steps),
            )
        )
    return segments


def _is_column(value: Any) -> bool:
    limits = (("values", MAX_VALUES + 1), ("planes", 9), ("bytes", 2**32))
    return isinstance(value, dict) and all(is_count(value.get(key), n) for key, n in limits)


_HEAD: Keys = {
    "compact": (lambda x: type(x) is int, "a version"),
    "segments": (are(lambda x: isinstance(x, dict), 1), "a list of objects"),
    "columns": (lambda x: isinstance(x, dict), "an object"),
}
_ROW: Keys = {
    "header": (lambda x: isinstance(x, dict), "an object"),
    "steps": (lambda x: is_count(x, MAX_VALUES + 1), "a number of steps"),
    "exponents": (are(lambda x: type(x) is int and x in columns.EXPONENTS), "a list of exponents"),
    "order": (lambda x: type(x) is int and x in columns.ORDERS, "an order of differences"),
}
