"""The command `mezo replay`: rebuild a tuned model from its base model and its run log."""

import shlex
import sys
from contextlib import redirect_stdout
from typing import Any

from mezo.cli import entries
from mezo.cli.entries import Entry, page
from mezo.cli.parsing import JSON, helped, options_of, print_result, say
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments

HELP = page(
    Entry("--log FILE", "The run log."),
    Entry("--output_dir DIR", "Folder for the tuned model."),
    Entry("--until N", "Replay only the first N steps."),
    Entry(
        "--by_tensor",
        "Work from file to file, in the memory of one tensor; --model is a folder "
        "of safetensors files.",
    ),
    Entry("--onto_adapter", "Write only the adapter of a LoRA run."),
    Entry(
        "--no_verify",
        "Do not compare the weights with the log's fingerprints: those that the run began with, "
        "and those at its checkpoints and its end.",
    ),
    Entry("--rule MODULE:NAME", "Your own rule, if the run used one."),
    entries.JSON,
)


def main(argv: list[str]) -> None:
    if helped("mezo replay", argv, (ModelArguments,), HELP):
        return
    from mezo import trajectory
    from mezo.objectives.progress import Progress
    from mezo.rules import rule_class
    from mezo.runs import rebuild as adapter
    from mezo.runs import task as run
    from mezo.trajectory.fingerprints import Comparison

    options: dict[str, Any] = {name: {"required": True} for name in ("log", "output_dir")}
    options |= {"json": JSON}
    options |= {
        name: {"action": "store_true"} for name in ("by_tensor", "onto_adapter", "no_verify")
    }
    options["rule"] = {"action": "append", "default": []}
    options["until"] = {"type": int}
    model, own = options_of("mezo replay", argv, (ModelArguments,), options)
    if own.by_tensor and own.onto_adapter:
        raise InputError(
            "--by_tensor writes the whole model and --onto_adapter only an adapter: give one of "
            "the two"
        )
    replay = adapter.save_adapter if own.onto_adapter else run.replay
    replay = adapter.replay_by_tensor if own.by_tensor else replay
    with redirect_stdout(sys.stderr):
        own_rules = [rule_class(text) for text in own.rule]
        how: dict[str, Any] = {"rules": own_rules, "verify": not own.no_verify}
        how["progress"] = Progress(say)
        result = replay(model, own.log, own.output_dir, own.until, **how)
    print_result(result, own.json)
    if line := Comparison(own.log, trajectory.read(own.log), own.until).told():
        say(line)
    say(f"next: mezo eval --model {shlex.quote(own.output_dir)} --task ...")
