"""The command `mezo`: data goes to stdout, messages to stderr, and a mistake exits with code 2."""

import os
import sys
from importlib import import_module

from mezo.cli.parsing import nearest
from mezo.errors import InputError
from mezo.version import __version__

COMMANDS = {  # verb -> module, function, and any arguments that precede the words
    "demo": ("mezo.cli.demo", "main"),
    "train": ("mezo.cli.train", "main"),
    "eval": ("mezo.cli.eval", "main"),
    "replay": ("mezo.cli.replay", "main"),
    "check": ("mezo.cli.check", "main"),
    "log": ("mezo.cli.log", "main"),
    "compare": ("mezo.cli.compare", "main"),
    "push": ("mezo.cli.hub", "push"),
    "pull": ("mezo.cli.hub", "pull"),
    "tasks": ("mezo.cli.tasks", "show"),
    "sft": ("mezo.cli.text", "main", "sft"),
    "dpo": ("mezo.cli.text", "main", "dpo"),
    "memory": ("mezo.cli.memory", "memory"),
    "env": ("mezo.cli.env", "main"),
}
USAGE = """\
usage: mezo COMMAND [options]

Fine-tune language models with forward passes alone, in the memory of inference.

  mezo demo                                          See it work, offline, in minutes.
  mezo check  --model facebook/opt-1.3b --task sst2  Will it learn, and with which eps and rate?
  mezo train  --model facebook/opt-1.3b --task sst2 --output_dir runs/sst2
  mezo train  --model M --train_file prompts.jsonl --reward rules.py:short      For any reward.
  mezo sft    --model Qwen/Qwen3-0.6B --train_file chats.jsonl --use_peft
  mezo dpo    --model M --train_file pairs.jsonl     Preferences, in TRL's formats.
  mezo eval   --model facebook/opt-1.3b --task sst2 --demonstrations 32
  mezo eval   --model facebook/opt-1.3b --task sst2 --replay runs/sst2/run.mezo
  mezo replay --model facebook/opt-1.3b --log runs/sst2/run.mezo --output_dir model/
  mezo log    runs/sst2/run.mezo                     Show, verify, compact or merge run logs.
  mezo compare --model M --task sst2 --k 16          Compare methods: a table, plots, a report.
  mezo tasks                                         List the tasks, or show one on a real row.
  mezo memory --model facebook/opt-66b               Estimate memory without loading weights.
  mezo push   --log runs/sst2/run.mezo --repo user/name     Share a run log on the hub.
  mezo pull   user/name                              Download a run log from the hub.
  mezo env                                           Print versions and device for a report.

mezo COMMAND --help lists the options of a command.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mezo {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}")
        module, function, *first = COMMANDS[argv[0]]
        getattr(import_module(module), function)(*first, argv[1:])
        sys.stdout.flush()
    except InputError as error:
        print(f"mezo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, say) has closed; avoid Python's complaint at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("\nmezo: interrupted", file=sys.stderr)
        return 130
    return 0
