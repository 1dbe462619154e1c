"""`mezo sft` and `mezo dpo`: TRL's trainers with MeZO, from the command line."""

import shlex
import sys
from functools import partial
from importlib.util import find_spec

from mezo.cli.going_on import with_log
from mezo.cli.parsing import (
    JSON,
    entries_of,
    helped,
    options_of,
    print_result,
    say,
)
from mezo.cli.running import carried_out, replay
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import TextArguments

HELP = """
training, named as TRL's {config} and transformers' (--help_all lists every one):
  --output_dir DIR                    default runs/{kind}
  --learning_rate LR                  default: by the model's size and by what is trained
                                      (docs/methods.md)
  --mezo_eps EPS                      default 1e-3; 1e-2 for LoRA, 1e-1 for a prefix
  --max_steps N                       default 20000
  --per_device_train_batch_size N     default 16
  --max_length N                      longest row in tokens; longer rows are cut
{own}{offload}
  --resume_from_checkpoint true       resume an interrupted run
  --json                              print the result as one line of JSON
"""
OWN = {
    "sft": "  --packing true                      join rows without padding between them\n"
    "  --assistant_only_loss true          for messages: train only the assistant's turns\n"
    "  --completion_only_loss false        for prompt and completion: train both\n",
    "dpo": "  --beta BETA                         closeness to the reference; default 0.1\n",
}


def main(kind: str, argv: list[str]) -> None:
    """Run `mezo sft` or `mezo dpo`."""
    config = {"sft": "SFTConfig", "dpo": "DPOConfig"}[kind]
    tail = HELP.format(kind=kind, config=config, own=OWN[kind], offload=entries_of("offload"))
    if helped(f"mezo {kind}", argv, (ModelArguments, TextArguments), tail):
        return
    if find_spec("trl") is None:
        raise InputError(f"mezo {kind} needs TRL: pip install 'mezo-lm[trl]'")
    from datasets import disable_progress_bars

    from mezo.runs import text

    if not sys.stderr.isatty():
        disable_progress_bars()
    kinds = (text.ARGUMENTS[kind], ModelArguments, TextArguments)
    completed = partial(with_log, kinds=kinds, kind="text")
    args, model, data, own = options_of(f"mezo {kind}", argv, kinds, {"json": JSON}, completed)
    words = ["mezo", kind, *argv]
    result = carried_out(words, args, lambda tell: text.train(kind, model, data, args, tell))
    if result is None:
        return
    shown = {name: result[name] for name in ("train_loss", "eval_loss", "steps", "seconds")}
    print_result(result if own.json else shown | {"output_dir": args.output_dir}, own.json)
    say(f"next: {shlex.join(replay(model, args))}")
