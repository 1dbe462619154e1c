"""Going on with a run from its log: the weights are brought to its end without forward passes."""

import math
from pathlib import Path

from ..errors import InputError
from ..mezo import MeZO
from .format import Log, read
from .moves import make_, moves_of
from .writer import entry_of


def catch_up(path: str | Path, optimizer: MeZO, *, until: int | None = None) -> int:
    """Bring the optimizer's weights from its step to the log's end; returns the steps made.

    The weights, buffers and step are then those of the run, to the bit: from the base model, or
    from any checkpoint of the run. An unfinished record at the end is left out. `until` stops after
    that step of the run. Go on with `record(optimizer, path, resume=True)`.

    Raises InputError if the log is another run's, or begins or ends elsewhere, or if clip_quantile
    is set: its history is of sizes that the log does not hold.
    """
    log, first = read(path), optimizer.param_groups[0]
    end = resumable(log) if until is None else min(until, resumable(log))
    if first["step"] < log.start:
        raise InputError(f"{path} starts at step {log.start}, the run is at step {first['step']}")
    steps = log.steps[first["step"] - log.start : max(end - log.start, 0)]
    if not steps:
        return 0
    if first["clip_quantile"] is not None:
        raise InputError(f"{path}: with clip_quantile a run goes on from a checkpoint alone")
    _check(path, log, optimizer)
    where: dict[int, int] = {id(g): i for i, g in enumerate(optimizer.param_groups)}
    tables = {i: moves_of(log.header, steps, i, finish=False) for i in set(where.values())}
    for name, p, group in optimizer.trained():
        state = optimizer.state.get(p, {})
        make_(p, name, log.header, tables[where[id(group)]], state)
        if state:
            optimizer.state[p] = state
    for group in optimizer.param_groups:
        group["step"] = end
    return len(steps)


def resumable(log: Log) -> int:
    """The step to go on at: before those refused at the end, where an interrupt may be why.

    They are made again, and refused again if it was the loss.
    """
    steps = len(log.steps)
    while steps and not all(map(math.isfinite, log.steps[steps - 1].record.projected_grads)):
        steps -= 1
    return log.start + steps


def _check(path: str | Path, log: Log, optimizer: MeZO) -> None:
    first, header = optimizer.param_groups[0], log.header
    for option in ("seed", "distribution", "rounding"):
        if header[option] != first[option]:
            raise InputError(f"{path}: the run's {option} is {header[option]}, not {first[option]}")
    if header["perturbation"] != optimizer.perturbation:
        here = optimizer.perturbation
        raise InputError(f"{path}: the run was perturbed {header['perturbation']}, not {here}")
    if optimizer.perturbation == "low_rank":
        for option in ("rank", "interval"):
            if header[option] != first[option]:
                here = f"{header[option]}, not {first[option]}"
                raise InputError(f"{path}: the run's {option} is {here}")
    index = {id(g): i for i, g in enumerate(optimizer.param_groups)}
    groups = {name: index[id(group)] for name, _, group in optimizer.trained()}
    if groups != {entry["name"]: entry["group"] for entry in header["tensors"]}:
        raise InputError(f"{path}: the run trained other tensors, or in other parameter groups")
    if first["step"] > log.start:
        return
    began = {entry["name"]: entry["sha256"] for entry in header["tensors"]}
    for name, p, _ in optimizer.trained():
        if entry_of(name, p)["sha256"] != began[name]:
            raise InputError(f"{path}: the run began with other values of {name}")
