"""Evaluate a model on a task: zero-shot, in context, calibrated, or after training.

evaluate(model, form, examples)                                 # zero-shot, or after training
evaluate(model, form, examples, demonstrations=shown)           # in-context learning
evaluate(model, form.calibrate(model), examples)                # content-free calibration
evaluate(model, form.calibrate(model, "sfc"), examples)         # surface-form competition
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from mezo.errors import InputError
from mezo.models.modes import evaluating, to_device
from mezo.objectives import Feature, Form, Generated
from mezo.objectives.generation import generate
from mezo.objectives.progress import SILENT, Progress
from mezo.tasks.metrics import accuracy, exact_match, macro_f1, token_f1
from mezo.tasks.task import Example, Task


@dataclass(frozen=True)
class Result:
    """Metrics, loss and predictions, in the order of the examples.

    Predictions are indices of candidates, with -1 where a score is NaN. For a task that generates
    they are texts.
    """

    metrics: dict[str, float]  # by name: the task's own, and accuracy or exact_match and f1
    metric: str  # the task's own
    loss: float  # mean cross-entropy over candidates, or per token of the right answers
    predictions: tuple[int, ...] | tuple[str, ...]
    n: int
    dropped: int = 0  # demonstrations that did not fit, summed over the examples

    @property
    def value(self) -> float:
        """The task's own metric."""
        return self.metrics[self.metric]

    @property
    def accuracy(self) -> float:
        """The share of right candidates; NaN for a task that generates."""
        return self.metrics.get("accuracy", math.nan)


class Reader(Protocol):
    """What an evaluation asks of whoever runs the model."""

    def score(
        self, form: Any, features: Sequence[Feature], batch_size: int, progress: Progress
    ) -> torch.Tensor:
        """Return scores (features, candidates), as `score` does."""

    def write(
        self, form: Any, features: Sequence[Feature], batch_size: int, progress: Progress
    ) -> list[str]:
        """Return written answers, as `write` does."""


@dataclass(frozen=True)
class _Model:
    """A model in this process."""

    model: torch.nn.Module

    def score(self, form, features, batch_size, progress):
        return score(self.model, form, features, batch_size, progress)

    def write(self, form, features, batch_size, progress):
        return write(self.model, form, features, batch_size, progress)


def evaluate(
    model: torch.nn.Module,
    form: Form,
    examples: Sequence[Example],
    batch_size: int = 32,
    *,
    demonstrations: Sequence[Example] = (),
    each: Sequence[Sequence[Example]] | None = None,
    progress: Progress = SILENT,
    reader: "Reader | None" = None,
) -> Result:
    """Score all candidates of all examples, or generate answers, and compare with the right ones.

    Except for rounding, neither the batch size nor the order of examples matters. The model is left
    as it was, including its training mode. The memory needed is that of a forward pass over
    batch_size examples and, for tasks that generate, of their keys and values. Text is generated
    greedily.

    Args:
        model: The model that `form` was made for.
        form: The form of the task.
        examples: The examples, at least one.
        batch_size: Examples per forward pass.
        demonstrations: Examples shown before every example.
        each: Instead, one set of demonstrations for each example.
        progress: Reports how many batches are done.
        reader: What reads in place of `model`, such as an engine; it scores and writes.

    Raises InputError if there are no examples or one does not fit the form.
    """
    if not examples:
        raise InputError("there are no examples to evaluate")
    if demonstrations:
        form = form.in_context(model, demonstrations)
    if each is None:
        features = [form.encode(example) for example in examples]
    else:
        pairs = zip(examples, each, strict=True)
        features = [form.encode(example, shown) for example, shown in pairs]
    read = _Model(model) if reader is None else reader
    scores = read.score(form, features, batch_size, progress)
    predictions: tuple[int, ...] | tuple[str, ...]
    if isinstance(form, Generated):
        lengths = torch.tensor([len(feature["targets"][0]) for feature in features])
        loss = -(scores[:, 0].double() * lengths).sum() / lengths.sum()
        predictions = texts = tuple(read.write(form, features, batch_size, progress))
        metrics = text_metrics(texts, [example.answers for example in examples])
    else:
        labels = torch.tensor([example.label for example in examples])
        loss = F.cross_entropy(scores.double(), labels)
        predictions = indices = chosen(scores)
        metrics = candidate_metrics(form.task, indices, examples)
    return Result(
        metrics=metrics,
        metric=form.task.metric,
        loss=loss.item(),
        predictions=predictions,
        n=len(examples),
        dropped=sum(feature.get("dropped", 0) for feature in features),
    )


