"""Write a run log: one record per step, appended before the step ends."""

import hashlib
import logging
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mezo import noise, rules
from mezo.compatibility import unpacked
from mezo.errors import InputError
from mezo.layers import PLAIN, scales_of
from mezo.mezo import MeZO
from mezo.noise.sharded import is_sharded
from mezo.options.option import Logged
from mezo.options.table import ESTIMATORS, OPTIONS
from mezo.record import Record
from mezo.trajectory import start_values
from mezo.trajectory.files import begun, locked, read
from mezo.trajectory.format import FORMAT, checksum, frame
from mezo.trajectory.header import IDENTITY, Damage, check, places


def fingerprint(tensor: torch.Tensor) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the elements' bytes, row-major, little-endian.

    For a DTensor they are those of the whole tensor, and every process with a shard must call this.
    """
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    data = whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()[:16]


class Writer:
    """Appends a record for every step of `optimizer`. Close it, or use it in a `with` statement.

    If a record cannot be written, for example on a full disk, the step raises InputError after its
    update. The weights are then one step beyond the log, which ends with a whole record. The
    missing record is kept in memory and written before the next one or on closing.
    """

    def __init__(
        self, optimizer: MeZO, path: str | Path, file: FileIO, end: int, header: dict[str, Any]
    ):
        """Called by `record`, which has checked that `file` is locked and intact up to byte `end`.

        `header` holds what only a file's first segment has; it is empty if the file has a segment.
        """
        self.optimizer, self.path, self._file = optimizer, path, file
        self._end = end  # all before it is in the file, and whole
        self._pending = b""  # segments and records that follow it
        self._groups = len(optimizer.param_groups)
        self._settings: dict[str, Any] = {"lr_in_records": False}
        first = optimizer.param_groups[0]
        self._step = first["step"]  # of the next record
        self._logged = self._step  # the file has the records before it
        self._first = self._step if header else 0
        self._written = -1  # the last step before which matrices are said to be written
        settings = self._current([1] * first["num_samples"])
        data = self._segment(header, settings)  # nothing was changed up to here
        try:
            file.truncate(end)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        self._put(data, settings, self._step)
        self._constants = _constants(optimizer)
        self._trained = optimizer.trained()
        constant = [option.name for option in OPTIONS if option.constant]
        self._known = {name: optimizer.settings[name] for name in constant}
        self._versions, self._told = _versions(optimizer), False
        optimizer.observers.append(self)
        optimizer.guards.append(self._check_constants)

    def _current(self, cycles: Sequence[int]) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        return {
            "eps": float(groups[0]["eps"]),
            "cycles": list(cycles),
            "lr": [float(group["lr"]) for group in groups],
            "weight_decay": [float(group["weight_decay"]) for group in groups],
            "lr_in_records": self._settings["lr_in_records"],
        }

    def _segment(self, header: dict[str, Any], settings: dict[str, Any]) -> bytes:
        whole = header | {"start": self._step} | settings
        if self.optimizer.memory.written == self._step:  # MeZO.write was called
            whole["written"], self._written = True, self._step
        try:
            check(whole, None if header else {"lr": [0.0] * self._groups})
            return frame(whole)
        except Damage as damage:
            raise InputError(f"{self.path}: the log cannot have {damage}") from None

    def _check_constants(self) -> None:
        """Raise InputError, before a step, if a setting that must be constant has changed."""
        self._check_writes()
        settings = self.optimizer.settings
        same = all(settings[key] == value for key, value in self._known.items())
        if same and self.optimizer.trained() is self._trained:
            return
        here = _constants(self.optimizer)
        for key in {**self._constants, **here}:
            if self._constants.get(key) != here.get(key):
                before, now = self._constants.get(key, "frozen"), here.get(key, "frozen")
                raise InputError(
                    f"{self.path}: {key} was {before} when the log began, and is now {now}: the "
                    "log would not replay; change it back, or begin another log from these weights"
                )
        self._trained = self.optimizer.trained()

    def _check_writes(self) -> None:
        """Warn, once, if something else has written to a trained weight since the last step.

        torch counts what writes to a tensor. It does not count writes through `.data`, but for the
        assignment of another tensor, nor those of numpy; and values may have been put back.
        """
        if self._told or self.optimizer.memory.written == self._step:
            return
        here = _versions(self.optimizer)
        odd = [name for name, seen in self._versions.items() if here.get(name, seen) != seen]
        if odd:
            self._told = True
            logging.getLogger("mezo").warning(
                "%s: something besides the optimizer wrote to %s before step %d (weight clipping, "
                "an average, load_state_dict, a callback): unless the values are those of before, "
                "the log replays to other weights; begin another log after such a change",
                *(self.path, odd[0], self._step),
            )

    def __call__(self, record: Record) -> None:
        if record.step != self._step:  # an interrupt came between an update and its record
            raise InputError(
                f"{self.path}: the record of step {self._step} is missing, step {record.step} "
                "cannot follow: resume from a checkpoint"
            )
        settings, before = self._current(record.cycles), self._settings
        settings["lr_in_records"] |= settings["lr"] != before["lr"]
        moving = settings["lr_in_records"]  # each record has its own: no change to announce
        same = settings | {"lr": before["lr"]} if moving else settings
        written = self.optimizer.memory.written == record.step != self._written
        data = b"" if same == before and not written else self._segment({}, settings)
        with np.errstate(over="ignore"):  # a float64 model's loss may be infinite in float32
            values = [*record.projected_grads, float(np.float32(record.loss))]
        lrs = settings["lr"] if moving else []
        row = struct.pack(f"<{len(values) - 1}df{len(lrs)}d", *values, *lrs)
        data += row + struct.pack("<I", checksum(row, record.step))
        self._put(data, settings, record.step + 1)
        self._versions = {} if self._told else _versions(self.optimizer)

    def _put(self, data: bytes, settings: dict[str, Any], step: int) -> None:
        self._pending += data
        self._settings, self._step = settings, step
        self._check_place()
        try:
            self._flush()
        except OSError as error:
            with suppress(OSError):  # no part of a record stays behind
                self._file.truncate(self._end)
            ends = self._logged > self._first
            told = f"the log ends with step {self._logged - 1}" if ends else "the log has no step"
            told += f", the weights are those after step {step - 1}" if step > self._logged else ""
            raise InputError(
                f"{self.path}: {error.strerror}: make room, and resume the run; {told}"
            ) from None

    def _check_place(self) -> None:
        """Raise InputError if the file is no longer the one at its path, or has become shorter.

        Writes to a deleted file are lost without any other notice.
        """
        if not self._end:  # it begins
            return
        here = os.fstat(self._file.fileno())
        try:
            there: os.stat_result | None = os.stat(self.path)
        except OSError:
            there = None
        if there is None:
            what = "deleted or moved"
        elif not os.path.samestat(here, there):
            what = "replaced by another file"
        elif here.st_size < self._end:
            what = f"cut off at byte {here.st_size} of {self._end}"
        else:
            return
        raise InputError(
            f"{self.path}: the log was {what} while the run wrote it; the weights are those after "
            f"step {self._step - 1}: put the log back and resume the run, or resume from a "
            "checkpoint"
        )

    def _flush(self) -> None:
        """Write what is pending; what an interrupt cut off is written again, to the same place."""
        data, end = memoryview(self._pending), self._end + len(self._pending)
        self._file.seek(self._end)
        while data:  # the system may take a part of it
            data = data[self._file.write(data) :]
        self._end, self._pending, self._logged = end, b"", self._step

    def close(self) -> None:
        if self in self.optimizer.observers:
            with suppress(InputError):  # no room for the record: whoever took the step is told
                self.optimizer.give_up()
            self.optimizer.observers.remove(self)
            self.optimizer.guards.remove(self._check_constants)
        if not self._file.closed:
            with suppress(OSError):  # whoever took the step was told
                self._flush()
            with suppress(OSError):
                self._file.truncate(self._end)
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
    """Log every step of `optimizer` to `path`, until the returned writer is closed.

    Args:
        optimizer: The optimizer whose steps are logged.
        path: The log's file; without `resume` an existing file is replaced.
        model: The model, to include the fingerprint of its frozen parameters (an adapter's base).
        config: Anything that JSON can hold and a reader of the log may want to know.
        resume: Continue an existing log; its records from the optimizer's step on are dropped. If
            there is none, the new log begins at the optimizer's step, and `trajectory.merge` can
            join it with the log of the earlier steps.

    Raises InputError, and leaves the file as it is, if another process is writing it, if it is of
    another run, if it lacks steps before the optimizer's, or if the log cannot be written.
    """
    created, file = not Path(path).exists(), locked(path)
    try:
        if resume and begun(path):
            return Writer(optimizer, path, file, _end_of(path, optimizer), {})
        step = optimizer.param_groups[0]["step"]
        if step and not resume:
            raise InputError(f"{path}: no log to continue, and the run is at step {step}")
        optimizer.write()  # what the log begins with is what the matrices are
        return Writer(optimizer, path, file, 0, header_of(optimizer, model, config))
    except BaseException:
        file.close()
        if created:
            Path(path).unlink(missing_ok=True)
        raise


def header_of(
    optimizer: MeZO, model: torch.nn.Module | None, config: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the part of the header that only a log's first segment has."""
    names = {name for name, _, _ in optimizer.trained()}
    if model is not None:
        _check_names(names, model)
    header = {"format": FORMAT, "noise": noise.CONTRACT} | identity(optimizer)
    origin = getattr(model, "gguf_sha256", None)  # models.loading sets it
    given = (config or {}) | ({} if origin is None else {"gguf_sha256": origin})
    header |= {"config": given, "versions": {"torch": str(torch.__version__)}}
    header["frozen"] = None if model is None else frozen_fingerprint(model, names)
    tensors = [entry | {"sha256": fingerprint(p)} for entry, p in _entries(optimizer)]
    named = {entry["name"]: p for entry, p in _entries(optimizer)}
    return header | {"tensors": tensors} | start_values.encoded(model, named)


def _check_names(names: set[str], model: torch.nn.Module) -> None:
    """Raise InputError for a name that the model does not have, as no replay would find it."""
    known = {noise.canonical_name(name) for name, _ in model.named_parameters()}
    if unknown := sorted(names - known):
        raise InputError(
            f"the optimizer's parameter {unknown[0]} is not a name of the model's: the log would "
            "replay on no model; make it of model.named_parameters()"
        )


def identity(optimizer: MeZO) -> dict[str, Any]:
    """Return the settings of the whole run that a replay depends on, besides the tensors."""
    settings = optimizer.settings | {"perturbation": optimizer.perturbation}
    keys: dict[str, Any] = {}
    for option in OPTIONS:
        value = settings.get(option.name)
        dropped = option.logged is Logged.UNLESS_DEFAULT and value == option.default
        if option.constant and option.applies(settings) and not dropped:
            fill = _FILLED.get(option.name)
            keys |= {option.name: value} if fill is None else fill(optimizer, value)
    return keys


def _of_rule(optimizer: MeZO, value: Any) -> dict[str, Any]:
    """Return the rule that a replay applies, and its options if it has any."""
    given = rules.options(optimizer.rule.replayed, optimizer.rules)
    return {"rule": given.pop("name")} | ({"rule_options": given} if given else {})


def _of_estimator(optimizer: MeZO, value: str) -> dict[str, Any]:
    """Return the estimator's name and, for a user's own, how many sides it visits if not both."""
    one_sided = value not in ESTIMATORS and optimizer.estimator.sides == 1
    return {"estimator": value} | ({"sides": 1} if one_sided else {})


def _of_layers(optimizer: MeZO, value: dict[str, Any]) -> dict[str, Any]:
    """Return how the tensors are scaled; the scales themselves are with the tensors."""
    return {"modified": value.get("modified", "variance")} if value.get("scales") else {}


# The options that fill other keys of the header than one of their name.
_FILLED = {"rule": _of_rule, "estimator": _of_estimator, "layers": _of_layers}


def _constants(optimizer: MeZO) -> dict[str, Any]:
    """Return what must stay constant during a log: the settings of `identity`, and the tensors."""
    entries = places([entry for entry, _ in _entries(optimizer)])
    return identity(optimizer) | {f"parameter {name}": place for name, place in entries.items()}


def _versions(optimizer: MeZO) -> dict[str, tuple[int, int]]:
    """Return, by name, how often each trained weight was written to, and where it lies.

    Weights that are sharded or offloaded are left out: others move them between steps.
    """
    if not optimizer.weights.here:
        return {}
    plain = [(n, p) for n, p, _ in optimizer.trained() if not p.is_inference()]
    return {name: (p._version, p.data_ptr()) for name, p in plain}


def check_identity(header: dict[str, Any], optimizer: MeZO, told: str) -> None:
    """Raise InputError, beginning with `told`, if the header is not of the optimizer's run."""
    here = identity(optimizer)
    for key in IDENTITY:
        if header.get(key) != here.get(key):
            known = header.get(key), here.get(key)
            raise InputError(f"{told}: its {key} is {known[0]}, not {known[1]}")
    if places(header["tensors"]) != places([entry for entry, _ in _entries(optimizer)]):
        raise InputError(f"{told}: its tensors, or their parameter groups, differ")


def frozen_fingerprint(model: torch.nn.Module, trained: set[str]) -> str | None:
    """Return one fingerprint of all untrained parameters (an adapter's base), or None if none."""
    named = {noise.canonical_name(name): p for name, p in model.named_parameters()}
    digests = "".join(fingerprint(unpacked(p)) for name, p in named.items() if name not in trained)
    return hashlib.sha256(digests.encode()).hexdigest()[:16] if digests else None


def entry_of(name: str, p: torch.Tensor) -> dict[str, Any]:
    return _place_of(name, p) | {"sha256": fingerprint(p)}


def _place_of(name: str, p: torch.Tensor) -> dict[str, Any]:
    dtype = str(p.dtype).removeprefix("torch.")
    return {"name": name, "shape": list(p.shape), "dtype": dtype}


def _entries(optimizer: MeZO) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Return the log's entry, without the fingerprint, of every trained tensor, and the tensor."""
    index = {id(g): i for i, g in enumerate(optimizer.param_groups)}
    own = scales_of(optimizer.param_groups[0]["layers"])
    entries: list[tuple[dict[str, Any], torch.Tensor]] = []
    for name, p, group in optimizer.trained():
        entry = _place_of(name, p) | {"group": index[id(group)]}
        mine = own.get(name, PLAIN)
        entry |= {"scale": mine.scale} if mine.scale != 1.0 else {}
        entry |= {"threshold": mine.threshold} if mine.threshold is not None else {}
        entries.append((entry, p))
    return entries


def _end_of(path: str | Path, optimizer: MeZO) -> int:
    """Return the byte at which the records of the steps before the optimizer's end."""
    log, step = read(path), optimizer.param_groups[0]["step"]
    if log.compact:
        raise InputError(f"{path} is compact, and complete: mezo log merge makes a log to continue")
    check_identity(log.header, optimizer, f"{path} is the log of another run")
    if not log.start <= step <= log.end:
        verb, end = ("ends", log.end) if step > log.end else ("begins", log.start)
        raise InputError(f"{path} {verb} at step {end}, and the run to continue is at {step}")
    return log.ends[step - log.start - 1] if step > log.start else log.first_record
