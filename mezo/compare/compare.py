"""Many methods on one task and model; each cell is a run to resume, repeat or replay.

    found = compare(model_args, data_args, train_args, Settings(methods=("ft", "mezo")))

A cell is a method, a seed and, in a grid, a choice of hyperparameters: OUTPUT_DIR/METHOD/seed-S or
OUTPUT_DIR/METHOD/seed-S/learning_rate=0.001, with config.yaml (for `mezo train --config`),
result.json and, for MeZO, run.mezo. A cell that has a result is not run again, and one that was
interrupted is resumed. The seed is that of the split and of the run.
"""

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from mezo.compare import recipes, referee
from mezo.compare.grids import ASIDE, Grid, cells, finish, with_options
from mezo.errors import InputError
from mezo.foreign import read_options
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.runs.arguments import TrainArguments
from mezo.runs.data import task_of
from mezo.runs.data_arguments import DataArguments
from mezo.runs.plan import Tell, config_of
from mezo.runs.result import RESULT, make_folder
from mezo.tasks import Task

SUMMARY = "compare.json"  # in output_dir
CONFIG = "config.yaml"  # in a cell's folder
PAPERS = ("table15", "table16")
GRIDS = ("none", "default", *PAPERS)
_SAVED = "model*.safetensors* adapter_* *config.json *token*.json vocab.* merges.txt *.jinja"
_SAVED += " training_args.bin README.md"  # by the Trainer with the weights


@dataclass(frozen=True)
class Settings:
    """What to compare. `grid` is one of GRIDS, or a YAML file with a section for each method.

    A section with `like: METHOD` makes a method of its own, which begins with that one's recipe.
    """

    methods: Sequence[str] = recipes.DEFAULT
    seeds: Sequence[int] = (13, 21, 42)
    grid: str = "none"
    max_steps: int = 2000  # of MeZO
    adam_steps: int | None = None  # default: a tenth of max_steps
    keep_weights: bool = False
    equal: str = "steps"  # one of referee.EQUAL


@dataclass(frozen=True)
class Cell:
    """One planned run, with the options of `mezo train`."""

    method: str
    seed: int
    name: str  # of its hyperparameters; "" without
    model: ModelArguments
    data: DataArguments
    args: TrainArguments

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)


