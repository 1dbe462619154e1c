"""A Trainer's progress in lines, where nobody looks at a bar."""

from typing import Any

from transformers import TrainerCallback

from mezo.estimators import merged
from mezo.mezo import MeZO
from mezo.objectives.progress import Loop, Progress


class ProgressLines(TrainerCallback):
    """Tells of steps, with their loss, and of the batches of long evaluations between them."""

    def __init__(self, trainer: Any, progress: Progress) -> None:
        self._trainer, self._progress = trainer, progress
        self._steps: Loop | None = None
        self._batches: Loop | None = None
        self._seen = 0  # batches of the evaluation

    def on_step_begin(self, args, state, control, **kwargs):
        if self._steps is None:  # here and not earlier: a run that goes on has taken up its step
            self._steps = self._progress.of("step", state.max_steps, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self._steps is not None:
            self._steps.at(state.global_step, loss_of(self._trainer))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._batches is None and hasattr(eval_dataloader, "__len__"):
            self._seen = 0
            self._batches = self._progress.of("dev batch", len(eval_dataloader))
        if self._batches is not None:
            self._seen += 1
            self._batches.at(self._seen)

    def on_evaluate(self, args, state, control, **kwargs):
        self._batches = None

    def on_train_end(self, args, state, control, **kwargs):
        if self._steps is not None:
            self._steps.end()
        self._steps = None


def loss_of(trainer: Any) -> float | None:
    """The loss of a Trainer's latest step, of all processes; of back-propagation the last logged.

    Reading a step's loss would make a device wait for it. MeZO has waited already.
    """
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if isinstance(optimizer, MeZO):
        losses = [merged(found).loss for found in optimizer.processes.latest.values()]
        return sum(losses) / len(losses) if losses else None
    logged = [entry["loss"] for entry in trainer.state.log_history[-3:] if "loss" in entry]
    return logged[-1] if logged else None
