"""Accuracy of a model on a task. Zero-shot is this without training; so is learning in context.

evaluate(model, form, examples)                                 # zero-shot, or after training
evaluate(model, form, examples, demonstrations=shown)           # in-context learning
evaluate(model, form.calibrate(model), examples)                # content-free calibration
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .errors import InputError
from .objectives import Feature, Form, evaluating, to_device
from .tasks.task import Example


@dataclass(frozen=True)
class Result:
    """`predictions` are indices of labels in the examples' order; -1 where a score is NaN."""

    accuracy: float
    loss: float  # mean cross-entropy over candidates
    predictions: tuple[int, ...]
    n: int
    dropped: int = 0  # demonstrations that did not fit, summed over the examples


def evaluate(
    model: torch.nn.Module,
    form: Form,
    examples: Sequence[Example],
    batch_size: int = 32,
    *,
    demonstrations: Sequence[Example] = (),
) -> Result:
    """Score all candidates of all examples and count how often the right one is highest.

    Neither the batch size nor the order matters, but for rounding. The model is as it was before,
    training mode included. Memory: that of a forward pass over batch_size examples.
    """
    if not examples:
        raise InputError("there are no examples to evaluate")
    if demonstrations:
        form = form.in_context(model, demonstrations)
    features = [form.encode(example) for example in examples]
    scores = score(model, form, features, batch_size)
    labels = torch.tensor([example.label for example in examples])
    predictions = scores.argmax(-1).masked_fill(scores.isnan().any(-1), -1)
    return Result(
        accuracy=(predictions == labels).double().mean().item(),
        loss=F.cross_entropy(scores.double(), labels).item(),
        predictions=tuple(predictions.tolist()),
        n=len(examples),
        dropped=sum(feature.get("dropped", 0) for feature in features),
    )


def score(
    model: torch.nn.Module, form: Form, features: Sequence[Feature], batch_size: int = 32
) -> torch.Tensor:
    """Scores (features, candidates) on the CPU, in the order of `features`.

    Batches are of like length, the longest first, so that too large a batch fails at once.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(features)), key=lambda i: -features[i]["length"])
    pieces = []
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = form.collate([features[i] for i in order[start : start + batch_size]])
            pieces.append(form.scores(model, to_device(batch, model)).cpu())
    scores = torch.cat(pieces)
    return torch.empty_like(scores).index_copy_(0, torch.tensor(order), scores)
