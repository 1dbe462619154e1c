"""Resume a Trainer's run from its last checkpoint and the tail of its run log.

A checkpoint may be `save_steps` steps old, while the log holds every step. The steps between them
are replayed, without forward passes, when training begins. The Trainer is given a folder with a
trainer_state.json of the log's last step, so that schedule and data continue from there.
"""

import logging
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput

from mezo import trajectory
from mezo.compatibility import is_sharded_at_load
from mezo.errors import InputError
from mezo.trainers import changes, history
from mezo.trainers.checkpoints import STATE, damage, last_checkpoint
from mezo.trainers.config import MeZOConfig, changed

LOGGER = logging.getLogger("mezo")


class Tail:
    """The steps of a run that are in its log but not in its last checkpoint."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._folder: tempfile.TemporaryDirectory | None = None  # holds the Trainer's state
        self._checkpoint: str | None = None
        self._steps = (0, 0)  # the checkpoint's step, and the step to catch up to
        self.window = history.Window()  # the replayed part of the loss that is logged next

    @property
    def _log(self) -> Path:
        return Path(self.trainer.args.output_dir, "run.mezo")

    def begin(self) -> str | None:
        """Return the folder to resume from: a checkpoint, or one that stands for the log's end.

        Returns None, with a warning, to begin anew if the log has not begun or its steps cannot be
        resumed from. Raises InputError if there is nothing to resume or an option has changed.
        """
        args = self.trainer.args
        # the Trainer cannot load a checkpoint into a model that `from_pretrained` has sharded
        sharded = is_sharded_at_load(self.trainer)
        found = None if sharded else last_checkpoint(args.output_dir)
        log = self._log
        if found is None and not trajectory.begun(log):
            if log.exists():
                LOGGER.warning("%s was cut off as it began: the run begins anew", log)
                return None
            raise InputError(f"{args.output_dir} has neither a checkpoint nor a run.mezo")
        self.check_options()
        state = self._fresh() if found is None else TrainerState.load_from_json(f"{found}/{STATE}")
        saved = state.global_step
        steps = trajectory.resumable(trajectory.read(log)) if trajectory.begun(log) else 0
        last = args.max_steps if args.max_steps > 0 else float("inf")
        option = trajectory.forgotten(vars(args)) if isinstance(args, MeZOConfig) else None
        if option:
            if found is None:
                LOGGER.warning(
                    "%s has no checkpoint, which a run with %s needs to resume: it begins anew, "
                    "and repeats its %d steps",
                    *(args.output_dir, option, steps),
                )
            return found
        end = int(min(steps, _next_stop(args, saved) - 1, last - 1))  # the last one ends the run
        if end <= saved:
            return found
        self._checkpoint, self._steps = found, (saved, end)
        self._folder = tempfile.TemporaryDirectory(prefix="mezo-")
        state.global_step = end
        state.save_to_json(f"{self._folder.name}/{STATE}")
        return self._folder.name

    def check(self, checkpoint: str) -> None:
        """Raise InputError for a named checkpoint that is damaged or belongs to another run."""
        if what := damage(checkpoint):
            raise InputError(f"resume_from_checkpoint {checkpoint}: {what}: take another one")
        self.check_options()

    def check_options(self) -> None:
        """Warn of changed options that are honoured, and refuse all other changes."""
        if not trajectory.begun(self._log):
            return
        args, given = self.trainer.args, self.trainer.run_config
        had = trajectory.read(self._log, recover=True).header["config"]
        now = changed(args) if given is None else given
        for line in changes.check(had, now, args, f"the run of {self._log}"):
            LOGGER.warning("%s", line)

    def ended(self, checkpoint: str) -> TrainOutput | None:
        """Return a complete run's output, or None; the Trainer would make one more step."""
        trainer = self.trainer
        if not Path(checkpoint, STATE).is_file() or trainer.args.max_steps <= 0:
            return None
        state = TrainerState.load_from_json(f"{checkpoint}/{STATE}")
        if state.global_step < trainer.args.max_steps:
            return None
        message = "%s: the run has made its %d steps: nothing is trained"
        LOGGER.warning(message, checkpoint, state.global_step)
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
        if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
            trainer._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    def _fresh(self) -> TrainerState:
        """Return a state like that which the Trainer creates for a new run."""
        trainer = self.trainer
        known = [*trainer.callback_handler.callbacks, trainer.control]
        stateful: Any = [one for one in known if isinstance(one, ExportableState)]
        state = TrainerState(stateful_callbacks=stateful)
        state.train_batch_size = trainer._train_batch_size
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(state, name, getattr(trainer.args, name))
        return state

    def checkpoint_of(self, path: str | None) -> str | None:
        """Return `path` or, if it is the folder that `begin` created, the checkpoint behind it."""
        return self._checkpoint if self._folder and path == self._folder.name else path

    def catch_up(self, loader: Any = None) -> None:
        """Replay the tail, advance the schedule and complete the history, once all is loaded.

        `loader` is the Trainer's data loader, from which the epochs of the steps are computed.
        """
        self.window = history.Window()
        if self._folder is None:
            return
        trainer, (saved, end) = self.trainer, self._steps
        trajectory.catch_up(self._log, trainer.optimizer.optimizer, until=end)
        if not isinstance(trainer.lr_scheduler, ReduceLROnPlateau):  # it moves at evaluations alone
            with warnings.catch_warnings():  # the optimizer's steps were made without it
                warnings.filterwarnings(
                    "ignore", "Detected call of `lr_scheduler.step", UserWarning
                )
                for _ in range(saved, end):
                    trainer.lr_scheduler.step()
        steps = trajectory.read(self._log).steps
        entries, self.window = history.replayed(steps, saved, end, trainer.args, loader)
        trainer.state.log_history += entries

    def scales(self) -> dict[str, float]:
        """Return the scales of layers that the resumed run's log holds, by tensor; {} if none."""
        if self._folder is None:
            return {}
        tensors = trajectory.read(self._log, recover=True).header["tensors"]
        return {entry["name"]: entry["scale"] for entry in tensors if "scale" in entry}

    def end(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        self._folder, self._checkpoint = None, None


def _next_stop(args, step: int) -> float:
    """Return the first step after `step` at which the Trainer evaluates or saves.

    That step must not be replayed, but made.
    """
    stops = [float("inf")]
    kinds = ((args.eval_strategy, args.eval_steps), (args.save_strategy, args.save_steps))
    for strategy, every in kinds:
        if strategy == "epoch":  # how long one is, is known later
            return step + 1
        if strategy == "steps" and every:
            whole = every if every >= 1 else math.ceil(max(args.max_steps, 0) * every)
            stops.append((step // whole + 1) * whole if whole else step + 1)
    return min(stops)
