"""The command `mezo train`: a task, a search over a grid, or with --reward any reward."""

import shlex
import sys
from typing import Any

from mezo.cli import entries, reward
from mezo.cli.entries import Entry, page
from mezo.cli.going_on import with_log
from mezo.cli.parsing import (
    JSON,
    default_output_dir,
    helped,
    options_of,
    print_result,
    say,
    with_config,
)
from mezo.cli.running import carried_out, replay
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import DataArguments

TRAIN_HELP = page(
    "Training, named as transformers' TrainingArguments (--help_all lists every option).",
    entries.folder("runs/<task>"),
    Entry(
        "--learning_rate LR",
        "By default it is measured on the model for the length of the run, "
        "or depends on the model's size and on what is trained (docs/methods.md).",
    ),
    entries.EPS,
    entries.steps(20000),
    entries.BATCH,
    Entry("--bf16 true", "Run the forward passes of 32-bit weights in bfloat16."),
    Entry("--lr_scheduler_type NAME", "Course of the learning rate.", "constant"),
    Entry(
        "--method NAME",
        "mezo, or a baseline: adam (backpropagation), lp (linear probing) or zero-shot.",
        "mezo",
    ),
    Entry("--grid NAME", "Search over a grid: table15-mezo, table16-mezo-lora, ... or FILE.yaml."),
    Entry(
        "--paper TABLE",
        "Run what a table of the paper ran (table15, table16, ...): its model, "
        "grid, data and steps for the task, the method and the adapter.",
    ),
    Entry(
        "--objective NAME",
        "Train on a metric: accuracy or macro_f1 over candidates, or f1 of "
        "generated answers. By default the objective is the cross-entropy.",
    ),
    Entry("--dry_run", "Print the commands that would run, one per line."),
    Entry(
        "--activation_checkpointing true", "With adam: save memory at the cost of a forward pass."
    ),
    Entry("--seed N", "Seed of the directions and of the order of the examples.", 42),
    Entry("--eval_steps N", "Number of steps between evaluations.", 500),
    Entry("--save_steps N", "Number of steps between checkpoints.", 500),
    entries.RESUME,
    Entry("--report_to tensorboard", "Write logs that TensorBoard shows."),
    entries.JSON,
    "",
    "Options of MeZO (docs/methods.md, docs/rules.md).",
    *entries.of_table(),
    "",
    "To train on what a function or program says of generated text instead of a task, see",
    "docs/rewards.md.",
)


SEARCH: dict[str, dict[str, Any]] = {
    "grid": {"help": "Search over a grid."},
    "paper": {"help": "Run what a table of the paper ran."},
    "dry_run": {"action": "store_true", "help": "Print the commands that would run."},
}


def main(argv: list[str]) -> None:
    if reward.asked(argv):
        return reward.train(argv)
    if helped("mezo train", argv, (ModelArguments, DataArguments), TRAIN_HELP):
        return None
    from mezo.runs import task as run
    from mezo.runs.arguments import TrainArguments

    kinds = (ModelArguments, DataArguments, TrainArguments)

    def completed(words: list[str]) -> list[str]:
        return with_log([*default_output_dir(words), *words], kinds, "task")

    known = {"json": JSON, **SEARCH}
    model, data, args, own = options_of("mezo train", argv, kinds, known, completed)
    if own.grid is not None or own.paper is not None or own.dry_run:
        from mezo.cli import grid  # transformers comes with it

        args.disable_tqdm = args.disable_tqdm or not sys.stderr.isatty()
        return grid.main(own, with_config(argv), model, data, args)
    words = ["mezo", "train", *argv]
    result = carried_out(words, args, lambda tell: run.train(model, data, args, tell))
    if result is not None:
        _report(result, model, args, own.json)
    return None


def _report(result: dict[str, Any], model: ModelArguments, args: Any, as_json: bool) -> None:
    """Print the result, and say which command is next."""
    metrics = [name for name in result["test"] if name not in ("loss", "n")]
    shown = {f"zero_shot_{name}": result["zero_shot"][name] for name in metrics}
    shown |= {name: result["test"][name] for name in metrics} | {"steps": result["steps"]}
    shown |= {"seconds": result["seconds"], "output_dir": args.output_dir}
    print_result(result if as_json else shown, as_json)
    then = ["mezo", "eval", "--model", args.output_dir, "--task", "..."]
    if args.method == "mezo":  # what is saved is the best on the dev examples
        kept = None if result["kept_step"] == result["steps"] else result["kept_step"]
        then = replay(model, args, kept)
    say(f"next: {shlex.join(then)}")
