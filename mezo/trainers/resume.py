"""Going on with a Trainer's run from the last checkpoint and the tail of its run log.

A checkpoint is as old as `save_steps` allows; the log is as old as the last step. What lies between
them is replayed, without forward passes, when training begins. The Trainer is shown a folder with
a trainer_state.json of the log's last step, so that schedule and data go on from there.
"""

import logging
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import TrainOutput

from mezo import trajectory
from mezo.compatibility import is_sharded_at_load
from mezo.errors import InputError
from mezo.trainers.config import MeZOConfig

STATE = "trainer_state.json"


class Tail:
    """The steps of a run that its log has and its last checkpoint has not."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._folder: tempfile.TemporaryDirectory | None = None  # of the state shown to the Trainer
        self._checkpoint: str | None = None
        self._steps = (0, 0)  # those of the checkpoint, and those to catch up to

    def begin(self) -> str | None:
        """What to resume from: a checkpoint, or the folder that stands for the log's end."""
        args = self.trainer.args
        # the Trainer cannot load one into a model that `from_pretrained` has sharded
        sharded = is_sharded_at_load(self.trainer)
        found = None if sharded else last_checkpoint(args.output_dir)
        log = Path(args.output_dir, "run.mezo")
        if found is None and not log.exists():
            raise InputError(f"{args.output_dir} has neither a checkpoint nor a run.mezo")
        state = self._fresh() if found is None else TrainerState.load_from_json(f"{found}/{STATE}")
        saved = state.global_step
        steps = trajectory.resumable(trajectory.read(log)) if log.exists() else 0
        last = args.max_steps if args.max_steps > 0 else float("inf")
        option = trajectory.forgotten(vars(args)) if isinstance(args, MeZOConfig) else None
        if option:
            if found is None:
                raise InputError(
                    f"{args.output_dir} has no checkpoint, and with {option} a run goes on from "
                    "one alone"
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

    def ended(self, checkpoint: str) -> TrainOutput | None:
        """What a run that has made all its steps returns: the Trainer would make one more."""
        trainer = self.trainer
        if not Path(checkpoint, STATE).is_file() or trainer.args.max_steps <= 0:
            return None
        state = TrainerState.load_from_json(f"{checkpoint}/{STATE}")
        if state.global_step < trainer.args.max_steps:
            return None
        message = "%s: the run has made its %d steps: nothing is trained"
        logging.getLogger("mezo").warning(message, checkpoint, state.global_step)
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
        if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
            trainer._load_best_model()
        return TrainOutput(state.global_step, 0.0, {})

    def _fresh(self) -> TrainerState:
        """As the Trainer makes it for a new run."""
        trainer = self.trainer
        known = [*trainer.callback_handler.callbacks, trainer.control]
        stateful: Any = [one for one in known if isinstance(one, ExportableState)]
        state = TrainerState(stateful_callbacks=stateful)
        state.train_batch_size = trainer._train_batch_size
        for name in ("logging_steps", "eval_steps", "save_steps"):
            setattr(state, name, getattr(trainer.args, name))
        return state

    def checkpoint_of(self, path: str | None) -> str | None:
        """`path`, or if it is the folder made here, the checkpoint behind it."""
        return self._checkpoint if self._folder and path == self._folder.name else path

    def catch_up(self) -> None:
        """Called when all is loaded: replay the tail, and move the schedule on."""
        if self._folder is None:
            return
        trainer, (saved, end) = self.trainer, self._steps
        log = Path(trainer.args.output_dir, "run.mezo")
        trajectory.catch_up(log, trainer.optimizer.optimizer, until=end)
        with warnings.catch_warnings():  # the optimizer's steps were made without it
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(saved, end):
                trainer.lr_scheduler.step()

    def end(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        self._folder, self._checkpoint = None, None


def last_checkpoint(output_dir: str) -> str | None:
    """The newest whole checkpoint: its trainer_state.json is written last."""
    whole = Path(output_dir).glob(f"checkpoint-[0-9]*/{STATE}")
    found = max(whole, key=lambda path: int(path.parent.name.split("-")[1]), default=None)
    return None if found is None else str(found.parent)


def _next_stop(args, step: int) -> float:
    """The first step after `step` at which the Trainer evaluates or saves: it is to be made."""
    stops = [float("inf")]
    kinds = ((args.eval_strategy, args.eval_steps), (args.save_strategy, args.save_steps))
    for strategy, every in kinds:
        if strategy == "epoch":  # how long one is, is known later
            return step + 1
        if strategy == "steps" and every:
            whole = every if every >= 1 else math.ceil(max(args.max_steps, 0) * every)
            stops.append((step // whole + 1) * whole if whole else step + 1)
    return min(stops)
