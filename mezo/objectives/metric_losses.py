"""Metrics over candidates as a loss: what is reported becomes what is trained.

    loss = sum over parts of weight * L        L of accuracy = 1 - accuracy, of macro_f1 = 1 - F1

The accuracy and macro_f1 of a batch have no gradient. With `cross_entropy` added at some weight
they make a composite objective. Section 3.3 of the paper trains accuracy. It changes in steps of
one example, so a batch must be large enough for the two passes to differ.

    optimizer.step(metric_closure(form, model, batch, {"accuracy": 1.0, "cross_entropy": 0.1}))

For a task that generates, `text_loss` is 1 - F1 of what the model writes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from mezo.closures import Both, Paired
from mezo.errors import InputError
from mezo.models.modes import Batch
from mezo.objectives.form import Form
from mezo.objectives.generated import Generated
from mezo.objectives.generation import generate
from mezo.tasks import metrics


def _accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return 1.0 - metrics.accuracy(scores.argmax(-1).tolist(), labels.tolist())


def _macro_f1(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return 1.0 - metrics.macro_f1(scores.argmax(-1).tolist(), labels.tolist())


def _accepted(scores: torch.Tensor, labels: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return labels with the best candidate in place of the first right one, if both are right."""
    best = scores.argmax(-1, keepdim=True)
    return torch.where(right.gather(1, best), best, labels[:, None]).squeeze(1)


def _cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return float(F.cross_entropy(scores, labels))


PARTS: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "accuracy": _accuracy,
    "macro_f1": _macro_f1,
    "cross_entropy": _cross_entropy,
}
TEXT_METRICS = {"f1": metrics.token_f1, "exact_match": metrics.exact_match}
Objective = str | Mapping[str, float]  # a part, or parts with weights


def metric_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    objective: Objective,
    right: torch.Tensor | None = None,
) -> float:
    """Return the loss of scores (examples, candidates) against labels (examples,).

    Args:
        right: (examples, candidates), booleans: all candidates that are right, where an example
            has several. Accuracy and F1 accept each of them; cross-entropy is the label's.
        objective: "accuracy", "macro_f1", "cross_entropy", or weights of several of them. F1 is of
            the labels that occur in the batch.
    """
    weights = {objective: 1.0} if isinstance(objective, str) else objective
    _check(weights)
    scores = scores.detach()
    accepted = labels if right is None else _accepted(scores, labels, right.to(scores.device))
    total = 0.0
    for name, weight in weights.items():
        total += weight * PARTS[name](scores, labels if name == "cross_entropy" else accepted)
    return total


def metric_closure(
    form: Form, model: torch.nn.Module, batch: Batch, objective: Objective
) -> Paired:
    """Return the metric's loss as a closure for `MeZO.step`; low rank has both
    losses from one pass."""
    _check({objective: 1.0} if isinstance(objective, str) else objective)
    return Paired(
        partial(_alone, form, model, batch, objective),
        partial(_pair, form, model, batch, objective),
        *form.stacking(model, batch),
    )


def text_loss(
    model: torch.nn.Module,
    form: Generated,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[str]],
    objective: str = "f1",
) -> float:
    """Return 1 minus the mean metric of what the model writes greedily after each prompt.

    Args:
        prompts: token ids, as `Generated.encode` makes them.
        answers: the right answers of each prompt, of which the best counts (Section 3.3).
        objective: "f1" of the words or "exact_match".
    """
    made = generate(model, form.tokenizer, prompts, form.generation)
    texts = (completion.text.strip() for completion in made)
    values = [TEXT_METRICS[objective](*pair) for pair in zip(texts, answers, strict=True)]
    return 1.0 - sum(values) / len(values)


def check_objective(form: Form, objective: str | None) -> None:
    """Raise InputError for an objective that the form's task does not have; None is every one's."""
    known = TEXT_METRICS if isinstance(form, Generated) else PARTS
    if objective is not None and objective not in known:
        raise InputError(
            f"objective {objective!r} is not one of {', '.join(known)}, which task "
            f"{form.task.name} has"
        )


def _check(weights: Mapping[str, float]) -> None:
    for name in weights:
        if name not in PARTS:
            raise InputError(f"objective must be of {', '.join(PARTS)}, got {name!r}")
    if not weights:
        raise InputError(f"the objective is empty: give weights of {', '.join(PARTS)}")


def _alone(form: Form, model: torch.nn.Module, batch: Batch, objective: Objective) -> float:
    return metric_loss(form.scores(model, batch), batch["labels"], objective, batch.get("right"))


def _pair(
    form: Form, model: torch.nn.Module, batch: Batch, objective: Objective, both: Both
) -> list[float]:
    found = form.pair_scores(model, batch, both)
    offsets = 0.0 if form.offsets is None else form.offsets.to(found[0].device)
    labels, right = batch["labels"], batch.get("right")
    return [metric_loss(scores - offsets, labels, objective, right) for scores in found]
