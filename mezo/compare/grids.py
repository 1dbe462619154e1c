"""The paper's grids of hyperparameters, and a search over one: best by the dev examples.

    mezo train --grid table16-mezo --model facebook/opt-13b --task sst2 --output_dir runs/grid
    mezo train --grid mine.yaml ...         # learning_rate: [1e-6, 1e-7], mezo_eps: 1e-3, ...

A grid consists of options of `mezo train`; those whose value is a list are its axes. An option on
the command line replaces the grid's. Each cell is a run in a folder of its own. A cell that has a
result is not run again, and one that was interrupted is resumed.
"""

import itertools
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from mezo.compare.paper_grids import GRIDS, Grid, on_task
from mezo.distributed.processes import together
from mezo.errors import InputError
from mezo.foreign import read_json, read_options
from mezo.models.arguments import ModelArguments
from mezo.runs import rates
from mezo.runs.arguments import TrainArguments
from mezo.runs.data import task_of
from mezo.runs.data_arguments import DataArguments
from mezo.runs.plan import Tell, config_of
from mezo.runs.result import RESULT, make_folder
from mezo.runs.task import train
from mezo.trainers.checkpoints import last_checkpoint
from mezo.trainers.config import changed

SUMMARY = "grid.json"  # in output_dir


def load(name: str, num_dev: int = 500) -> Grid:
    """Return a grid of the paper by its name, or that of a YAML file.

    `num_dev` is the number of the task's dev examples in the paper. Raise InputError for unknown
    options.
    """
    if name in GRIDS:
        return on_task(name, num_dev)
    if not Path(name).suffix:
        near = get_close_matches(name, GRIDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(GRIDS)}, or a YAML file"
        raise InputError(f"grid {name!r} is unknown; {hint}")
    found = read_options(name, f"grid {name}", "lines 'option: value' or 'option: [value, ...]'")
    return {option: values_of(name, str(option), value) for option, value in found.items()}


def values_of(name: str, option: str, value: Any) -> Any:
    """Return the value of an option of a file, or its list of values, in the option's type."""
    known = {f.name: f for kind in _KINDS for f in fields(kind)}
    if option not in known or option == "output_dir":
        near = get_close_matches(option, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"grid {name}: no option {option!r} of mezo train{hint}")
    if value == []:
        raise InputError(f"grid {name}: {option} is an empty list")
    if isinstance(value, list):
        return [values_of(name, option, one) for one in value]
    numbers = {"float": float, "int": int, "bool": bool}
    kind = next((word for word in numbers if word in str(known[option].type)), None)
    try:
        if kind == "float":
            return float(value)  # YAML reads 1e-6 as text
    except (TypeError, ValueError):
        raise InputError(f"grid {name}: {option} must be a number, got {value!r}") from None
    if kind in ("int", "bool") and not isinstance(value, numbers[kind]):
        raise InputError(f"grid {name}: {option} must be of type {kind}, got {value!r}")
    return value


_KINDS = (ModelArguments, DataArguments, TrainArguments)
_SEVERAL = ("lora_target_modules", "candidates", "labels")  # options whose value is a list


def cells(grid: Grid) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, options) of every combination: the axes make the name, the first varies last."""
    axes = {name: value for name, value in grid.items() if _is_axis(name, value)}
    fixed = {name: value for name, value in grid.items() if name not in axes}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = ",".join(f"{axis}={value}" for axis, value in chosen.items())
        yield name.replace("/", "_") or "cell", fixed | chosen


def _is_axis(option: str, value: Any) -> bool:
    """Return whether a value is a list of values to try, and not one value of a list option."""
    if not isinstance(value, list):
        return False
    return option not in _SEVERAL or any(isinstance(one, list) for one in value)


def chosen_cells(
    data_args: DataArguments, grid: str, given: Collection[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Return name and options of each cell, without what was asked for by hand."""
    own = load(grid, task_of(data_args).num_dev)
    return list(cells({name: value for name, value in own.items() if name not in given}))


