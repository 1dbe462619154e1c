"""Equal budgets: how many steps, of which batch, each method of a comparison may take.

    passes    as many examples forward as MeZO, a backward pass counting as two forward passes
    time      as many seconds of training as MeZO, from a few steps of each method
    memory    as passes, with activation checkpointing and the largest batch whose estimated
              memory is at most MeZO's; a method that does not fit at batch 1 is refused

Memory is that of `mezo memory`: estimated from the model's config, equal on every machine.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import mean, stdev
from types import SimpleNamespace

import torch

from mezo.compare import recipes
from mezo.compare.paper_grids import Grid
from mezo.errors import InputError
from mezo.runs.arguments import TrainArguments
from mezo.runs.methods import passes_of_a_step
from mezo.trainers.changes import defaults_of

EQUAL = ("steps", "passes", "time", "memory")
BATCHES = (16, 8, 4, 2, 1)
LENGTH = 300  # tokens of an example, as in `mezo memory`, if there is no --max_length
PLANS = {"ft": "adam_checkpointing", "ft-checkpointing": "adam_checkpointing"}
PLANS |= {"lora": "lora_checkpointing", "lora-checkpointing": "lora_checkpointing"}
Seconds = Callable[[str, Grid], float]  # of a step of a method
Memory = Callable[[str, int], int]  # estimated bytes of a plan (mezo.memory.plan) and a batch
Refused = dict[str, str]  # reasons, by method


def at_equal(
    kind: str, grids: Mapping[str, Grid], memory: Memory, seconds: Seconds
) -> tuple[dict[str, Grid], Refused]:
    """Return the grids with the steps and batches of an equal budget, and what does not fit.

    The budget is that of the method "mezo", or else of the first method that begins with it.
    Methods that are not trained have no budget. Raises InputError if no MeZO run sets one.
    """
    if kind not in EQUAL:
        raise InputError(f"equal must be one of {', '.join(EQUAL)}, got {kind!r}")
    if kind == "steps":
        return dict(grids), {}
    first = _standard(grids)
    made: dict[str, Grid] = {}
    refused: Refused = {}
    for method, grid in grids.items():
        own: Grid | None = grid
        if kind == "memory" and grid["method"] == "adam":
            own = _fitted(method, grid, memory, _batch(grids[first]))
        if own is None:
            refused[method] = _reason(method, memory, _batch(grids[first]))
        else:
            made[method] = own
    for method, grid in made.items():
        if "max_steps" in grid and method != first:
            cost = seconds if kind == "time" else _examples
            ratio = cost(first, made[first]) / cost(method, grid)
            made[method] = grid | {"max_steps": max(1, round(made[first]["max_steps"] * ratio))}
    return made, refused


def _standard(grids: Mapping[str, Grid]) -> str:
    trained = [method for method, grid in grids.items() if grid["method"] == "mezo"]
    if not trained:
        raise InputError("equal budgets are MeZO's: add mezo to --methods")
    return "mezo" if "mezo" in trained else trained[0]


def _batch(grid: Grid) -> int:
    size = grid["per_device_train_batch_size"]
    if isinstance(size, list):
        raise InputError(f"an equal budget needs one batch size, not {size}")
    return int(size)


def _examples(method: str, grid: Grid) -> float:
    """Return the examples that a step takes through the model forward, a backward pass twice."""
    known = {name: value for name, value in grid.items() if name in _PASSES or "checkpoint" in name}
    options = SimpleNamespace(**(defaults_of(TrainArguments) | known))  # not made: see options_of
    return passes_of_a_step(options) * _batch(grid)


_PASSES = ("method", "num_samples", "estimator", "fresh_batches")


def _fitted(method: str, grid: Grid, memory: Memory, batch: int) -> Grid | None:
    """Return the grid with checkpointing and the largest batch that fits, or None."""
    if method not in PLANS:
        return None
    room = memory("in_place", batch)
    for size in BATCHES:
        if memory(PLANS[method], size) <= room:
            return grid | recipes.checkpointed() | {"per_device_train_batch_size": size}
    return None


def _reason(method: str, memory: Memory, batch: int) -> str:
    if method not in PLANS:
        return "its memory is not estimated"
    takes, room = memory(PLANS[method], 1) / 2**20, memory("in_place", batch) / 2**20
    return f"does not fit: {takes:,.0f} MiB at batch 1, where MeZO takes {room:,.0f} at {batch}"


def memory_of(model: str, dtype: str, length: int | None) -> Memory:
    """Return the estimate of `mezo memory` for a model, by plan and batch.

    Weights of 16 bits are perturbed in scratch instead of in place.
    """

    @cache
    def estimated(plan: str, batch: int) -> int:
        from mezo.memory.plan import Planner, config_of  # slow to import

        config = config_of(model)
        kind = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
        context = getattr(config, "max_position_embeddings", None) or LENGTH
        if plan == "in_place" and kind != torch.float32:
            plan = "scratch"
        planner = Planner(config, kind, batch, min(length or LENGTH, context))
        return planner.plan(plan, 1).device

    return estimated


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean over seeds (Student's t); None for one."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    t = _T[freedom - 1] if freedom <= len(_T) else 2.0
    half = t * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


_T: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
