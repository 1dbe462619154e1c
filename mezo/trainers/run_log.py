"""The run log of a Trainer: it is opened when a run begins, and never overwrites another run's."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mezo import trajectory
from mezo.distributed.elastic import digest, writer_of
from mezo.distributed.processes import join
from mezo.errors import InputError
from mezo.trainers.config import changed
from mezo.trajectory.fingerprints import frozen_fingerprint


class RunLog(TrainerCallback):
    """Opens the run log once everything is loaded and the optimizer's step is known.

    The log is run.mezo in the output folder. In a hyperparameter search each trial has its own log
    in its own folder, beside its checkpoints.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._writer: trajectory.Writer | None = None  # of the process that writes
        self._begun, self._digested = False, -1

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        trainer, mezo = self._trainer, optimizer.optimizer
        state.compute_steps(args, state.max_steps)  # a checkpoint's state has those of before
        trainer.take_up(mezo, kwargs.get("train_dataloader"))
        self.close()  # auto_find_batch_size begins again
        join(mezo, model, probes=getattr(args, "probe_groups", 1))
        resume = mezo.param_groups[0]["step"] > 0  # without its log, it begins one at that step
        path = log_of(trainer)
        if resume and args.world_size == 1:
            _check_frozen(path, mezo, model)
        if not resume and args.process_index == 0:
            set_aside(path)
        given = trainer.run_config
        config = changed(args) if given is None else given
        self._writer = writer_of(mezo, path, model=model, config=config, resume=resume)
        self._begun, self._digested = True, -1

    def digest(self) -> None:
        """Note in the log what the weights are, once a step; all processes call it."""
        if not self._begun:
            return
        optimizer = self._trainer.optimizer.optimizer
        step = optimizer.param_groups[0]["step"]
        if step != self._digested:
            self._digested = step
            digest(optimizer, self._writer)

    def allow_writes(self) -> None:
        """What was loaded into the model, after its last step, is no change that spoils the log."""
        if self._writer is not None:
            self._writer.allow_writes()

    def close(self) -> None:
        self._begun = False
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def log_of(trainer: Any) -> Path:
    """Return the path of a Trainer's run log."""
    folder = Path(trainer._get_output_dir(getattr(trainer, "_trial", None)))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "run.mezo"


def _check_frozen(path: Path, optimizer: Any, model: Any) -> None:
    """Raise InputError if the frozen weights differ from those of the log's run."""
    if not trajectory.begun(path):
        return
    had = trajectory.read(path, recover=True).header["frozen"]
    names = {name for name, _, _ in optimizer.trained()}
    if had is not None and frozen_fingerprint(model, names) != had:
        raise InputError(f"{path}: the weights that are not trained differ from those of the run")


def set_aside(path: Path) -> Path | None:
    """Rename another run's log at `path` to the first free name, such as run-1.mezo; return that.

    A log without a step is left to be replaced. A warning says what was done.
    """
    if not (path.exists() and trajectory.begun(path) and _has_steps(path)):
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    message = "%s is the log of a run before this one: it is kept as %s"
    logging.getLogger("mezo").warning(message, path, aside.name)
    return aside


def _has_steps(path: Path) -> bool:
    try:
        return len(trajectory.read(path, recover=True).steps) > 0
    except InputError:  # not a log, or an unreadable one: do not replace it
        return True
