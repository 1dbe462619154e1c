"""The command `mezo compare`: run many methods on one task and model, and report on them."""

import os
import shlex
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from mezo.cli.entries import Entry, page
from mezo.cli.parsing import (
    JSON,
    helped,
    named_in,
    options_of,
    print_result,
    say,
    with_config,
)
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import DataArguments

HELP = page(
    "Options of the comparison.",
    Entry(
        "--methods NAME ...",
        "By default zero-shot icl lp ft lora prefix mezo mezo-lora "
        "mezo-prefix. There are also head, prompt, mezo-head, mezo-prompt, ft-checkpointing, "
        "lora-checkpointing, and peft's other methods, each also with mezo- before it.",
    ),
    Entry("--seeds N ...", "Seeds of the split and of the run.", "13 21 42"),
    Entry(
        "--grid NAME",
        "none (the default): one rate, by the model's size; default: three rates, "
        "of which the dev examples choose; table15 or table16: the paper's grid; or FILE.yaml, "
        "with a section of mezo train's options for each method.",
    ),
    Entry("--max_steps N", "Number of steps of the MeZO runs.", 2000),
    Entry("--adam_steps N", "Number of steps of the other runs; by default a tenth of that."),
    Entry(
        "--equal KIND ...",
        "What all methods spend the same of: steps (the default), passes, "
        "time or memory. Each of several has a folder of its own; all are on one page.",
    ),
    Entry("--k N, --num_train N", "Size of the data; by default --num_train 1000 --num_test 1000."),
    Entry("--data_dir DIR", "Folder of the data; {seed} in it is replaced by the seed."),
    Entry("--keep_weights", "Keep the tuned weights of every run."),
    Entry(
        "--output_dir DIR",
        "Folder of the comparison; give the command again to go on there.",
        "runs/compare-<task>",
    ),
    Entry("--json", "Print the whole summary as one line of JSON."),
    "",
    "Every other option of mezo train applies to all methods, such as --truncate.",
)
OWN: dict[str, Any] = {
    "methods": {"nargs": "+"},
    "seeds": {"nargs": "+", "type": int},
    "grid": {"default": "none"},
    "adam_steps": {"type": int},
    "equal": {"nargs": "+", "default": ["steps"]},
    "keep_weights": {"action": "store_true"},
    "json": JSON,
}


def main(argv: list[str]) -> None:
    if helped("mezo compare", argv, (ModelArguments, DataArguments), HELP):
        return
    from mezo.compare import compare
    from mezo.distributed.processes import leave
    from mezo.runs.arguments import TrainArguments
    from mezo.runs.result import make_folder

    kinds = (ModelArguments, DataArguments, TrainArguments)
    model, data, args, own = options_of("mezo compare", argv, kinds, OWN)
    words = named_in(with_config(argv))
    if not words & {"output_dir"}:
        task = "custom" if data.prompt is not None else Path(data.task).stem
        args.output_dir = f"runs/compare-{task}"
    args.disable_tqdm = args.disable_tqdm or not sys.stderr.isatty()
    chosen: dict[str, Any] = {"grid": own.grid, "adam_steps": own.adam_steps}
    chosen |= {"keep_weights": own.keep_weights}
    chosen |= {name: getattr(own, name) for name in ("methods", "seeds") if getattr(own, name)}
    chosen |= {"max_steps": args.max_steps} if "max_steps" in words else {}
    make_folder(args.output_dir)
    talks = args.process_index == 0  # of several processes the first one alone
    try:
        log_file = Path(args.output_dir, "log.txt") if talks else Path(os.devnull)
        with log_file.open("a") as log, redirect_stdout(log):
            founds = {
                kind: compare.compare(
                    *(model, data, _within(args, kind, own.equal)),
                    compare.Settings(**chosen, equal=kind),
                    given=words - {"max_steps"},
                    on_cell=_Cells() if talks else (lambda at, number, cell, what: None),
                    tell=say if talks else (lambda line: None),
                )
                for kind in dict.fromkeys(own.equal)
            }
    except KeyboardInterrupt:
        if talks:
            say(f"\nto go on where it stopped:\n  {shlex.join(['mezo', 'compare', *argv])}")
        raise
    finally:
        leave()
    if not talks:
        return
    for kind, found in founds.items():
        show(found, own.json)
        folder = Path(_within(args, kind, own.equal).output_dir)
        say(f"report: {write(found, folder)}")
        say(f"each cell's folder and commands: {folder / compare.SUMMARY}")
    if len(founds) > 1:
        say(f"all in one report: {write_several(founds, Path(args.output_dir))}")


def _within(args: Any, kind: str, kinds: list[str]) -> Any:
    """Return the arguments with a folder for each of several budgets."""
    if len(dict.fromkeys(kinds)) == 1:
        return args
    return replace(args, output_dir=str(Path(args.output_dir, f"equal-{kind}")))


class _Cells:
    """Print one line per run, with the time since the comparison began."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def __call__(self, at: int, number: int, cell: Any, what: str) -> None:
        minutes = (time.perf_counter() - self.began) / 60
        name = f"{cell.method} seed {cell.seed} {cell.name}".strip()
        say(f"[{at}/{number}, {minutes:.1f} min] {what}: {name}")


def show(found: dict[str, Any], as_json: bool) -> None:
    """Print the table to stdout, and the methods that were refused to stderr."""
    if as_json:
        print_result(found, as_json=True)
    else:
        from mezo.compare.page import table

        head, *rows = table(found)
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        for row in (head, *rows):
            cells = [row[0].ljust(widths[0])]
            cells += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
            print("  ".join(cells).rstrip())
    for method, reason in found["refused"].items():
        say(f"{method} was refused: {reason}")


def write_several(founds: dict[str, dict[str, Any]], folder: Path) -> Path:
    """Write one report of several budgets, and return its path."""
    from mezo.compare import page, plots

    drawn = {
        kind: {
            name: path
            for name, path in plots.of_comparison(found, folder / f"equal-{kind}").items()
            if name != "Memory by model size"  # it is the same for all
        }
        for kind, found in founds.items()
    }
    path = folder / "report.html"
    path.write_text(page.html_of_several(founds, drawn), encoding="utf-8")
    return path


def write(found: dict[str, Any], folder: Path) -> Path:
    """Write the plots and the report, and return the report's path.

    Raises InputError if matplotlib is missing.
    """
    from mezo.compare import page
    from mezo.compare import plots as report

    try:
        plots = report.of_comparison(found, folder)
    except ImportError:
        raise InputError("the report needs matplotlib: pip install 'mezo-lm[demo]'") from None
    path = folder / "report.html"
    path.write_text(page.html(found, plots), encoding="utf-8")
    return path
