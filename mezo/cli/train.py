"""The command `mezo train`: a task, a search over a grid, or with --reward any reward."""

import shlex
import sys
from typing import Any

from mezo.cli import reward
from mezo.cli.going_on import with_log
from mezo.cli.parsing import (
    JSON,
    default_output_dir,
    entries_of,
    helped,
    options_of,
    print_result,
    say,
    with_config,
)
from mezo.cli.running import carried_out, replay
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import DataArguments

TRAIN_HELP = """
training, named as transformers' TrainingArguments (--help_all lists every one):
  --output_dir DIR                    default runs/<task>
  --learning_rate LR                  default: measured on the model for the length of the run,
                                      or by its size and what is trained (docs/methods.md)
  --mezo_eps EPS                      default 1e-3; 1e-2 for LoRA, 1e-1 for a prefix
  --max_steps N                       default 20000
  --per_device_train_batch_size N     default 16
  --bf16 true                         run forward passes of 32-bit weights in bfloat16
  --lr_scheduler_type NAME            default constant
  --method NAME                       mezo, or a baseline: adam (backpropagation), lp, zero-shot
  --grid NAME                         search over a grid: table15-mezo, table16-mezo-lora, ... or
                                      FILE.yaml
  --paper TABLE                       table15, table16 or another table of the paper: use its
                                      model, grid, data and steps for the task, the method and the
                                      adapter
  --objective NAME                    train on a metric: accuracy or macro_f1 over candidates, f1
                                      of generated answers; default: the cross-entropy
  --dry_run                           print the commands that would run, one per line
  --activation_checkpointing true     with adam: save memory at the cost of a forward pass
  --seed N                            seed of the directions and of the order of the data
  --eval_steps N  --save_steps N      default 500
  --resume_from_checkpoint true       resume an interrupted run
  --report_to tensorboard             write the logs for TensorBoard
  --json                              print the result as one line of JSON

options of MeZO (docs/methods.md, docs/rules.md):
{options}

To train on what a function or program says of generated text instead of a task, see
docs/rewards.md.
""".replace("{options}", entries_of())


SEARCH: dict[str, dict[str, Any]] = {
    "grid": {"help": "Search over a grid."},
    "paper": {"help": "table15, table16, ...: search over the paper's grid for method and task."},
    "dry_run": {"action": "store_true", "help": "Print the commands of the runs, and run none."},
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
