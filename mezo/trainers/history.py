"""The Trainer's log history for replayed steps, so that a resumed run's curve has no gap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mezo.trajectory import Step


@dataclass(frozen=True)
class Window:
    """The replayed part of the steps whose mean loss the Trainer logs next."""

    steps: int = 0
    end: int = 0  # the step from which the Trainer continues
    total: float = 0.0  # sum of the losses

    def mean(self, loss: float, step: int) -> float:
        """Return the window's mean loss at `step`; `loss` is the mean of its steps after `end`."""
        made = step - self.end
        return (self.total + loss * made) / (self.steps + made)


def replayed(
    steps: Sequence[Step], saved: int, end: int, args: Any, loader: Any = None
) -> tuple[list[dict[str, Any]], Window]:
    """Return what the Trainer would have logged in steps saved + 1 to end, and the open window.

    A logged loss is the mean since the previous entry, summed in float32 as the Trainer does.

    Args:
        steps: The steps of the run log, from its first step on.
        saved: The step of the checkpoint, where its own history ends.
        end: The step up to which the run was replayed.
        args: The Trainer's arguments, which say how often it logs.
        loader: Its data loader, from which epochs are computed; without a length there are none.
    """
    first = steps[0].record.step if len(steps) else 0
    start = _last_logged(saved, args)
    entries, total, begin = [], np.float32(0), start
    for step in range(max(start, first), end):
        record = steps[step - first].record
        total += _loss(record.loss, total, step - begin)
        number = step + 1  # as the Trainer counts: steps made
        if _logs(number, args):
            if number > saved:
                entries.append(_entry(steps[step - first], float(total) / (number - begin)))
                entries[-1] |= _epoch(number, args, loader) | {"step": number}
            total, begin = np.float32(0), number
    return entries, Window(end - max(begin, first), end, float(total))


def _loss(loss: float, total: Any, steps: int) -> Any:
    """Return the loss, or the mean so far if it is not finite, as logging_nan_inf_filter does."""
    return np.float32(loss) if math.isfinite(loss) else total / np.float32(1 + steps)


def _entry(step: Step, loss: float) -> dict[str, Any]:
    grads = step.record.projected_grads
    return {
        "loss": loss,
        "grad_norm": math.hypot(*grads) / len(grads),
        "learning_rate": step.lrs[0],
        "projected_grad": sum(grads) / len(grads),
    }


def _logs(step: int, args: Any) -> bool:
    if args.logging_strategy != "steps":  # such as at the end of an epoch, which is not replayed
        return False
    every = args.logging_steps
    whole = every if every >= 1 else math.ceil(max(args.max_steps, 0) * every)
    return (bool(whole) and step % whole == 0) or (step == 1 and args.logging_first_step)


def _last_logged(step: int, args: Any) -> int:
    """Return the last step up to `step` at which the Trainer logged, or 0."""
    while step and not _logs(step, args):
        step -= 1
    return step


def _epoch(step: int, args: Any, loader: Any) -> dict[str, float]:
    try:
        batches = len(loader)
    except TypeError:
        return {}
    updates = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    epoch, within = divmod(step - 1, updates)
    made = min((within + 1) * args.gradient_accumulation_steps, batches)
    return {"epoch": epoch + made / batches}
