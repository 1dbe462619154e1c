"""`mezo sft` and `mezo dpo`: TRL's trainers with MeZO, from the command line."""

import shlex
import sys
from functools import partial
from importlib.util import find_spec

from mezo.cli import entries
from mezo.cli.entries import Entry, page
from mezo.cli.going_on import with_log
from mezo.cli.parsing import (
    JSON,
    helped,
    options_of,
    print_result,
    say,
)
from mezo.cli.running import carried_out, replay
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import TextArguments

OWN = {
    "sft": (
        Entry("--packing true", "Join rows without padding between them."),
        Entry("--assistant_only_loss true", "For messages: train on the assistant's turns alone."),
        Entry("--completion_only_loss false", "For prompt and completion: train on both."),
    ),
    "dpo": (Entry("--beta BETA", "How close the model stays to the reference.", "0.1"),),
}


def _tail(kind: str) -> str:
    """Return the end of the command's help."""
    config = {"sft": "SFTConfig", "dpo": "DPOConfig"}[kind]
    return page(
        f"Training, named as TRL's {config} and transformers' (--help_all lists every option).",
        entries.folder(f"runs/{kind}"),
        *(entries.RATE, entries.EPS, entries.steps(20000), entries.BATCH),
        Entry("--max_length N", "Longest row in tokens; longer rows are cut."),
        *OWN[kind],
        *entries.of_table("offload"),
        *(entries.RESUME, entries.JSON),
    )


def main(kind: str, argv: list[str]) -> None:
    """Run `mezo sft` or `mezo dpo`."""
    if helped(f"mezo {kind}", argv, (ModelArguments, TextArguments), _tail(kind)):
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
