"""Going on with a run from its log: the weights are brought to its end without forward passes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezo.errors import InputError
from mezo.mezo import MeZO
from mezo.trajectory import start_values
from mezo.trajectory.files import read
from mezo.trajectory.format import Log
from mezo.trajectory.program import make_, program_of
from mezo.trajectory.writer import check_identity, entry_of


def catch_up(path: str | Path, optimizer: MeZO, *, until: int | None = None) -> int:
    """Bring the optimizer's weights from its step to the log's end; returns the steps made.

    The weights, buffers and step are then those of the run, to the bit: from the base model, or
    from any checkpoint of the run. An unfinished record at the end is left out. `until` stops after
    that step of the run. Go on with `record(optimizer, path, resume=True)`.

    Raises InputError if the log is another run's, or begins or ends elsewhere, or if an option
    remembers what the log does not hold (`forgotten`).
    """
    log, first = read(path), optimizer.param_groups[0]
    end = resumable(log) if until is None else min(until, resumable(log))
    if first["step"] < log.start:
        raise InputError(f"{path} starts at step {log.start}, the run is at step {first['step']}")
    steps = log.steps[first["step"] - log.start : max(end - log.start, 0)]
    if not steps:
        return 0
    own = optimizer.estimator.looks_back and f"estimator {first['estimator']}"
    if option := forgotten(first) or own:
        raise InputError(f"{path}: with {option} a run goes on from a checkpoint alone")
    _check(path, log, optimizer)
    where: dict[int, int] = {id(g): i for i, g in enumerate(optimizer.param_groups)}
    memory = optimizer.memory
    before: dict[str, Any] = {"past": memory.past, "number": memory.number}
    before |= {"known": optimizer.rules, "finish": False}
    programs = {i: program_of(log.header, steps, i, **before) for i in where.values()}
    entries = {entry["name"]: entry for entry in log.header["tensors"]}
    for name, p, group in optimizer.trained():
        state, program = optimizer.state.get(p, {}), programs[where[id(group)]]
        if not optimizer.weights.queue(optimizer, p, name, program):
            make_(p, entries[name], log.header, program, state)
        if state:
            optimizer.state[p] = state
    memory.past, memory.number = programs[0].past, programs[0].number
    for group in optimizer.param_groups:
        group["step"] = end
    return len(steps)


def forgotten(settings: Mapping[str, Any]) -> str | None:
    """The option of MeZO or MeZOConfig whose memory of the steps before no log holds, if one is."""
    rule = settings["rule"]
    found = {
        "clip_quantile": settings["clip_quantile"] is not None,
        "estimator one_point": settings["estimator"] == "one_point",
        "rule scalar_adam": "scalar_adam" in (rule, rule["name"] if type(rule) is dict else ""),
    }
    return next((option for option, remembers in found.items() if remembers), None)


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
    check_identity(header, optimizer, f"{path} is the log of another run")
    if first["step"] > log.start:
        return
    start_values.put_(header, {name: p for name, p, _ in optimizer.trained()})
    began = {entry["name"]: entry["sha256"] for entry in header["tensors"]}
    for name, p, _ in optimizer.trained():
        if entry_of(name, p)["sha256"] != began[name]:
            raise InputError(f"{path}: the run began with other values of {name}")
