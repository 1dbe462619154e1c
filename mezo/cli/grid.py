"""`mezo train --grid`, `--paper` and `--dry_run`: search over a grid, or print its commands."""

import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

from mezo.cli.parsing import named_in, print_result, say
from mezo.compare import grids, paper_grids
from mezo.distributed.processes import leave
from mezo.errors import InputError
from mezo.models import adapters
from mezo.models.arguments import ModelArguments
from mezo.runs import rates
from mezo.runs.arguments import TrainArguments
from mezo.runs.data_arguments import DataArguments


def main(own, options: list[str], model, data, args) -> None:
    """Search over the grid that `own` names, or print the commands with `--dry_run`.

    `options` are the words of the command line; they take precedence over the grid's values.
    Without a grid, which means `--dry_run` alone, the command of the one run is printed.
    """
    given = named_in(options)
    name = own.grid
    if own.paper is not None:
        if name is not None:
            raise InputError("paper and grid both name a grid: give one of them")
        name = _name_of(own.paper, model, data, args)
        model = _with_model(own.paper, model, given)
    talks = args.process_index == 0  # of several processes the first one alone
    if own.dry_run and not talks:
        return
    if own.dry_run:
        return _show(own, _commands(name, given, model, data, args))
    try:
        with redirect_stdout(sys.stderr):
            found = grids.search(
                *(model, data, args, name),
                given=given,
                on_cell=lambda name, what: say(f"{what}: {name}") if talks else None,
                tell=say if talks else (lambda line: None),
            )
    finally:
        leave()
    if not talks:
        return
    metric = found["metric"]
    shown = {"best": found["best"], "dev": found["dev"], metric: found["test"][metric]}
    shown |= {"cells": len(found["cells"]), "output_dir": args.output_dir}
    print_result(found if own.json else shown, own.json)
    say(f"all cells: {args.output_dir}/{grids.SUMMARY}")


def _name_of(table: str, model: ModelArguments, data: DataArguments, args: TrainArguments) -> str:
    if model.trainable not in (None, "head"):
        raise InputError(f"{table} has no grid for trainable {model.trainable}: use --grid")
    part = model.trainable or adapters.method_of(model).removeprefix("-")
    names = ("method", "rule", "objective", "num_samples", "num_samples_end")
    options = {name: getattr(args, name) for name in names}
    options["optim"] = getattr(args.optim, "value", args.optim)
    return paper_grids.name_of(table, paper_grids.Asked(data.task, part=part, k=data.k, **options))


def _with_model(table: str, model: ModelArguments, given: set[str]) -> ModelArguments:
    if given & {"model", "model_name_or_path"}:
        return model
    return replace(model, model_name_or_path=paper_grids.TABLES[table][0])


def _commands(
    grid: str | None, given: set[str], model: ModelArguments, data: DataArguments, args: Any
) -> list[list[str]]:
    """Return the command of each run, with the options that differ from the defaults."""
    cells = [("", {})] if grid is None else grids.chosen_cells(data, grid, given)
    commands = []
    for name, chosen in cells:
        folder = f"{args.output_dir}/{name}" if name else args.output_dir
        kinds: list[Any] = [grids.with_options(kind, chosen) for kind in (model, data, args)]
        kinds[2] = replace(rates.resolved(kinds[0], kinds[2]), output_dir=folder)
        commands.append(["mezo", "train", *grids.as_options(*kinds)])
    return commands


def _show(own, commands: list[list[str]]) -> None:
    if own.json:
        print_result({"commands": commands}, own.json)
    for command in [] if own.json else commands:
        print(shlex.join(command))
