"""Tune by a recipe in a plain loop: MeZO and Adam see the same batches and evaluations.

This loop serves the demo and the experiments. It has no checkpoints; for your own training, use
`mezo train` or the Trainer.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from mezo import trajectory
from mezo.errors import InputError
from mezo.estimators import passes_of
from mezo.evaluation.curve import Point
from mezo.evaluation.evaluate import evaluate
from mezo.memory.measured import PeakMemory
from mezo.mezo import MeZO
from mezo.models.modes import Batch, evaluating, to_device
from mezo.models.trainable import select
from mezo.objectives import Feature, Form
from mezo.runs.lifecycle import warm_up
from mezo.tasks import Example

Step = Callable[[Sequence[Batch], float], float]  # (batch or batches, learning rate) -> loss


@dataclass(frozen=True)
class Recipe:
    """How to tune. The learning rate decays linearly to 0, so that the last weights are good."""

    method: str  # "mezo" or "adam" (torch's AdamW, with backpropagation)
    steps: int
    lr: float
    batch_size: int = 32
    trainable: str = ""  # regular expression on parameter names; "" is all
    options: dict[str, Any] = field(default_factory=dict)  # of MeZO: eps, num_samples, rule, ...
    fresh_batches: bool = False  # whether each direction has its own batch (Algorithm 2)

    @property
    def num_samples(self) -> int:
        return self.options.get("num_samples", 1)


@dataclass
class Tuned:
    points: list[Point]
    losses: list[float] = field(default_factory=list)  # one per step
    seconds: float = 0.0


def batches(features: Sequence[Feature], size: int, seed: int) -> Iterator[list[Feature]]:
    """Yield shuffled epochs without end, in batches of similar length, which need less padding."""
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
    """Tune `model` in place, and return the learning curve.

    A MeZO run writes its log to `log`. The model is evaluated on `held_out` before training,
    `evaluations` times during it, and at the end. `on_step(step, loss)` is called after every step,
    counted from 1. Raises InputError if the recipe is malformed or there are no examples.
    """
    _check(recipe, train, evaluations)
    select(model, recipe.trainable)
    stream = batches([form.encode(example) for example in train], recipe.batch_size, seed)
    tuned, writer = Tuned([_point(model, form, held_out, 0, recipe, 0.0)]), None
    step_of, optimizer = stepper(model, form, recipe, seed)
    if log is not None and isinstance(optimizer, MeZO):
        writer = trajectory.record(optimizer, log, model=model, config=asdict(recipe))
    every = max(1, recipe.steps // evaluations)
    try:
        for step in range(1, recipe.steps + 1):
            began = time.perf_counter()
            lr = recipe.lr * (1 - (step - 1) / recipe.steps)
            several = recipe.num_samples if recipe.fresh_batches else 1
            given = [to_device(form.collate(next(stream)), model) for _ in range(several)]
            tuned.losses.append(step_of(given, lr))
            tuned.seconds += time.perf_counter() - began
            if on_step is not None:
                on_step(step, tuned.losses[-1])
            if step % every == 0 or step == recipe.steps:
                if isinstance(optimizer, MeZO):
                    optimizer.write()
                tuned.points.append(_point(model, form, held_out, step, recipe, tuned.seconds))
    finally:
        if writer is not None:
            writer.close()
    return tuned


def _check(recipe: Recipe, train: Sequence[Example], evaluations: int) -> None:
    if recipe.method not in ("mezo", "adam"):
        raise InputError(f"method must be mezo or adam, got {recipe.method!r}")
    counts = {"steps": recipe.steps, "batch_size": recipe.batch_size, "evaluations": evaluations}
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not train:
        raise InputError("there are no training examples")


def stepper(model, form: Form, recipe: Recipe, seed: int) -> tuple[Step, torch.optim.Optimizer]:
    """Return a function that makes one step on a batch at a learning rate, and its optimizer."""
    optimizer: torch.optim.Optimizer
    if recipe.method == "mezo":
        optimizer = MeZO(model.named_parameters(), recipe.lr, seed=seed, **recipe.options)
        compute = partial(_forward_only, model, form, optimizer)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
        compute = partial(_backward, model, form, optimizer, count(seed << 32))

    def step(given: Sequence[Batch], lr: float) -> float:
        optimizer.param_groups[0]["lr"] = lr
        return compute(*given)

    return step, optimizer


def _forward_only(model, form: Form, optimizer: MeZO, *batches: Batch) -> float:
    with evaluating(model):
        if len(batches) == 1:
            return optimizer.step(form.closure(model, batches[0]))
        for probe, batch in enumerate(batches):
            optimizer.estimate(form.closure(model, batch), probe)
        return optimizer.step()


def _backward(
    model, form: Form, optimizer: torch.optim.Optimizer, seeds: Iterator[int], batch: Batch
) -> float:
    device = batch["labels"].device
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(next(seeds) % 2**64)  # dropout's, so that a run depends on its seed alone
        loss = form.loss(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return float(loss.detach())


def extra_memory(model, form: Form, examples: Sequence[Example], recipe: Recipe) -> int:
    """Return the peak memory of training above that of inference, in bytes, on the longest batch.

    Three steps are compared with three forward passes, after a warm-up, so that what a process
    loads once (kernels, thread pools) does not count. The weights are changed.
    """
    select(model, recipe.trainable)
    features = sorted((form.encode(e) for e in examples), key=lambda feature: feature["length"])
    batch = to_device(form.collate(features[-recipe.batch_size :]), model)
    warm_up(recipe.options.get("distribution", "gaussian"))
    for p in model.parameters():
        p.detach().sum()  # files are mapped, and a weight counts once it has been read

    def infer() -> None:
        with evaluating(model):
            for _ in range(3):
                form.loss(model, batch)

    infer()
    with PeakMemory() as inference:
        infer()
    with PeakMemory() as training:
        step, _ = stepper(model, form, recipe, seed=0)
        for _ in range(3):
            step([batch], recipe.lr)
    return training.bytes - inference.bytes


def _point(model, form, examples, step: int, recipe: Recipe, seconds: float) -> Point:
    found = evaluate(model, form, examples, recipe.batch_size)
    estimator = recipe.options.get("estimator", "two_point")
    passes = passes_of(estimator, recipe.num_samples) if recipe.method == "mezo" else 3
    return Point(step, passes * step, seconds, found.accuracy, found.loss)
