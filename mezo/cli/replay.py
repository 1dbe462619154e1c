"""The command `mezo replay`: rebuild a tuned model from its base model and its run log."""

import shlex
import sys
from contextlib import redirect_stdout
from typing import Any

from mezo.cli.parsing import JSON, helped, options_of, print_result, say
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments


def main(argv: list[str]) -> None:
    tail = (
        "  --log FILE                          the run log\n"
        "  --output_dir DIR                    folder for the tuned model\n"
        "  --until N                           replay only the first N steps\n"
        "  --by_tensor                         work from file to file, in the memory of one\n"
        "                                      tensor; --model is a folder of safetensors\n"
        "  --onto_adapter                      write only the adapter of a LoRA run\n"
        "  --rule MODULE:NAME                  your own rule, if the run used one\n"
        "  --json                              print one line of JSON\n"
    )
    if helped("mezo replay", argv, (ModelArguments,), tail):
        return
    from mezo.rules import rule_class
    from mezo.runs import rebuild as adapter
    from mezo.runs import task as run

    options: dict[str, Any] = {name: {"required": True} for name in ("log", "output_dir")}
    options |= {"json": JSON}
    options |= {name: {"action": "store_true"} for name in ("by_tensor", "onto_adapter")}
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
        result = replay(model, own.log, own.output_dir, own.until, rules=own_rules)
    print_result(result, own.json)
    say(f"next: mezo eval --model {shlex.quote(own.output_dir)} --task ...")
