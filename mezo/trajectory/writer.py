"""Write a run log: one record per step, appended before the step ends."""

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

from mezo import noise
from mezo.errors import InputError
from mezo.interrupts import held
from mezo.mezo import MeZO
from mezo.noise.sharded import is_sharded
from mezo.options.table import OPTIONS, defaults
from mezo.record import Record
from mezo.trajectory import start_values
from mezo.trajectory.files import begun, locked, read
from mezo.trajectory.fingerprints import (
    digests_of,
    fingerprint,
    first_difference,
    frozen_fingerprint,
)
from mezo.trajectory.format import FORMAT, Log, checksum, frame
from mezo.trajectory.header import DIGESTS, Damage, check
from mezo.trajectory.identity import check_identity, constants, entries_of, identity, in_words
from mezo.trajectory.other_writers import OtherWriters

_DEFAULTS = defaults()


class Writer:
    """Appends a record for every step of `optimizer`. Close it, or use it in a `with` statement.

    If a record cannot be written, for example on a full disk, the step raises InputError after its
    update. The weights are then one step beyond the log, which ends with a whole record. The
    missing record is kept in memory and written before the next one or on closing.
    """

    def __init__(
        self,
        optimizer: MeZO,
        path: str | Path,
        file: FileIO,
        end: int,
        header: dict[str, Any],
        digests: str | None = None,
        model: torch.nn.Module | None = None,
    ):
        """Called by `record`, which has checked that `file` is locked and intact up to byte `end`.

        `header` holds what only a file's first segment has; it is empty if the file has a segment.
        `digests` are those of the weights as they are, if the file had them after byte `end`.
        """
        self._model = model
        self._trains = model is not None and model.training  # mode, as the last step had it
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
        data = self._segment(header, settings, digests)  # nothing was changed up to here
        self._digested = -1 if digests is None else self._step
        self._unwritten = False  # whether a step was made that no weight shows (Offload)
        try:
            file.truncate(end)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        self._put(data, settings, self._step)
        self._constants = constants(optimizer)
        self._trained = optimizer.trained()
        constant = [option.name for option in OPTIONS if option.constant]
        self._known = {name: optimizer.settings[name] for name in constant}
        self._others, self._told = OtherWriters(optimizer), False
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

    def _segment(
        self, header: dict[str, Any], settings: dict[str, Any], digests: str | None = None
    ) -> bytes:
        whole = header | {"start": self._step} | settings
        whole |= {} if digests is None else {DIGESTS: digests}
        if self.optimizer.memory.written == self._step:  # MeZO.write was called
            whole["written"], self._written = True, self._step
        try:
            rest = {"lr": [0.0] * self._groups, "tensors": self.optimizer.trained()}
            check(whole, None if header else rest)
            return frame(whole)
        except Damage as damage:
            raise InputError(f"{self.path}: the log cannot have {damage}") from None

    def _check_constants(self) -> None:
        """Raise InputError, before a step, if a setting that must be constant has changed."""
        self._check_writes()
        if self._model is not None and self._model.training != self._trains:
            self._trains = self._model.training
            if self._trains:
                self.optimizer.watch.look_again(self.optimizer)
        settings = self.optimizer.settings
        same = all(settings[key] == value for key, value in self._known.items())
        if same and self.optimizer.trained() is self._trained:
            return
        here = constants(self.optimizer)
        for key in {**self._constants, **here}:
            if self._constants.get(key) != here.get(key):
                default = _DEFAULTS.get(key)  # which a log leaves out; a parameter is then frozen
                before = in_words(self._constants.get(key, default))
                now = in_words(here.get(key, default))
                raise InputError(
                    f"{self.path}: {key} was {before} when the log began, and is now {now}: the "
                    "log would not replay. Change it back, or close this log and begin another "
                    "from these weights: trajectory.record(optimizer, another_path, resume=True), "
                    "or with a Trainer a run in another output_dir"
                )
        self._trained = self.optimizer.trained()

    def _check_writes(self) -> None:
        """Warn, once, if something else has written to a trained weight since the last step."""
        if self._told or self.optimizer.memory.written == self._step:
            return
        if (odd := self._others.first()) is not None:
            self._told = True
            when = f"after step {self._step - 1}" if self._step else "before step 0"
            logging.getLogger("mezo").warning(
                "%s: something besides the optimizer wrote to %s %s (weight clipping, an average, "
                "load_state_dict, a callback): unless the values are those of before, the log "
                "replays to other weights; begin another log after such a change",
                *(self.path, odd, when),
            )

    def allow_writes(self) -> None:
        """Take the weights as they are: what was written to them so far is not told."""
        self._others.note()

    def _check_model(self) -> None:
        """Warn, once, if the model has another parameter where the optimizer trains one."""
        if self._model is None or not self.optimizer.weights.here:
            return
        trained = {name: p for name, p, _ in self.optimizer.trained()}
        for name, p in self._model.named_parameters(remove_duplicate=False):
            if p is not trained.get(noise.canonical_name(name), p):
                logging.getLogger("mezo").warning(
                    "%s: the model's parameter %s is no longer the one that the optimizer trains: "
                    "it was replaced, or tied to another, and the log replays to other weights; "
                    "make the optimizer after such a change",
                    *(self.path, name),
                )
                self._model = None
                return

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
        self._unwritten |= not getattr(self.optimizer.weights, "write_every", 1)
        if not self._told:
            self._others.note()

    def digest(self) -> None:
        """Note in the log what the trained weights are now, for replays to compare with theirs.

        MeZOTrainer does so at checkpoints and at the end, and leaving a `with` statement does. It
        takes as long as reading all weights once; sharded weights are read by all processes
        together, by elastic.digest. Low-rank updates count as written, though none is written.
        Nothing is noted while the weights are not the log's: between estimate() and step(); after
        layers were frozen, which the next step refuses; once offload with write_every=0 is left.
        """
        if self._file.closed:
            raise InputError(f"{self.path}: the log is closed")
        self._check_model()
        if self._digested == self._step or self._pending:
            return
        if self.optimizer.directions or constants(self.optimizer) != self._constants:
            return
        if self._unwritten and self.optimizer.weights.here:  # offload was left
            return
        digests = digests_of(p for _, p in self.optimizer.weights.as_written(self.optimizer))
        with held():
            self._put(self._segment({}, self._settings, digests), self._settings, self._step)
        self._digested = self._step

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
                self._check_writes()
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

    def __exit__(self, kind: Any, *exception: Any) -> None:
        try:
            sharded = any(is_sharded(p) for _, p, _ in self.optimizer.trained())
            if kind is None and not sharded:
                self.digest()
        finally:
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
        model: The model, to include the fingerprint of its frozen parameters (an adapter's base),
            and to see whether its parameters are still those that the optimizer trains.
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
            return Writer(optimizer, path, file, *_end_of(path, optimizer), model=model)
        step = optimizer.param_groups[0]["step"]
        if step and not resume:
            raise InputError(f"{path}: no log to continue, and the run is at step {step}")
        optimizer.write()  # what the log begins with is what the matrices are
        return Writer(optimizer, path, file, 0, header_of(optimizer, model, config), model=model)
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
    tensors = [entry | {"sha256": fingerprint(p)} for entry, p in entries_of(optimizer)]
    named = {entry["name"]: p for entry, p in entries_of(optimizer)}
    return header | {"tensors": tensors} | start_values.encoded(model, named)


def _check_names(names: set[str], model: torch.nn.Module) -> None:
    """Raise InputError for a name that the model does not have, as no replay would find it."""
    known = {noise.canonical_name(name) for name, _ in model.named_parameters()}
    if unknown := sorted(names - known):
        raise InputError(
            f"the optimizer's parameter {unknown[0]} is not a name of the model's: the log would "
            "replay on no model; make it of model.named_parameters()"
        )


def _end_of(path: str | Path, optimizer: MeZO) -> tuple[int, dict[str, Any], str | None]:
    """Return the byte at which the records of the steps before the optimizer's end.

    Also returns an empty header and the digests of the weights at that step, if the log has them.
    Raises InputError if the weights are others.
    """
    log, step = read(path), optimizer.param_groups[0]["step"]
    if log.compact:
        raise InputError(f"{path} is compact, and complete: mezo log merge makes a log to continue")
    check_identity(log.header, optimizer, f"{path} is the log of another run")
    if not log.start <= step <= log.end:
        verb, end = ("ends", log.end) if step > log.end else ("begins", log.start)
        raise InputError(f"{path} {verb} at step {end}, and the run to continue is at {step}")
    end = log.ends[step - log.start - 1] if step > log.start else log.first_record
    return end, {}, _digests_at(path, log, step, optimizer)


def _digests_at(path: str | Path, log: Log, step: int, optimizer: MeZO) -> str | None:
    """Return the log's digests of the weights at a step if they are here and can be compared."""
    had = log.digests.get(step)
    sharded = any(is_sharded(p) for _, p, _ in optimizer.trained())  # others would have to help
    if had is None or sharded or optimizer.directions:
        return None
    name = first_difference(had, optimizer.weights.as_written(optimizer))
    if name is not None:
        raise InputError(
            f"{path}: {name} is not what it was when the run had made {step} steps: resume from "
            "the weights of that run, another checkpoint for example, or begin another log"
        )
    return had
