"""Addax and seeds as experts as whole runs, since neither is a step of MeZO that `tune` could make.

Each function takes (model, form, train, passes, lr, seed) and spends `passes` forward passes of 16
examples, a backward pass counting as two.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from experiments.rules.addax import Addax
from experiments.rules.experts import best, scored, vote
from mezo import MeZO, trajectory
from mezo.demo.tune import batches
from mezo.evaluation.evaluate import chosen, evaluate, score
from mezo.models.modes import evaluating
from mezo.objectives import Form
from mezo.tasks import Example

BATCH = 16
ALPHA = 0.01  # of Addax; the paper tries 1e-4 to 1e-1
SHOWN, VOTERS = 96, 10  # examples that judge a direction, and the directions that vote
Accuracy = Callable[[Sequence[Example]], float]


def addax(model, form: Form, train: Sequence[Example], passes: int, lr: float, seed: int):
    """Tune by Addax, with gradients of the shorter half of the examples; the rate falls to 0."""
    optimizer = MeZO(model.named_parameters(), 0.0, seed=seed, perturbation="scratch")
    method, steps = Addax(optimizer, lr, ALPHA), max(1, passes // 5)
    features = sorted((form.encode(example) for example in train), key=lambda f: f["length"])
    half = len(features) // 2
    short, long = batches(features[:half], BATCH, seed), batches(features[half:], BATCH, seed)
    for step in range(steps):
        method.lr = lr * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = ALPHA * method.lr
        lengthy, brief = form.collate(next(long)), form.collate(next(short))
        with evaluating(model):
            method.step(form.closure(model, lengthy), lambda: form.loss(model, brief))  # noqa: B023
    return lambda examples: evaluate(model, form, examples).accuracy


def experts(model, form: Form, train: Sequence[Example], passes: int, sigma: float, seed: int):
    """Choose the best of random directions at scale `sigma`, and let them vote."""
    count = passes * BATCH // SHOWN
    optimizer = MeZO(
        model.named_parameters(), 0.0, eps=sigma, seed=seed, estimator=scored, num_samples=count
    )
    spread = train[:: max(1, len(train) // SHOWN)][:SHOWN]
    batch = form.collate([form.encode(example) for example in spread])
    with TemporaryDirectory() as folder, evaluating(model):
        path = Path(folder, "run.mezo")
        with trajectory.record(optimizer, path, model=model):
            optimizer.step(form.closure(model, batch))
        kept = best(trajectory.read(path).steps[0].record, VOTERS)

    def accuracy(examples: Sequence[Example]) -> float:
        features = [form.encode(example) for example in examples]
        found = vote(
            model,
            kept,
            lambda: torch.tensor(chosen(score(model, form, features))),
            seed=seed,
            sigma=sigma,
        )
        labels = torch.tensor([example.label for example in examples])
        return (found == labels).double().mean().item()

    return accuracy
