"""Resume a run from its log: bring the weights to the log's end without forward passes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezo.errors import InputError
from mezo.mezo import MeZO
from mezo.trajectory import start_values
from mezo.trajectory.files import read
from mezo.trajectory.fingerprints import entry_of
from mezo.trajectory.format import Log
from mezo.trajectory.identity import check_identity
from mezo.trajectory.program import make_, program_of


def catch_up(path: str | Path, optimizer: MeZO, *, until: int | None = None) -> int:
    """Bring the optimizer's weights from its step to the log's end; return the steps replayed.

    Afterwards the weights, buffers and step count are those of the run, to the bit, whether the
    optimizer began at the base model or at a checkpoint of the run. An unfinished record at the
    log's end is ignored. Continue with `record(optimizer, path, resume=True)`.

    Args:
        path: The run log.
        optimizer: An optimizer with the run's options, on the base model or a checkpoint's weights.
        until: The largest step count to bring the optimizer to; None goes to the log's end.

    Raises InputError if the log is of another run or starts after the optimizer's step, or if an
    option depends on values that no log holds (`forgotten`).
    """
    log, first = read(path), optimizer.param_groups[0]
    end = resumable(log) if until is None else min(until, resumable(log))
    if first["step"] < log.start:
        raise InputError(f"{path} starts at step {log.start}, the run is at step {first['step']}")
    steps = log.steps[first["step"] - log.start : max(end - log.start, 0)]
    if not steps:
        return 0
    looking_back = optimizer.estimator.looks_back and f"estimator {first['estimator']}"
    if option := forgotten(first) or looking_back:
        raise InputError(f"{path}: a run with {option} can only resume from a checkpoint")
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
    """Return the option that depends on values of earlier steps which no log holds, or None.

    `settings` are the options of MeZO or of MeZOConfig.
    """
    rule = settings["rule"]
    options = {
        "clip_quantile": settings["clip_quantile"] is not None,
        "estimator one_point": settings["estimator"] == "one_point",
        "rule scalar_adam": "scalar_adam" in (rule, rule["name"] if type(rule) is dict else ""),
    }
    return next((option for option, remembers in options.items() if remembers), None)


def resumable(log: Log) -> int:
    """Return the step at which to resume: before any refused steps at the log's end.

    An interrupt may be why they were refused, so they are repeated; if the loss was the reason,
    they are refused again.
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
