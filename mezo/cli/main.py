"""The command `mezo`: stdout is data, stderr is talk, a mistake is one line and exit code 2."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any

from mezo import __version__
from mezo.arguments import DataArguments, ModelArguments, read_options
from mezo.errors import InputError

ELSEWHERE = {  # verb -> module, function, what it is given before the words
    "log": ("mezo.cli.log", "main"),
    "compare": ("mezo.cli.compare", "main"),
    "push": ("mezo.cli.hub", "push"),
    "pull": ("mezo.cli.hub", "pull"),
    "tasks": ("mezo.cli.tasks", "show"),
    "sft": ("mezo.cli.text", "main", "sft"),
    "dpo": ("mezo.cli.text", "main", "dpo"),
    "memory": ("mezo.cli.memory", "memory"),
}
USAGE = """\
usage: mezo COMMAND [options]

Fine-tune language models with forward passes alone, in the memory of inference.

  mezo demo                                              see it work, offline, in minutes
  mezo check  --model facebook/opt-1.3b --task sst2      will it learn? which eps, which rate?
  mezo train  --model facebook/opt-1.3b --task sst2 --output_dir runs/sst2
  mezo sft    --model Qwen/Qwen3-0.6B --train_file chats.jsonl --use_peft     TRL's formats; dpo too
  mezo train  --model ... --train_file prompts.jsonl --reward rules.py:short   any reward
  mezo eval   --model facebook/opt-1.3b --task sst2 --demonstrations 32
  mezo eval   --model facebook/opt-1.3b --task sst2 --replay runs/sst2/run.mezo
  mezo replay --model facebook/opt-1.3b --log runs/sst2/run.mezo --output_dir model/
  mezo log    runs/sst2/run.mezo                         what a run log says; verify, compact, merge
  mezo compare --model M --task sst2 --k 16              many methods: table, plots, report
  mezo tasks                                             data sets with prompts, and what they show
  mezo memory --model facebook/opt-66b                   what a run needs, without loading weights
  mezo push   --log runs/sst2/run.mezo --repo user/name  share it on the hub, as a few KB
  mezo pull   user/name                                  somebody's run log

mezo COMMAND --help lists the options of a command.
"""
TRAIN_HELP = """
training, named as transformers' TrainingArguments (--help_all lists every one):
  --output_dir DIR                    default runs/<task>
  --learning_rate LR                  default: by the model's size N and by what is trained, for
                                      all weights 3000 / N, 1e-3 for causal-lm and 2e-7 for 13B
                                      (docs/methods.md; mezo check measures it)
  --mezo_eps EPS                      default 1e-3; 1e-2 for LoRA, 1e-1 for a prefix
  --max_steps N                       default 20000
  --per_device_train_batch_size N     default 16
  --num_samples N                     directions a step, default 1
  --distribution NAME                 gaussian or rademacher
  --lr_scheduler_type NAME            default constant
  --method NAME                       mezo; baselines: adam (back-propagation), lp, zero-shot
  --grid NAME                         search: table15-mezo, table16-mezo-lora, ... or FILE.yaml
  --activation_checkpointing true     adam: less memory, a forward pass more
  --seed N                            of the directions and the order of the data
  --eval_steps N  --save_steps N      default 500
  --resume_from_checkpoint true       go on after an interruption
  --offload                           the model stays on the CPU, and comes block by block: for
                                      models larger than the device's memory
  --offload_folder DIR                with it, weights wait in a file: for models larger than the
                                      host's memory
  --offload_write_every N             the file is written every N updates; 0: never
  --probe_groups N                    under torchrun -m mezo train: -1 is a direction a process
  --report_to tensorboard
  --json                              the result as one line of JSON

