"""Writing a run log: one record a step, appended before the step is over."""

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import noise
from ..errors import InputError
from ..mezo import MeZO, Record
from .format import FORMAT, MAGIC, checksum, layout, read

try:
    import fcntl
except ImportError:  # Windows: two runs that write one log are not noticed there
    fcntl = None  # type: ignore[assignment]


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
        data = layout(settings).pack(*values)
        self._file.write(data + struct.pack("<I", checksum(data, record.step)))

    def close(self) -> None:
        if self in self.optimizer.observers:
            self.optimizer.observers.remove(self)
        self._file.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


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
    tensors = [entry_of(name, p) | {"group": index[id(g)]} for name, p, g in rows]
    header: dict[str, Any] = {"format": FORMAT, "noise": noise.CONTRACT, "seed": group["seed"]}
    header |= {"distribution": group["distribution"], "perturbation": optimizer.perturbation}
    header |= {"rounding": group["rounding"], "rule": "sgd"}
    header |= {"config": config or {}, "versions": {"torch": str(torch.__version__)}}
    header["frozen"] = (
        None if model is None else frozen_fingerprint(model, {name for name, _, _ in rows})
    )
    return Writer(optimizer, path, header | {"tensors": tensors})


def frozen_fingerprint(model: torch.nn.Module, trained: set[str]) -> str | None:
    """One fingerprint for all that is not trained: an adapter's base. None: nothing is frozen."""
    named = {noise.canonical_name(name): p for name, p in model.named_parameters()}
    digests = "".join(fingerprint(p) for name, p in named.items() if name not in trained)
    return hashlib.sha256(digests.encode()).hexdigest()[:16] if digests else None


def entry_of(name: str, p: torch.Tensor) -> dict[str, Any]:
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
