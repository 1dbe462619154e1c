"""Trainers for tasks: they train on a form's loss and are evaluated by its scores.

trainer = MeZOTaskTrainer(model, args, form=form, train_dataset=..., eval_dataset=...)
"""

from typing import Any

from torch.nn import functional as F
from transformers import Trainer

from mezo.objectives import Form, Generated
from mezo.trainers.checkpoints import TiedWeights
from mezo.trainers.trainer import MeZOMixin


class TaskMixin(TiedWeights):
    """Puts a form's loss, scores and batches into a Trainer class."""

    run_config: dict[str, Any] | None = None

    def __init__(self, model: Any, args: Any, *, form: Form, **kwargs: Any):
        self.form = form
        kwargs.setdefault("data_collator", form.collate)
        super().__init__(model, args, **kwargs)  # type: ignore[call-arg]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not return_outputs:
            return self.form.loss(model, inputs)
        if isinstance(self.form, Generated):  # its dev metric is the loss
            return self.form.loss(model, inputs), {}
        scores = self.form.scores(model, inputs)
        return F.cross_entropy(scores, inputs["labels"]), {"scores": scores}


class MeZOTaskTrainer(TaskMixin, MeZOMixin, Trainer):
    """Fine-tunes on a task by forward passes alone."""

    def pair_loss(self, model, inputs, both):
        return self.form.pair_loss(model, inputs, both)


class AdamTaskTrainer(TaskMixin, Trainer):
    """Fine-tunes by backpropagation with the Trainer's AdamW, as the baseline."""