def chosen(scores: torch.Tensor) -> tuple[int, ...]:
    """Return each example's candidate with the highest score, -1 where a score is NaN.

    `scores` is (examples, candidates), -inf where an example has fewer candidates.
    """
    best = scores.argmax(-1).masked_fill(scores.isnan().any(-1), -1)
    return tuple(best.tolist())


def score(
    model: torch.nn.Module,
    form: Form,
    features: Sequence[Feature],
    batch_size: int = 32,
    progress: Progress = SILENT,
) -> torch.Tensor:
    """Return scores (features, candidates) on the CPU, in the order of `features`.

    A missing candidate has the score -inf. Batches hold examples of similar length, the longest
    first, so that a batch that is too large fails at once.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(features)), key=lambda i: -features[i]["length"])
    pieces = []
    with evaluating(model):
        for start in progress.over(range(0, len(order), batch_size), "evaluation batch"):
            batch = form.collate([features[i] for i in order[start : start + batch_size]])
            pieces.append(form.scores(model, to_device(batch, model)).cpu())
    widest = max(piece.shape[1] for piece in pieces)
    whole = [F.pad(piece, (0, widest - piece.shape[1]), value=-math.inf) for piece in pieces]
    scores = torch.cat(whole)
    return torch.empty_like(scores).index_copy_(0, torch.tensor(order), scores)


def write(
    model: torch.nn.Module,
    form: Generated,
    features: Sequence[Feature],
    batch_size: int = 32,
    progress: Progress = SILENT,
) -> list[str]:
    """Return what the model writes after each prompt, stripped, up to the task's stop."""
    prompts = [feature["prompt"] for feature in features]
    options: Any = {"batch_size": batch_size, "progress": progress}
    made = generate(model, form.tokenizer, prompts, form.generation, **options)
    return [completion.text.strip() for completion in made]


def text_metrics(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return means of exact match and of the words' F1, each with an example's best answer."""
    pairs = list(zip(texts, answers, strict=True))
    found = {"exact_match": exact_match, "f1": token_f1}
    return {name: sum(f(*pair) for pair in pairs) / len(pairs) for name, f in found.items()}


def candidate_metrics(
    task: Task, predictions: Sequence[int], examples: Sequence[Example]
) -> dict[str, float]:
    """Return the accuracy and the task's metric; each of several right answers counts as right.

    This is the only implementation: training selects its best weights by it, searches select their
    best run by it, and test results report it.
    """
    pairs = list(zip(predictions, examples, strict=True))
    labels = [example.label_for(k) for k, example in pairs]
    metrics = {"accuracy": accuracy(predictions, labels)}
    if task.metric == "macro_f1":
        metrics["macro_f1"] = macro_f1(predictions, labels)
    elif task.metric != "accuracy":
        texts = ["" if k < 0 else _chosen(task, example, k) for k, example in pairs]
        rights = [e.answers or (_chosen(task, e, e.label),) for e in examples]
        metrics |= text_metrics(texts, rights)
    return metrics


def _chosen(task: Task, example: Example, candidate: int) -> str:
    """Return the text that a candidate stands for."""
    return (example.choices or task.candidates_of(example))[candidate]
