"""Trainers for tasks: they train on a form's loss and are evaluated by its scores.

trainer = MeZOTaskTrainer(model, args, form=form, train_dataset=..., eval_dataset=...)
"""

from typing import Any

from torch.nn import functional as F
from transformers import Trainer

from mezo.closures import Stacking
from mezo.objectives import Form, Generated
from mezo.objectives.metric_losses import check_objective, metric_closure, text_loss
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
    """Fine-tunes on a task by forward passes alone.

    With `args.objective` it trains on a metric, and is evaluated as without. Raises InputError for
    an objective that the form's task does not have.
    """

    def __init__(self, model: Any, args: Any, *, form: Form, **kwargs: Any):
        self.objective: str | None = getattr(args, "objective", None)
        check_objective(form, self.objective)
        super().__init__(model, args, form=form, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs or self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if isinstance(self.form, Generated):
            model = self.accelerator.unwrap_model(model)
            return text_loss(model, self.form, inputs["prompts"], inputs["answers"], self.objective)
        return metric_closure(self.form, model, inputs, self.objective)()

    @property
    def pair_loss(self) -> Any:
        """Both losses from one pass; None for an objective of texts, which grow token by token."""
        if self.objective is None:
            return self.form.pair_loss
        return None if isinstance(self.form, Generated) else self._pair_metric

    def stacking(self, model, inputs) -> Stacking:
        return self.form.stacking(model, inputs)

    def _pair_metric(self, model, inputs, both):
        assert self.objective is not None
        return metric_closure(self.form, model, inputs, self.objective).halves(both)


class AdamTaskTrainer(TaskMixin, Trainer):
    """Fine-tunes by backpropagation with the Trainer's AdamW, as the baseline."""