def compare(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    settings: Settings = Settings(),
    *,
    given: Collection[str] = (),
    on_cell: Callable[[int, int, Cell, str], None] = lambda at, number, cell, what: None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Run every cell that has no result yet; returns and writes OUTPUT_DIR/compare.json.

    Args:
        args: what all methods share; a method's recipe overrides it, except options in `given`.
        given: names of options that were set by hand.
        on_cell: called before each cell runs, with its place, the number of cells, the cell, and
            "run", "resumed" or "found".
        tell: called with each line that a run says, such as how far it is.

    A method that cannot be run here (a linear probe of a task that generates) is named with the
    reason under "refused". Raise InputError if no method can run.
    """
    if "learning_rate" in given:
        raise InputError("one learning_rate does not suit all methods: give --grid FILE.yaml")
    if data_args.k is None and data_args.num_train is None:
        data_args = replace(data_args, num_train=1000)  # as the paper's runs on OPT
    if data_args.k is None and data_args.num_test is None:
        data_args = replace(data_args, num_test=1000)
    make_folder(args.output_dir)
    parameters = models.parameters_of(model_args)
    grids = _grids(settings, parameters, task_of(data_args), data_args.k)
    grids, refused = _at_equal(settings.equal, grids, (model_args, data_args, args), tell)
    planned = plan(model_args, data_args, args, settings, grids, given)
    found: list[dict[str, Any]] = []
    for at, cell in enumerate(planned, start=1):
        if cell.method in refused:
            continue
        try:
            found.append(_run(cell, partial(on_cell, at, len(planned), cell), tell))
        except InputError as error:
            refused[cell.method] = str(error)
            continue
        finally:
            if args.process_index == 0:  # of several processes the first one alone writes
                _tidy(cell, settings.keep_weights)
        summary = _summary(found, refused, parameters, settings)
        _write(args, summary)
    if not found:
        raise InputError("; ".join(dict.fromkeys(refused.values())))
    summary = _summary(found, refused, parameters, settings)
    _write(args, summary)
    return summary


def _write(args: TrainArguments, summary: dict[str, Any]) -> None:
    """Write the summary, in the first of several processes."""
    if args.process_index == 0:
        text = json.dumps(summary, indent=1, default=str)
        Path(args.output_dir, SUMMARY).write_text(text)


def plan(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    settings: Settings,
    grids: int | Mapping[str, Grid],
    given: Collection[str] = (),
) -> list[Cell]:
    """Return all cells, seed by seed, so that a first row of the table is there early.

    `grids` are by method, or the number of the model's weights, from which they follow.
    """
    if not settings.seeds:
        raise InputError("no seeds to compare with")
    if isinstance(grids, int):
        grids = _grids(settings, grids, task_of(data_args), data_args.k)
    made = []
    for seed in settings.seeds:
        for method in grids:
            if method in ("zero-shot", recipes.CALIBRATED) and seed != settings.seeds[0]:
                continue  # it has no seed
            grid = {name: value for name, value in grids[method].items() if name not in given}
            for name, options in cells(grid):
                made.append(_cell(model_args, data_args, args, (method, seed, name), options))
    return made


def _grids(settings: Settings, parameters: int, task: Task, k: int | None) -> dict[str, Grid]:
    steps = settings.max_steps
    if steps < 10:
        raise InputError(f"max_steps must be at least 10, got {steps}")
    if settings.grid not in GRIDS and not Path(settings.grid).suffix:
        raise InputError(f"grid must be {', '.join(GRIDS)} or a YAML file, got {settings.grid!r}")
    own: Any = {}
    if settings.grid not in GRIDS:
        expected = "sections 'method:' with lines 'option: value'"
        own = read_options(settings.grid, f"grid {settings.grid}", expected)
    bases = recipes.begins_with(settings.grid, own)
    methods = tuple(dict.fromkeys(settings.methods))
    recipes.check(bases.get(method, method) for method in methods)
    adam = settings.adam_steps or max(10, steps // 10)
    made = {
        method: recipes.recipe(bases.get(method, method), parameters, steps, adam)
        for method in methods
    }
    if settings.grid == "default":
        return {method: recipes.searched(one) for method, one in made.items()}
    if settings.grid in PAPERS:
        table = {method: recipes.of_paper(settings.grid, method, task, k) for method in methods}
        return {method: made[method] | (table[method] or {}) for method in methods}
    sections = recipes.of_file(settings.grid, own, methods)
    return {method: made[method] | sections.get(method, {}) for method in methods}


Arguments = tuple[ModelArguments, DataArguments, TrainArguments]


def _at_equal(
    kind: str, grids: dict[str, Grid], arguments: Arguments, tell: Tell
) -> tuple[dict[str, Grid], dict[str, str]]:
    """Return the grids at an equal budget, and the methods that have none, with the reason."""
    model, data, _ = arguments
    timed: dict[str, float] = {}

    def seconds(method: str, grid: Grid) -> float:
        if method not in timed:
            tell(f"timing a step of {method}, in two short runs")
            timed[method] = (_timed(arguments, grid, 6) - _timed(arguments, grid, 2)) / 4
        return timed[method]

    memory = referee.memory_of(model.model_name_or_path, model.dtype, data.max_length)
    return referee.at_equal(kind, grids, memory, seconds)


def _timed(arguments: Arguments, grid: Grid, steps: int) -> float:
    """Return the seconds of a short run's training, whose results are dropped."""
    model, data, args = arguments
    (_, options), *_ = cells(grid)
    with tempfile.TemporaryDirectory() as folder:
        options |= {"max_steps": steps, "eval_strategy": "no", "save_strategy": "no"}
        options |= {"load_best_model_at_end": False, "output_dir": folder, "num_test": 1}
        model, data = with_options(model, options), with_options(data, options)
        result = finish(model, data, with_options(args, options))
    return float(result["seconds_of_training"])


def _cell(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    place: tuple[str, int, str],
    options: dict[str, Any],
) -> Cell:
    method, seed, name = place
    name = "" if name == "cell" else name
    data = with_options(replace(data_args, split_seed=seed), options)
    if data.data_dir is not None:  # there is one few-shot folder per seed
        data = replace(data, data_dir=data.data_dir.replace("{seed}", str(seed)))
    folder = Path(args.output_dir, method, f"seed-{seed}", name)
    own = with_options(args, options | {"seed": seed, "output_dir": str(folder)})
    return Cell(method, seed, name, with_options(model_args, options), data, own)


def _run(cell: Cell, told: Callable[[str], None], tell: Tell) -> dict[str, Any]:
    """Return the row of a cell: what its result says, and the commands that make it again."""
    options = options_of(cell)
    make_folder(str(cell.folder))

    def begun(what: str) -> None:
        told(what)
        if what != "found" and cell.args.process_index == 0:  # what is found has its own
            text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
            (cell.folder / CONFIG).write_text(text)

    result = finish(cell.model, cell.data, cell.args, begun, tell)
    kept = ("dev", "test", "steps", "kept_step", "seconds", "forward_passes", "stored_bytes")
    row = {"method": cell.method, "seed": cell.seed, "name": cell.name, "folder": str(cell.folder)}
    row |= {key: result[key] for key in kept}
    row |= {"task": result["task"], "model": result["model"], "metric": result["metric"]}
    peak = result.get("peak_memory_of_steps", result["peak_memory_above_model"])
    row |= {"peak_memory": max(0, peak)}
    row |= {"curve": result.get("curve", []), "environment": result["environment"]}
    again = f"{cell.folder}-again"  # the folder itself has a run, which is not overwritten
    row["command"] = shlex.join([*train_command(options), "--output_dir", again])
    log = cell.folder / "run.mezo"
    row["replay"] = shlex.join(replay_command(cell, result)) if log.is_file() else None
    return row


def options_of(cell: Cell) -> dict[str, Any]:
    """Return the options of mezo train that make the cell, without output_dir and defaults.

    Arguments with another device would make accelerate forget the process group that there is: each
    process would take itself for the first one.
    """
    where = {name: getattr(cell.args, name) for name in ("use_cpu", "ddp_backend")}
    plain = config_of(ModelArguments(), DataArguments(), TrainArguments("any", **where))
    plain = {name: value for name, value in plain.items() if name not in where}
    given = config_of(cell.model, cell.data, cell.args)
    first = {"model_name_or_path": cell.model.model_name_or_path, "task": cell.data.task}
    chosen = {
        n: v for n, v in given.items() if n not in ASIDE and not (n in plain and v == plain[n])
    }
    return first | chosen


def train_command(options: dict[str, Any]) -> list[str]:
    """Return `mezo train` with these options."""
    words = ["mezo", "train"]
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words.append(f"--{name}={text}")  # in one word, which may begin with a dash
    return words


def replay_command(cell: Cell, result: dict[str, Any]) -> list[str]:
    """`mezo eval --replay`: the tuned model from the base model and the log, tested again.

    `mezo replay` where the test examples are no file of their own but split off the training set.
    """
    options, data = options_of(cell), cell.data
    if data.train_file and not (data.data_dir or data.test_file):
        if data.dev_file is None:
            words = ["mezo", "replay", "--model", cell.model.model_name_or_path]
            words += ["--log", str(cell.folder / "run.mezo"), "--output_dir", "replayed"]
            return [*words, "--until", str(result["kept_step"])]
        options["test_file"] = data.dev_file  # as data.load_splits
    known = asdict(cell.data).keys() | {"model_name_or_path", "model_revision", "dtype"}
    words = train_command({name: v for name, v in options.items() if name in known})
    words = ["mezo", "eval", *words[2:], "--replay", str(cell.folder / "run.mezo")]
    return [*words, "--until", str(result["kept_step"])]


def _tidy(cell: Cell, keep_weights: bool) -> None:
    """Delete the checkpoints of a finished cell; MeZO's weights are in its log,
    Adam's can be remade."""
    if not (cell.folder / RESULT).is_file():
        return
    for checkpoint in cell.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if not keep_weights:
        for pattern in _SAVED.split():
            for path in cell.folder.glob(pattern):
                path.unlink()


def best_of(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each method and seed the cell that is best on the dev examples, the first of equals."""
    chosen: dict[tuple[str, int], dict[str, Any]] = {}
    for row in found:
        key = row["method"], row["seed"]
        if key not in chosen or row["dev"] > chosen[key]["dev"]:
            chosen[key] = row
    return list(chosen.values())


def _summary(
    found: Sequence[dict[str, Any]],
    refused: dict[str, str],
    parameters: int,
    settings: Settings,
) -> dict[str, Any]:
    chosen, metric = best_of(found), found[0]["metric"] if found else ""
    for row in found:
        row["chosen"] = any(row is one for one in chosen)
    rows = []
    for method in dict.fromkeys(row["method"] for row in chosen):
        own = [row for row in chosen if row["method"] == method]
        tests = [row["test"][metric] for row in own]
        table: dict[str, Any] = {"method": method, "mean": mean(tests), "n": len(own)}
        table["interval"] = referee.interval(tests)
        table |= {"std": stdev(tests) if len(own) > 1 else None, "values": tests}
        table["dev"] = mean(row["dev"] for row in own)
        for name in ("peak_memory", "seconds", "forward_passes", "stored_bytes", "steps"):
            table[name] = mean(row[name] for row in own)
        rows.append(table | {"folders": [row["folder"] for row in own]})
    order = {method: at for at, method in enumerate(settings.methods)}
    head = {name: found[0][name] for name in ("task", "model", "metric", "environment") if found}
    return head | {
        "equal": settings.equal,
        "parameters": parameters,
        "grid": settings.grid,
        "seeds": list(settings.seeds),
        "rows": sorted(rows, key=lambda row: order[row["method"]]),
        "refused": refused,
        "cells": list(found),
    }
