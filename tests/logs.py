"""Runs of a small network, and the logs that they leave."""

import copy
import math

import torch
from models import Regression

from mezo import MeZO, trajectory


def run(path, steps=10, model=None, **options):
    """A logged run of `steps` steps; returns the base model and the trained one."""
    model = model or Regression(torch.float32)
    base = copy.deepcopy(model)
    optimizer = MeZO(model.named_parameters(), **({"lr": 1e-2, "seed": 6} | options))
    with trajectory.record(optimizer, path, model=model, config={"task": "toy"}):
        for _ in range(steps):
            optimizer.step(model)
    optimizer.write()  # low-rank updates, which a replay writes at its end
    return base, model


def eventful(path, dtype=torch.float32):
    """A run with all that a log can hold: refused steps, cycles, schedules, several segments."""
    model = Regression(dtype)
    base = copy.deepcopy(model)
    groups = [
        {"params": [("first", model.first), ("bias", model.bias)], "weight_decay": 0.1},
        {"params": [("last", model.last)], "lr": 3e-3},
    ]
    optimizer = MeZO(groups, lr=1e-2, seed=6, num_samples=2, clip=4.0)
    with trajectory.record(optimizer, path, model=model, config={"task": "toy", "words": ["ä"]}):
        for step in range(40):
            if step == 5:
                optimizer.step(lambda: float("nan"))
            if step == 8:
                for probe in (0, 0, 1):
                    optimizer.estimate(model, probe)
                optimizer.step()
            if step == 12:
                optimizer.param_groups[0]["eps"] = optimizer.param_groups[1]["eps"] = 2e-3
            if step > 20:
                optimizer.param_groups[1]["lr"] = 3e-3 * (1 - step / 40)
            optimizer.step(model)
    with trajectory.record(optimizer, path, resume=True):
        optimizer.step(lambda: 0.5)  # projected_grads of 0
    return base, model


def steps(model, optimizer, until):
    while optimizer.param_groups[0]["step"] < until:
        step = optimizer.param_groups[0]["step"]
        optimizer.step(model if step != 7 else lambda: math.nan)


def make_parts(folder, dtype=torch.float32, **options):
    """A run to step 9, resumed on another machine at steps 4 and 6: without the earlier logs.

    whole.mezo is of all steps, the others of those they are named after.
    """
    model, saved = Regression(dtype), {}
    base = copy.deepcopy(model)
    optimizer = MeZO(model.named_parameters(), **({"lr": 1e-2, "seed": 6} | options))
    with trajectory.record(optimizer, folder / "whole.mezo", model=model):
        for until in (0, 4, 6, 9):
            steps(model, optimizer, until)
            saved[until] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for start, end in ((0, 4), (0, 6), (4, 6), (4, 9), (6, 9)):
        model.load_state_dict(saved[start][0])
        optimizer.load_state_dict(copy.deepcopy(saved[start][1]))
        path = folder / f"{start}-{end}.mezo"
        with trajectory.record(optimizer, path, model=model, resume=True):
            steps(model, optimizer, end)
    return base, {step: state for step, (state, _) in saved.items()}
