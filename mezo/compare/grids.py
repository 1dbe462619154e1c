"""The paper's grids of hyperparameters, and a search over one: best by the dev examples.

    mezo train --grid table16-mezo --model facebook/opt-13b --task sst2 --output_dir runs/grid
    mezo train --grid mine.yaml ...         # learning_rate: [1e-6, 1e-7], mezo_eps: 1e-3, ...

A grid is options of `mezo train`; those whose value is a list are its axes. An option given on the
command line takes the place of the grid's. Each cell is a run in a folder of its own; a cell that
has a result is not run again, one that was interrupted goes on.
"""

import itertools
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from mezo.arguments import DataArguments
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.options_file import read_options
from mezo.runs import rates
from mezo.runs.arguments import TrainArguments
from mezo.runs.result import RESULT, make_folder
from mezo.runs.task import config_of, train
from mezo.trainers.resume import last_checkpoint

Grid = dict[str, Any]
SUMMARY = "grid.json"  # in output_dir

_LORA = {"use_peft": True, "peft_type": "lora", "lora_r": 8, "lora_alpha": 16}
_PREFIX = {"use_peft": True, "peft_type": "prefix", "num_virtual_tokens": 5, "mezo_eps": 1e-1}
_MASKED = {  # Table 15: RoBERTa-large, k = 16 and 512; validated every tenth of the steps
    "method": "mezo",
    "per_device_train_batch_size": 64,
    "max_steps": 100_000,
    "eval_steps": 0.1,
    "save_steps": 0.1,
}
_MASKED_FT = {
    "method": "adam",
    "learning_rate": [1e-5, 3e-5, 5e-5],
    "max_steps": 1000,
    "eval_steps": 0.1,
    "save_steps": 0.1,
}
_CAUSAL = {  # Table 16: OPT, 1,000 training examples; validated every fifth of the steps
    "method": "mezo",
    "per_device_train_batch_size": 16,
    "max_steps": 20_000,
    "lr_scheduler_type": "constant",
    "eval_steps": 0.2,
    "save_steps": 0.2,
    "num_train": 1000,
    "num_dev": 500,
    "num_test": 1000,
}
GRIDS: dict[str, Grid] = {
    "table15-mezo": _MASKED | {"learning_rate": [1e-7, 1e-6, 1e-5], "mezo_eps": 1e-3},
    "table15-mezo-prefix": _MASKED | _PREFIX | {"learning_rate": [1e-2, 5e-3, 1e-3]},
    "table15-mezo-lora": _MASKED
    | _LORA
    | {"learning_rate": [1e-5, 5e-5, 1e-4], "mezo_eps": 1e-3, "weight_decay": 0.1},
    "table15-ft-k16": _MASKED_FT | {"per_device_train_batch_size": [2, 4, 8]},
    "table15-ft-k512": _MASKED_FT | {"per_device_train_batch_size": [8, 16, 32]},
    "table16-mezo": _CAUSAL | {"learning_rate": [1e-6, 1e-7], "mezo_eps": 1e-3},
    "table16-mezo-generation": _CAUSAL  # SQuAD and DROP
    | {"learning_rate": [1e-6, 5e-7, 1e-7], "mezo_eps": 1e-3},
    "table16-mezo-prefix": _CAUSAL | _PREFIX | {"learning_rate": [1e-2, 1e-3]},
    "table16-mezo-lora": _CAUSAL | _LORA | {"learning_rate": [1e-4, 5e-5], "mezo_eps": 1e-2},
    "table16-ft": _CAUSAL
    | {
        "method": "adam",
        "learning_rate": [1e-5, 5e-5, 8e-5],
        "per_device_train_batch_size": 8,
        "max_steps": -1,
        "num_train_epochs": 5,
        "lr_scheduler_type": "linear",
    },
}


def load(name: str) -> Grid:
    """A grid of the paper by its name, or that of a YAML file. Unknown options: InputError."""
    if name in GRIDS:
        return GRIDS[name]
    if not Path(name).suffix:
        near = get_close_matches(name, GRIDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(GRIDS)}, or a YAML file"
        raise InputError(f"grid {name!r} is unknown; {hint}")
    found = read_options(name, f"grid {name}", "lines 'option: value' or 'option: [value, ...]'")
    return {option: values_of(name, str(option), value) for option, value in found.items()}


def values_of(name: str, option: str, value: Any) -> Any:
    """The value of an option of a file, or its list of values, as the option has them."""
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


def cells(grid: Grid) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, options) of every combination: the name is of the axes, the first one varies last."""
    axes = {name: value for name, value in grid.items() if isinstance(value, list)}
    fixed = {name: value for name, value in grid.items() if name not in axes}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = ",".join(f"{axis}={value}" for axis, value in chosen.items())
        yield name.replace("/", "_") or "cell", fixed | chosen


def search(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    grid: str,
    *,
    given: Collection[str] = (),
    on_cell: Callable[[str, str], None] = lambda name, what: None,
) -> dict[str, Any]:
    """Run every cell of a grid that has no result yet; returns and writes what came out.

    Args:
        grid: a name in GRIDS, or a YAML file.
        given: options that were asked for by hand: the grid's values of these do not count.
        on_cell: told of each cell and whether it is "run", "resumed" or "found".

    Returns {"grid", "cells": [{"name", "options", "dev", "test", "seconds", ...}], "best", ...};
    best is the folder of the cell with the highest metric on the dev examples, the first of equals.
    """
    chosen = {name: value for name, value in load(grid).items() if name not in given}
    make_folder(args.output_dir)
    found: list[dict[str, Any]] = []
    for name, options in cells(chosen):
        model, data = with_options(model_args, options), with_options(data_args, options)
        own = with_options(args, options | {"output_dir": str(Path(args.output_dir, name))})
        result = finish(model, data, own, partial(on_cell, name))
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
        Path(args.output_dir, SUMMARY).write_text(json.dumps(summary, indent=1, default=str))
    return summary


def finish(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    told: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """The result of a cell: that of its folder, else of the run, begun or gone on with.

    `told` is called before it runs, with "run", "resumed" or "found". InputError if the folder's
    result is of other options.
    """
    args = rates.resolved(model_args, args)
    result, what = _finished(model_args, data_args, args), "found"
    if result is None:
        going_on = Path(args.output_dir, "run.mezo").exists() or last_checkpoint(args.output_dir)
        what = "resumed" if going_on else "run"
    told(what)
    if result is None:
        resumed = replace(args, resume_from_checkpoint=_RESUME[what])
        result = train(model_args, data_args, resumed)
    return result


_RESUME = {"run": None, "resumed": "true"}
ASIDE = ("output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to")  # of no result


def with_options(kind: Any, options: dict[str, Any]) -> Any:
    """A copy of the arguments with those of the options that they have."""
    return replace(kind, **{f.name: options[f.name] for f in fields(kind) if f.name in options})


def _finished(model: ModelArguments, data: DataArguments, args: TrainArguments) -> dict | None:
    """The result of a cell that was run with the same options; None where there is none yet."""
    path = Path(args.output_dir, RESULT)
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
        had = result["config"]
    except (ValueError, KeyError):
        raise InputError(f"{path} is no result of a run: delete it to run the cell again") from None
    asked = json.loads(json.dumps(config_of(model, data, args), default=str))
    for name in asked.keys() | had.keys():
        if name not in ASIDE and asked.get(name) != had.get(name):
            raise InputError(
                f"{path} is of a run with {name} {had.get(name)}, not {asked.get(name)}: take "
                "another --output_dir"
            )
    return result