def search(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    grid: str,
    *,
    given: Collection[str] = (),
    on_cell: Callable[[str, str], None] = lambda name, what: None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Run every cell of a grid that has no result yet; returns and writes what came out.

    Args:
        grid: a name in GRIDS, or a YAML file.
        given: options that were set by hand, of which the grid's values do not count.
        on_cell: called with each cell and "run", "resumed" or "found".
        tell: called with each line that a run says, such as how far it is.

    Returns {"grid", "cells": [{"name", "options", "dev", "test", "seconds", ...}], "best", ...};
    best is the folder of the cell with the highest metric on the dev examples, the first of equals.
    """
    chosen = chosen_cells(data_args, grid, given)
    make_folder(args.output_dir)
    found: list[dict[str, Any]] = []
    for name, options in chosen:
        model, data = with_options(model_args, options), with_options(data_args, options)
        own = with_options(args, options | {"output_dir": str(Path(args.output_dir, name))})
        result = finish(model, data, own, partial(on_cell, name), tell)
        kept = ("dev", "test", "steps", "seconds", "forward_passes", "stored_bytes")
        found.append({"name": name, "options": options} | {key: result[key] for key in kept})
        best = max(found, key=lambda cell: cell["dev"])  # the first of equals
        summary = {
            "grid": grid,
            "task": result["task"],
            "model": result["model"],
            "method": result["method"],
            "best": str(Path(args.output_dir, best["name"])),
            "dev": best["dev"],
            "test": best["test"],
            "metric": result["metric"],
            "cells": found,
        }
        if args.process_index == 0:  # of several processes the first one alone writes
            Path(args.output_dir, SUMMARY).write_text(json.dumps(summary, indent=1, default=str))
    return summary


def finish(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    told: Callable[[str], None] = lambda what: None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """The result of a cell: that of its folder, else of the run, begun or gone on with.

    `told` is called before it runs, with "run", "resumed" or "found". Raise InputError if the
    folder's result has other options.
    `tell` is called with the lines of the run itself.
    """
    args = rates.resolved(model_args, args)
    result, what = _finished(model_args, data_args, args), "found"
    if result is None:
        going_on = Path(args.output_dir, "run.mezo").exists() or last_checkpoint(args.output_dir)
        what = "resumed" if going_on else "run"
    together()  # all have looked before the first one writes a result
    told(what)
    if result is None:
        resumed = replace(args, resume_from_checkpoint=_RESUME[what])
        result = train(model_args, data_args, resumed, tell)
    return result


_RESUME = {"run": None, "resumed": "true"}
ASIDE = ("output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to")  # of no result


def with_options(kind: Any, options: dict[str, Any]) -> Any:
    """Return a copy of the arguments with those of the options that they have."""
    return replace(kind, **{f.name: options[f.name] for f in fields(kind) if f.name in options})


def as_options(model: ModelArguments, data: DataArguments, args: TrainArguments) -> list[str]:
    """Return the words of `mezo train` for the options that are not its defaults."""
    words: list[tuple[str, Any]] = []
    for given, default in ((model, ModelArguments()), (data, DataArguments())):
        own = {f.name: getattr(given, f.name) for f in fields(given)}
        words += [(k, v) for k, v in own.items() if v != getattr(default, k)]
    plain = changed(TrainArguments(use_cpu=args.use_cpu))
    found = {k: v for k, v in changed(args).items() if v != plain.get(k)}
    words += [(k, v) for k, v in found.items() if k == "output_dir" or k not in ASIDE]
    argv = []
    for name, value in words:
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={value}")
    return argv


def _finished(model: ModelArguments, data: DataArguments, args: TrainArguments) -> dict | None:
    """Return the result of a cell that ran with the same options; None where there is none yet."""
    path = Path(args.output_dir, RESULT)
    if not path.is_file():
        return None
    result = read_json(path)
    had = result.get("config") if isinstance(result, dict) else None
    if not isinstance(had, dict):
        raise InputError(f"{path} is not the result of a run: delete it to run the cell again")
    asked = json.loads(json.dumps(config_of(model, data, args), default=str))
    for name in asked.keys() | had.keys():
        if name not in ASIDE and asked.get(name) != had.get(name):
            raise InputError(
                f"{path} is of a run with {name} {had.get(name)}, not {asked.get(name)}: take "
                "another --output_dir"
            )
    return result
