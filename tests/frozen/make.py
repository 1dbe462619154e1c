"""Writes the frozen logs: one for each cell that has none yet, and what its replay must give.

    PYTHONPATH=.:tests python -m frozen.make            # from the repository's root

The logs in logs/ were written by the version of the package before its redesign, commit 4da56f9,
and are never written again: tests/trajectory/test_frozen_logs.py holds every later version to
their bits. Where a cell is new, run this, look at the two files that it changes, and commit them.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from frozen.cells import CELLS, Cell
from frozen.toy_models import Toy, build, digests

from mezo import MeZO, trajectory
from mezo.closures import Mean, Paired
from mezo.rules import RULES
from mezo.schedules import Schedule, linear

HERE = Path(__file__).parent
LOGS, INDEX = HERE / "logs", HERE / "index.json"
DEFAULTS: dict[str, Any] = {"lr": 0.05, "eps": 1e-2, "seed": 6}


class Stopped(Exception):
    """What a closure raises, where a cell says so."""


def write(cell: Cell, path: Path) -> dict[str, Any]:
    """Make the cell's run, with its log at `path`; returns its entry in the index.

    The entry says how the base model is built, and the digests of the weights after the last step
    of the log and after half of its steps.
    """
    base = {"name": cell.model, "dtype": cell.dtype}
    model = build(base)
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder, f"{i}.mezo") for i in range(2 if cell.split else 1)]
        _run(cell, model, parts)
        _save(cell, parts, path)
        entry = {"base": base, "log": path.name, "start": 0, "final": digests(model)}
        if cell.form == "later":  # begins with the weights that the first log ends with
            entry["start"] = cell.split
            entry["base"] = base | {"after": f"{path.stem}.before.mezo"}
            shutil.copy(parts[0], path.with_suffix(".before.mezo"))
        start = rebuilt(entry["base"], path.parent)
    until = (entry["start"] + cell.steps) // 2 if not cell.split else cell.split + 1
    half = trajectory.replay(path, start, until=until)
    return entry | {"until": until, "half": digests(half)}


def rebuilt(base: dict[str, str], logs: Path) -> Toy:
    """The model that a log starts from."""
    model = build(base)
    return trajectory.replay(logs / base["after"], model) if "after" in base else model


def _save(cell: Cell, parts: list[Path], path: Path) -> None:
    path.unlink(missing_ok=True)
    if cell.form in ("compact", "without_losses"):
        trajectory.compact(parts[0], path, losses=cell.form == "compact")
    elif cell.form == "merged":
        trajectory.merge(parts[::-1], path)
    else:
        shutil.copy(parts[-1], path)


def _run(cell: Cell, model: Toy, parts: list[Path]) -> None:
    optimizer = _optimizer(cell, model)
    rates = [group["lr"] for group in optimizer.param_groups]
    others = {k: v for k, v in cell.schedule.items() if k != "lr"}
    stairs = {k: linear(*ends, cell.steps, stairs=4) for k, ends in others.items()}
    schedule = Schedule(optimizer, **stairs)
    part = iter(parts)
    path = next(part)
    schedule.step()  # the log's first header has what is in force in step 0
    writer = trajectory.record(optimizer, path, model=model, config={"task": "toy"})
    for step in range(cell.steps):
        if step in cell.written:
            optimizer.write()
        schedule.step()
        if "lr" in cell.schedule:
            first, last = cell.schedule["lr"]
            factor = first + (last - first) * step / (cell.steps - 1)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        if step in cell.resumed or (step and step == cell.split):
            writer.close()
            path = next(part) if step == cell.split else path
            writer = trajectory.record(optimizer, path, model=model, resume=True)
        _step(cell, model, optimizer, step)
    writer.close()
    optimizer.write()  # a replay ends with every matrix up to date


def _optimizer(cell: Cell, model: Toy) -> MeZO:
    options = DEFAULTS | cell.options
    if "rule" in options:
        given = dict(options["rule"])
        options["rule"] = RULES[given.pop("name")](**_tuples(given))
    named = list(model.named_parameters())
    if not cell.groups:
        return MeZO(named, **options)
    groups = [{"params": [row for row in named if not _in(row[0], cell.groups)]}]
    for part, own in cell.groups.items():
        groups.append({"params": [row for row in named if part in row[0]], **own})
    return MeZO(groups, **options)


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(x) if isinstance(x, list) else x for key, x in given.items()}


def _in(name: str, parts: Any) -> bool:
    return any(part in name for part in parts)


def _step(cell: Cell, model: Toy, optimizer: MeZO, step: int) -> None:
    if step in cell.refused:
        optimizer.step(lambda: float("nan"))
    elif step in cell.raised:
        with contextlib.suppress(Stopped):
            optimizer.step(_stopping(lambda: model.loss(step)))
    elif step in cell.accumulated:
        for probe in range(cell.options.get("num_samples", 1)):
            for batch, examples in ((step, 3), (step + 1, 5)):
                optimizer.estimate(Mean(lambda batch=batch: model.loss(batch), examples), probe)
        optimizer.step()
    elif cell.paired:
        optimizer.step(_paired(model, step))
    else:
        optimizer.step(lambda: model.loss(step))


def _stopping(closure: Callable[[], float]) -> Callable[[], float]:
    """Raises when it is called for the second time."""
    calls: list[float] = []

    def stopping() -> float:
        if calls:
            raise Stopped
        calls.append(closure())
        return calls[0]

    return stopping


def _paired(model: Toy, batch: int) -> Paired:
    def halves(both) -> tuple[float, float]:
        with both(batch_size=3):
            losses = model.rows(batch, 2)
        return sum(losses[:3]) / 3, sum(losses[3:]) / 3

    return Paired(lambda: sum(model.rows(batch, 1)) / 3, halves)


def main() -> int:
    """Write what is missing, and say what was written."""
    torch.set_num_threads(1)
    LOGS.mkdir(exist_ok=True)
    index = json.loads(INDEX.read_text()) if INDEX.exists() else {}
    new = [name for name in CELLS if name not in index]
    for name in new:
        index[name] = write(CELLS[name], LOGS / f"{name}.mezo")
    INDEX.write_text(json.dumps(dict(sorted(index.items())), indent=0) + "\n")
    sys.stdout.write(f"{len(new)} logs written, {len(index)} in the index\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
