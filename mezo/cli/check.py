"""The command `mezo check`: will a run learn, and with which eps and learning rate?"""

import shlex
import shutil
import sys
import textwrap
from contextlib import redirect_stdout

from mezo.cli import entries
from mezo.cli.entries import Entry, page
from mezo.cli.parsing import (
    JSON,
    Parser,
    default_output_dir,
    helped,
    options_of,
    print_result,
    say,
    with_config,
)
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import DataArguments

HELP = page(
    Entry("--mezo_eps EPS", "Size of the perturbations; by default that of mezo train."),
    Entry("--learning_rate LR", "Learning rate to judge; by default that of mezo train."),
    entries.BATCH,
    Entry("--directions N", "Number of directions to measure; more are more exact.", 12),
    Entry("--max_steps N", "Number of steps of the planned run.", 20000),
    Entry("--json", "Print every number, as one line of JSON."),
)


def main(argv: list[str]) -> None:
    kinds = (ModelArguments, DataArguments)
    if helped("mezo check", argv, kinds, HELP):
        return
    from mezo.check import measure as check
    from mezo.objectives.progress import Progress

    options = {"mezo_eps": {"type": float}, "learning_rate": {"type": float}, "json": JSON}
    options |= {"per_device_train_batch_size": {"type": int, "default": 16}}
    options |= {"directions": {"type": int, "default": 12}}
    options |= {"max_steps": {"type": int, "default": 20_000}}
    model, data, own = options_of("mezo check", argv, kinds, options)
    sizes = {
        "batch_size": own.per_device_train_batch_size,
        "directions": own.directions,
        "steps": own.max_steps,
    }
    with redirect_stdout(sys.stderr):
        result = check.check(
            model, data, eps=own.mezo_eps, lr=own.learning_rate, **sizes, progress=Progress(say)
        )
    if own.json:
        print_result(result, as_json=True)
    width = min(100, shutil.get_terminal_size().columns)
    for finding in [] if own.json else result["findings"]:
        line = f"{finding['level'].replace('warning', 'WARN'):<5}{finding['text']}"
        print(textwrap.fill(line, width, subsequent_indent=" " * 5, break_long_words=False))
    mine = Parser(prog="mezo check", add_help=False, allow_abbrev=False)
    for name in ("learning_rate", "mezo_eps", "directions"):
        mine.add_argument(f"--{name}")
    mine.add_argument("--json", **JSON)
    said, rest = mine.parse_known_args(with_config(argv))
    then = ["mezo", "train", *rest]
    for name, value in result["next"].items():
        value = getattr(said, name) if value is None else f"{value:g}"
        then += [] if value is None else [f"--{name}", value]
    say(f"next: {shlex.join([*then, *default_output_dir(rest)[0].split('=', 1)])}")
