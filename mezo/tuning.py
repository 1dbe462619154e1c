"""Tuning by a recipe, in a plain loop: MeZO and its baseline see the same batches and evaluations.

For the demo and the experiments. A user's own training is `mezo train` or the Trainer, which have
checkpoints; here a run starts from the weights given and ends in the same process.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from . import trajectory
from .errors import InputError
from .evaluate import evaluate
from .mezo import MeZO
from .objectives import Feature, Form, evaluating, to_device
from .tasks import Example


@dataclass(frozen=True)
class Recipe:
    """How to tune. The learning rate decays linearly to 0, so that the last weights are good."""

    method: str  # "mezo" or "adam" (torch's AdamW, by back-propagation)
    steps: int
    lr: float
    batch_size: int = 32
    eps: float = 1e-3
    num_samples: int = 1
    distribution: str = "gaussian"
    trainable: str = ""  # regular expression on parameter names; "" is all


@dataclass(frozen=True)
class Point:
    """One evaluation along the way."""

    step: int
    forward_passes: int  # of one batch; a backward pass counts as two
    seconds: float  # of training, evaluations left out
    accuracy: float
    loss: float


@dataclass
class Tuned:
    points: list[Point]
    losses: list[float] = field(default_factory=list)  # one a step
    seconds: float = 0.0


def select(model: torch.nn.Module, trainable: str) -> int:
    """Train the parameters whose names the expression finds, freeze the rest; their number."""
    try:
        pattern = re.compile(trainable)
    except re.error as error:
        raise InputError(f"trainable {trainable!r} is no regular expression: {error}") from None
    number = 0
    for name, p in model.named_parameters():
        p.requires_grad_(pattern.search(name) is not None)
        number += p.numel() * p.requires_grad
    if not number:
        raise InputError(f"trainable {trainable!r} matches no parameter of the model")
    return number


def batches(features: Sequence[Feature], size: int, seed: int) -> Iterator[list[Feature]]:
    """Shuffled epochs without end, in batches of like length: less padding to compute."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [feature["length"] for feature in features]
    while True:
        order = get_length_grouped_indices(lengths, size, generator=generator)
        starts = range(0, len(order) - size + 1, size) if len(order) > size else [0]
        for i in torch.randperm(len(starts), generator=generator).tolist():
            yield [features[j] for j in order[starts[i] : starts[i] + size]]


def tune(
    model: torch.nn.Module,
    form: Form,
    train: Sequence[Example],
    recipe: Recipe,
    *,
    seed: int,
    held_out: Sequence[Example],
    evaluations: int = 10,
    log: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Tuned:
    """Tune `model` in place. `on_step(step, loss)` is told of every step, counted from 1.

    `log` is where a run of MeZO leaves its run log. Evaluates on `held_out` before, `evaluations`
    times on the way, and at the end; the choice of examples for evaluation is the caller's.
    """
    select(model, recipe.trainable)
    stream = batches([form.encode(example) for example in train], recipe.batch_size, seed)
    step_of = _adam(model, form, recipe) if recipe.method == "adam" else None
    tuned, writer = Tuned([_point(model, form, held_out, 0, recipe, 0.0)]), None
    if step_of is None:
        step_of, optimizer = _mezo(model, form, recipe, seed)
        if log is not None:
            writer = trajectory.record(optimizer, log, model=model)
    every = max(1, recipe.steps // evaluations)
    try:
        for step in range(1, recipe.steps + 1):
            began = time.perf_counter()
            lr = recipe.lr * (1 - (step - 1) / recipe.steps)
            tuned.losses.append(step_of(to_device(form.collate(next(stream)), model), lr))
            tuned.seconds += time.perf_counter() - began
            if on_step is not None:
                on_step(step, tuned.losses[-1])
            if step % every == 0 or step == recipe.steps:
                tuned.points.append(_point(model, form, held_out, step, recipe, tuned.seconds))
    finally:
        if writer is not None:
            writer.close()
    return tuned


def _mezo(model, form: Form, recipe: Recipe, seed: int):
    optimizer = MeZO(
        model.named_parameters(),
        recipe.lr,
        eps=recipe.eps,
        num_samples=recipe.num_samples,
        distribution=recipe.distribution,
        seed=seed,
    )

    def step(batch, lr: float) -> float:
        optimizer.param_groups[0]["lr"] = lr
        with evaluating(model):
            return optimizer.step(lambda: form.loss(model, batch))

    return step, optimizer


def _adam(model, form: Form, recipe: Recipe):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)

    def step(batch, lr: float) -> float:
        optimizer.param_groups[0]["lr"] = lr
        model.train()
        loss = form.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        return float(loss.detach())

    return step


def _point(model, form, examples, step: int, recipe: Recipe, seconds: float) -> Point:
    found = evaluate(model, form, examples, recipe.batch_size)
    passes = 2 * recipe.num_samples if recipe.method == "mezo" else 3
    return Point(step, passes * step, seconds, found.accuracy, found.loss)
