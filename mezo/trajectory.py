"""The run log: a run is its seed and one scalar a step, and the file that holds them is the model.

    file    = segment, segment, ...
    segment = magic (8 bytes), length (u32), header (JSON), CRC-32 of the header (u32), records
    record  = projected_grad (f64) a probe, loss (f32), [lr (f64) a group], CRC-32 (u32)

Little-endian, append-only. 16 bytes a step for plain MeZO. Records have no tag: the segment's
header says how they look, and a new segment begins where a setting changes (a resumed run, another
eps, a learning rate that starts to move). docs/trajectory.md is the specification.
"""

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import noise
from .errors import InputError
from .mezo import MeZO, Record
from .perturbation import FORMS, walk
from .rounding import ROUNDINGS, update_
from .rules import sgd

try:
    import fcntl
except ImportError:  # Windows: two runs that write one log are not noticed there
    fcntl = None  # type: ignore[assignment]

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


def fingerprint(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of the elements' bytes, row-major, little-endian."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()[:16]


class Writer:
    """Appends a record for every step of `optimizer`. Close it, or use it in a `with`."""

    def __init__(self, optimizer: MeZO, path: str | Path, header: dict[str, Any] | None):
        self.optimizer = optimizer
        self._settings: dict[str, Any] = {"lr_in_records": False}
        self._file = open(path, "ab" if header is None else "wb", buffering=0)  # noqa: SIM115
        self._header = header  # written with the first segment; None: the file has it already
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise InputError(f"{path}: another run is writing this log") from None
        start = optimizer.param_groups[0]
        self._segment(start["step"], self._current([1] * start["num_samples"]))
        optimizer.observers.append(self)

    def _current(self, cycles: Sequence[int]) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        return {
            "eps": groups[0]["eps"],
            "cycles": list(cycles),
            "lr": [float(group["lr"]) for group in groups],
            "weight_decay": [group["weight_decay"] for group in groups],
            "lr_in_records": self._settings["lr_in_records"],
        }

    def _segment(self, start: int, settings: dict[str, Any]) -> None:
        header = (self._header or {}) | {"start": start} | settings
        text = json.dumps(header, separators=(",", ":")).encode()
        crc = zlib.crc32(text)
        self._file.write(MAGIC + struct.pack("<I", len(text)) + text + struct.pack("<I", crc))
        self._settings, self._header = settings, None

    def __call__(self, record: Record) -> None:
        settings = self._current(record.cycles)
        if settings["lr_in_records"]:
            self._settings["lr"] = settings["lr"]  # each record has its own: no change to announce
        elif settings["lr"] != self._settings["lr"]:
            settings["lr_in_records"] = True
        if settings != self._settings:
            self._segment(record.step, settings)
        values = [*record.projected_grads, record.loss]
        values += settings["lr"] if settings["lr_in_records"] else []
        data = _layout(settings).pack(*values)
        self._file.write(data + struct.pack("<I", _checksum(data, record.step)))

    def close(self) -> None:
        if self in self.optimizer.observers:
            self.optimizer.observers.remove(self)
        self._file.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _layout(settings: dict[str, Any]) -> struct.Struct:
    lrs = len(settings["lr"]) if settings["lr_in_records"] else 0
    return struct.Struct(f"<{len(settings['cycles'])}df{lrs}d")


def _checksum(data: bytes, step: int) -> int:
    return zlib.crc32(step.to_bytes(8, "little") + data)


def record(
    optimizer: MeZO,
    path: str | Path,
    *,
    model: torch.nn.Module | None = None,
    config: dict[str, Any] | None = None,
    resume: bool = False,
) -> Writer:
    """Log every step of `optimizer` from now on to `path`, until the writer is closed.

    Args:
        model: its frozen parameters' fingerprint goes into the log too (an adapter's base).
        config: anything JSON can hold that a reader of the log may want to know.
        resume: continue an existing log: records from the optimizer's step on are dropped.

    Without `resume` an existing file is replaced. Raises InputError if another process writes it,
    if it belongs to other tensors or another seed, or if it ends before the optimizer's step.
    """
    group, rows = optimizer.param_groups[0], optimizer.trained()
    if resume and Path(path).exists():
        _truncate(Path(path), group, [name for name, _, _ in rows])
        return Writer(optimizer, path, None)
    if group["step"]:
        raise InputError(f"{path}: no log to continue, and the run is at step {group['step']}")
    index = {id(g): i for i, g in enumerate(optimizer.param_groups)}
    tensors = [_entry(name, p) | {"group": index[id(g)]} for name, p, g in rows]
    header: dict[str, Any] = {"format": FORMAT, "noise": noise.CONTRACT, "seed": group["seed"]}
    header |= {"distribution": group["distribution"], "perturbation": optimizer.perturbation}
    header |= {"rounding": group["rounding"], "rule": "sgd"}
    header |= {"config": config or {}, "versions": {"torch": str(torch.__version__)}}
    header["frozen"] = None if model is None else _frozen(model, {name for name, _, _ in rows})
    return Writer(optimizer, path, header | {"tensors": tensors})


def _frozen(model: torch.nn.Module, trained: set[str]) -> str | None:
    """One fingerprint for all that is not trained: an adapter's base. None: nothing is frozen."""
    named = {noise.canonical_name(name): p for name, p in model.named_parameters()}
    digests = "".join(fingerprint(p) for name, p in named.items() if name not in trained)
    return hashlib.sha256(digests.encode()).hexdigest()[:16] if digests else None


def _entry(name: str, p: torch.Tensor) -> dict[str, Any]:
    dtype = str(p.dtype).removeprefix("torch.")
    return {"name": name, "shape": list(p.shape), "dtype": dtype, "sha256": fingerprint(p)}


def _truncate(path: Path, group: dict, names: list[str]) -> None:
    log = read(path)
    known = {entry["name"] for entry in log.header["tensors"]}
    if log.header["seed"] != group["seed"] or known != set(names):
        raise InputError(f"{path} is the log of another run (its seed or its tensors differ)")
    if len(log.steps) < group["step"]:
        raise InputError(
            f"{path} ends at step {len(log.steps)}, and the run to continue is at {group['step']}"
        )
    start = log.header["bytes"] if group["step"] == 0 else log.ends[group["step"] - 1]
    with open(path, "r+b") as file:
        file.truncate(start)


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
        layout, settings = _layout(self.settings), self.settings
        data = self.data[self.at : self.at + layout.size]
        crc = self.data[self.at + layout.size : self.at + layout.size + 4]
        if len(crc) < 4:
            return False
        step = len(self.steps)
        if struct.unpack("<I", crc) != (_checksum(data, step),):
            raise _Damage(f"a damaged record (step {step})")
        values, probes = layout.unpack(data), len(settings["cycles"])
        seen = Record(step, values[:probes], values[probes], tuple(settings["cycles"]))
        lrs = values[probes + 1 :] or tuple(settings["lr"])
        decays = tuple(settings["weight_decay"])
        self.steps.append(Step(seen, settings["eps"], lrs, decays))
        self.at += layout.size + 4
        self.ends.append(self.at)
        return True


def replay(
    path: str | Path,
    model: torch.nn.Module,
    *,
    until: int | None = None,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> torch.nn.Module:
    """Rebuild the trained weights in place: `model` is the base model, the result is the run's.

    Bitwise: the same additions in the same order, without data or forward passes, one tensor at a
    time. `until` stops after that many steps. `progress(done, total)` is told of each tensor.
    Raises InputError if a tensor is missing or (with `verify`) is not what the run started from,
    trained or frozen.
    """
    log = read(path)
    steps = log.steps[:until]
    named = {noise.canonical_name(name): p for name, p in model.named_parameters()}
    entries = log.header["tensors"]
    for entry in entries:
        _match(path, entry, named.get(entry["name"]), verify)
    expected = log.header["frozen"]
    if verify and expected and expected != _frozen(model, {entry["name"] for entry in entries}):
        raise InputError(
            f"{path}: the weights that the run kept frozen are not those of this model"
        )
    tables = {entry["group"]: _moves(log.header, steps, entry["group"]) for entry in entries}
    for done, entry in enumerate(entries, 1):
        _replay_tensor(named[entry["name"]], entry, log.header, tables[entry["group"]])
        if progress is not None:
            progress(done, len(entries))
    return model


def _match(path, entry: dict, tensor: torch.Tensor | None, verify: bool) -> None:
    if tensor is None:
        raise InputError(f"{path}: the base model has no parameter {entry['name']}")
    found = _entry(entry["name"], tensor) if verify else entry
    for what in ("shape", "dtype", "sha256"):
        if found[what] != entry[what]:
            raise InputError(
                f"{path} starts from another base model: {what} of {entry['name']} is "
                f"{found[what]}, the log has {entry[what]}"
            )


def _moves(header: dict, steps: list[Step], group: int) -> np.ndarray:
    """All that the run did to a weight of a parameter group, as one table of moves."""
    moves: list[noise.Move] = []
    walked = header["perturbation"] == "in_place"
    for step in steps:
        seen, grads = step.record, dict(enumerate(step.record.projected_grads))
        if walked:
            for probe, cycles in enumerate(seen.cycles):
                moves += walk(seen.step, probe, step.eps) * cycles
        if all(map(math.isfinite, grads.values())):
            settings = {"lr": step.lrs[group], "weight_decay": step.weight_decays[group]}
            moves += sgd(seen.step, grads, settings | {"rounding": header["rounding"]})
    return noise.table(moves)


def _replay_tensor(tensor: torch.Tensor, entry: dict, header: dict, moves: np.ndarray) -> None:
    """Step by step where a buffer lies between two steps, else in one pass."""
    key, state = noise.tensor_key(header["seed"], entry["name"]), dict[str, torch.Tensor]()
    ends = np.flatnonzero(np.diff(moves["step"].astype(np.int64))) + 1
    for part in np.split(moves, ends) if header["rounding"] == "compensated" else [moves]:
        update_(tensor, key, part, header["rounding"], header["distribution"], state)