On what a function or program says of generated text, in place of a task: docs/rewards.md.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mezo {__version__}")
        return 0
    commands = {"demo": _demo, "train": _train, "eval": _eval, "replay": _replay, "check": _check}
    commands |= {name: partial(_elsewhere, *place) for name, place in ELSEWHERE.items()}
    try:
        if argv[0] not in commands:
            raise InputError(f"unknown command {argv[0]!r}{_nearest(argv[0], commands)}")
        commands[argv[0]](argv[1:])
        sys.stdout.flush()
    except InputError as error:
        print(f"mezo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, head say, has enough; Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("\nmezo: interrupted", file=sys.stderr)
        return 130
    return 0


def _nearest(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; {self.prog} --help lists the options")


def _with_config(argv: list[str]) -> list[str]:
    """argv with the contents of --config FILE put before it, as options, so that flags win."""
    parser = _Parser(prog="mezo", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(argv)
    return argv if found.config is None else _options_in(found.config) + rest


def _options_in(path: str) -> list[str]:
    options = read_options(path, path, "lines 'option: value'")
    argv = []
    for name, value in options.items():
        if isinstance(value, list) and value:
            argv += [f"--{name}", *map(str, value)]
        elif value is True:
            argv += [f"--{name}"]
        elif value is not None and value != []:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            argv += [f"--{name}={text}"]
    return argv


def _parse(argv: list[str], parser, kinds: tuple) -> tuple:
    """Instances of the dataclasses `kinds`, and the parser's own options."""
    namespace, left = parser.parse_known_args(argv)
    if left:
        _refuse(left[0].split("=")[0], parser, kinds)
    try:
        found = parser.parse_dict(vars(namespace), allow_extra_keys=True)
    except (ValueError, ImportError) as error:  # of transformers' own checks
        raise InputError(str(error)) from None
    return (*found, namespace)


def _refuse(word: str, parser, kinds: tuple) -> None:
    if not word.startswith("-"):
        raise InputError(f"unexpected argument {word!r}: options begin with --")
    names = [name for kind in kinds for f in fields(kind) for name in _names(f)]
    own = [name for action in parser.own for name in action.option_strings]
    known = [name.lstrip("-") for name in (*names, *own)]
    near = get_close_matches(word.lstrip("-"), known, n=1)
    hint = f"did you mean --{near[0]}?" if near else f"{parser.prog} --help lists them"
    raise InputError(f"unknown option {word}; {hint}")


def _names(f) -> list[str]:
    return [*f.metadata.get("aliases", []), f"--{f.name}"]


def _hf_parser(prog: str, kinds: tuple, **own):
    from transformers import HfArgumentParser

    class Parser(_Parser, HfArgumentParser):
        pass

    both = "resolve"  # an option of two dataclasses, as trust_remote_code, is for both
    parser: Any = Parser(kinds, prog=prog, allow_abbrev=False, conflict_handler=both)
    parser.own = []
    for name, settings in own.items():
        names = {f"--{name}": None, f"--{name.replace('_', '-')}": None}  # as for the others
        parser.own.append(parser.add_argument(*names, **settings))
    return parser


def _show_help(prog: str, kinds: tuple, tail: str = "") -> None:
    """Help from the dataclasses alone: no import of transformers, so it is quick."""
    print(f"usage: {prog} [options] [--config FILE.yaml]\n")
    for kind in kinds:
        print(f"{kind.__doc__}")
        for f in fields(kind):
            default = f"  [{f.default}]" if isinstance(f.default, str | int) else ""
            print(f"  {', '.join(_names(f)):<34}  {f.metadata['help']}{default}")
        print()
    print(tail.lstrip("\n"), end="")


def _quiet() -> None:
    """This process is ours: no progress bars for loading a model."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, default=str))
        return
    for name, value in result.items():
        if value is not None and not isinstance(value, dict):
            print(f"{name}\t{value:.4g}" if isinstance(value, float) else f"{name}\t{value}")


JSON: dict[str, Any] = {"action": "store_true", "help": "Print the result as one line of JSON."}


def _train(argv: list[str]) -> None:
    from mezo.cli import reward as cli_reward

    if cli_reward.asked(argv):
        return cli_reward.train(argv)
    if {"-h", "--help"} & set(argv):
        return _show_help("mezo train", (ModelArguments, DataArguments), TRAIN_HELP)
    from mezo.distributed import processes as distributed
    from mezo.runs import task as run

    _quiet()
    kinds = (ModelArguments, DataArguments, run.TrainArguments)
    parser = _hf_parser("mezo train", kinds, json=JSON, grid={"help": "Search over a grid."})
    if "--help_all" in argv:
        return parser.print_help()
    options = _with_config(argv)
    model, data, args, own = _parse([*_default_output_dir(options), *options], parser, kinds)
    args.disable_tqdm = args.disable_tqdm or not sys.stderr.isatty()
    if own.grid is not None:
        from mezo.cli.grid import main as search

        return search(own, options, model, data, args)
    try:
        with redirect_stdout(sys.stderr):  # the Trainer prints its logs
            result = run.train(model, data, args, (lambda _: None) if args.process_index else _say)
    except KeyboardInterrupt:
        again = shlex.join(["mezo", "train", *argv, "--resume_from_checkpoint", "true"])
        _say(f"\nto go on where it stopped:\n  {again}")
        raise
    finally:
        distributed.leave()
    if args.process_index:  # one of several processes tells
        return
    metrics = [name for name in result["test"] if name not in ("loss", "n")]
    shown = {f"zero_shot_{name}": result["zero_shot"][name] for name in metrics}
    shown |= {name: result["test"][name] for name in metrics} | {"steps": result["steps"]}
    shown |= {"seconds": result["seconds"], "output_dir": args.output_dir}
    _print(result if own.json else shown, own.json)
    then = ["mezo", "eval", "--model", args.output_dir, "--task", "..."]
    if args.method == "mezo":
        then = ["mezo", "replay", "--model", model.model_name_or_path]
        then += ["--log", f"{args.output_dir}/run.mezo", "--output_dir", "replayed"]
        then += [] if args.offload_write_every else ["--by_tensor"]  # there is no other model
        if result["kept_step"] != result["steps"]:  # what is saved is the best on the dev examples
            then += ["--until", str(result["kept_step"])]
    _say(f"next: {shlex.join(then)}")


def _default_output_dir(argv: list[str]) -> list[str]:
    """The option --output_dir=runs/<task>; a later one in argv wins."""
    parser = _Parser(prog="mezo train", add_help=False, allow_abbrev=False)
    parser.add_argument("--task", default=DataArguments.task)
    parser.add_argument("--prompt", dest="own")
    found, _ = parser.parse_known_args(argv)
    return [f"--output_dir=runs/{found.task if found.own is None else 'custom'}"]


def _check(argv: list[str]) -> None:
    tail = (
        "  --mezo_eps EPS                      default: as mezo train's\n"
        "  --learning_rate LR                  default: as mezo train's, by the model's size\n"
        "  --per_device_train_batch_size N     default 16\n"
        "  --directions N                      more tell more, default 12\n"
        "  --json                              one line of JSON, with every number\n"
    )
    kinds = (ModelArguments, DataArguments)
    if {"-h", "--help"} & set(argv):
        return _show_help("mezo check", kinds, tail)
    from mezo.check import measure as check

    _quiet()
    options = {"mezo_eps": {"type": float}, "learning_rate": {"type": float}, "json": JSON}
    options |= {"per_device_train_batch_size": {"type": int, "default": 16}}
    options |= {"directions": {"type": int, "default": 12}}
    given = _with_config(argv)
    model, data, own = _parse(given, _hf_parser("mezo check", kinds, **options), kinds)
    sizes = {"batch_size": own.per_device_train_batch_size, "directions": own.directions}
    with redirect_stdout(sys.stderr):
        result = check.check(model, data, eps=own.mezo_eps, lr=own.learning_rate, **sizes)
    if own.json:
        _print(result, as_json=True)
    for finding in [] if own.json else result["findings"]:
        print(f"{finding['level'].replace('warning', 'WARN'):<5}{finding['text']}")
    mine = _Parser(prog="mezo check", add_help=False, allow_abbrev=False)
    for name in ("learning_rate", "mezo_eps", "directions"):
        mine.add_argument(f"--{name}")
    mine.add_argument("--json", **JSON)
    said, rest = mine.parse_known_args(given)
    then = ["mezo", "train", *rest]
    for name, value in result["next"].items():
        value = getattr(said, name) if value is None else f"{value:g}"
        then += [] if value is None else [f"--{name}", value]
    _say(f"next: {shlex.join([*then, *_default_output_dir(rest)[0].split('=', 1)])}")


def _eval(argv: list[str]) -> None:
    from mezo.cli.eval import main

    main(argv)


def _replay(argv: list[str]) -> None:
    tail = (
        "  --log FILE                          the run log\n"
        "  --output_dir DIR                    where the tuned model goes\n"
        "  --until N                           only the first N steps\n"
        "  --by_tensor                         file to file, in the memory of one tensor; --model\n"
        "                                      is a folder of safetensors\n"
        "  --onto_adapter                      only the adapter of a LoRA run\n"
        "  --json                              one line of JSON\n"
    )
    if {"-h", "--help"} & set(argv):
        return _show_help("mezo replay", (ModelArguments,), tail)
    from mezo.runs import rebuild as adapter
    from mezo.runs import task as run

    _quiet()
    options = {"log": {"required": True}, "output_dir": {"required": True}, "json": JSON}
    options |= {name: {"action": "store_true"} for name in ("by_tensor", "onto_adapter")}
    parser = _hf_parser("mezo replay", (ModelArguments,), **options, until={"type": int})
    model, own = _parse(_with_config(argv), parser, (ModelArguments,))
    if own.by_tensor and own.onto_adapter:
        raise InputError("--by_tensor writes the whole model, --onto_adapter an adapter: give one")
    replay = adapter.save_adapter if own.onto_adapter else run.replay
    replay = adapter.replay_by_tensor if own.by_tensor else replay
    with redirect_stdout(sys.stderr):
        result = replay(model, own.log, own.output_dir, own.until)
    _print(result, own.json)
    _say(f"next: mezo eval --model {shlex.quote(own.output_dir)} --task ...")


def _elsewhere(module: str, function: str, *args) -> None:
    """A verb that has a file of its own, imported when it is asked for."""
    getattr(import_module(module), function)(*args)


def _demo(argv: list[str]) -> None:
    parser = _Parser(
        prog="mezo demo", description="Fine-tune a small model, offline, and compare with Adam."
    )
    parser.add_argument("--output_dir", default="demo_output", help="default demo_output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    from mezo.demo import demo

    _quiet()

    demo.main(own.output_dir, seed=own.seed, as_json=own.json)
