"""The command `mezo`: stdout is data, stderr is talk, a mistake is one line and exit code 2."""

import argparse
import json
import sys
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from . import __version__
from .arguments import DataArguments, ModelArguments
from .errors import InputError

USAGE = """\
usage: mezo COMMAND [options]

Fine-tune language models with forward passes alone, in the memory of inference.

  mezo demo                                              see it work, offline, in minutes
  mezo train  --model facebook/opt-1.3b --task sst2 --output_dir runs/sst2
  mezo eval   --model facebook/opt-1.3b --task sst2 --demonstrations 32
  mezo eval   --model facebook/opt-1.3b --task sst2 --replay runs/sst2/run.mezo
  mezo replay --model facebook/opt-1.3b --log runs/sst2/run.mezo --output_dir model/
  mezo log    runs/sst2/run.mezo                         what a run log says

mezo COMMAND --help lists the options of a command.
"""
TRAIN_HELP = """
training, named as transformers' TrainingArguments (--help_all lists every one):
  --output_dir DIR                    default runs/<task>
  --learning_rate LR                  default 1e-6; 100 times smaller than Adam's
  --mezo_eps EPS                      default 1e-3; 1e-2 for LoRA
  --max_steps N                       default 20000
  --per_device_train_batch_size N     default 16
  --num_samples N                     directions a step, default 1
  --distribution NAME                 gaussian or rademacher
  --lr_scheduler_type NAME            default constant
  --method NAME                       mezo, or adam for the baseline by back-propagation
  --seed N                            of the directions and the order of the data
  --eval_steps N  --save_steps N      default 500
  --resume_from_checkpoint true       go on after an interruption
  --report_to tensorboard
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mezo {__version__}")
        return 0
    commands = {"demo": _demo, "train": _train, "eval": _eval, "replay": _replay, "log": _log}
    try:
        if argv[0] not in commands:
            raise InputError(f"unknown command {argv[0]!r}{_nearest(argv[0], commands)}")
        commands[argv[0]](argv[1:])
    except InputError as error:
        print(f"mezo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmezo: interrupted", file=sys.stderr)
        return 130
    return 0


def _nearest(word: str, known) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; {self.prog} --help lists the options")


def _with_config(argv: list[str]) -> list[str]:
    """argv with the contents of --config FILE put before it, as options, so that flags win."""
    if "--config" not in argv:
        return argv
    at = argv.index("--config")
    if at + 1 == len(argv):
        raise InputError("--config needs a file")
    import yaml

    path, rest = argv[at + 1], argv[:at] + argv[at + 2 :]
    try:
        options = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise InputError(f"{path}: expected lines 'option: value'")
    front = []
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            front += [f"--{name}", *map(str, values)]
    return front + rest


def _parse(argv: list[str], parser, kinds: tuple) -> tuple:
    """Instances of the dataclasses `kinds`, and the parser's own options."""
    argv = _with_config(argv)
    try:
        *found, left = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except ValueError as error:
        raise InputError(str(error)) from None
    if left:
        known = [f"--{f.name}" for kind in kinds for f in fields(kind)]
        raise InputError(f"unknown option {left[0]}{_nearest(left[0], known)}")
    return tuple(found)


def _hf_parser(prog: str, kinds: tuple, **own):
    from transformers import HfArgumentParser

    class Parser(_Parser, HfArgumentParser):
        pass

    parser = Parser(kinds, prog=prog, allow_abbrev=False)
    for name, settings in own.items():
        parser.add_argument(f"--{name}", **settings)
    return parser


def _show_help(prog: str, kinds: tuple, tail: str = "") -> None:
    """Help from the dataclasses alone: no import of transformers, so it is quick."""
    print(f"usage: {prog} [options] [--config FILE.yaml]\n")
    for kind in kinds:
        print(f"{kind.__doc__}")
        for f in fields(kind):
            default = f"  [{f.default}]" if isinstance(f.default, str | int) else ""
            names = ", ".join([*f.metadata.get("aliases", []), f"--{f.name}"])
            print(f"  {names:<34}  {f.metadata['help']}{default}")
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
    else:
        for name, value in result.items():
            if value is not None and not isinstance(value, dict):
                print(f"{name}\t{value:.4g}" if isinstance(value, float) else f"{name}\t{value}")


JSON: dict[str, Any] = {"action": "store_true", "help": "Print the result as one line of JSON."}


def _train(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        return _show_help("mezo train", (ModelArguments, DataArguments), TRAIN_HELP)
    from . import run

    _quiet()
    kinds = (ModelArguments, DataArguments, run.TrainArguments)
    parser = _hf_parser("mezo train", kinds, json=JSON)
    if "--help_all" in argv:
        return parser.print_help()
    if not {"--output_dir", "--config"} & set(argv):
        task = argv[argv.index("--task") + 1] if "--task" in argv[:-1] else "opinions"
        argv = ["--output_dir", f"runs/{task}", *argv]
    model, data, args, own = _parse(argv, parser, kinds)
    try:
        result = run.train(model, data, args)
    except KeyboardInterrupt:
        again = " ".join(["mezo train", *argv, "--resume_from_checkpoint", "true"])
        _say(f"\ninterrupted; to go on from the last checkpoint:\n  {again}")
        raise
    shown = {"zero_shot_accuracy": result["zero_shot"]["accuracy"]}
    shown |= {"accuracy": result["test"]["accuracy"], "steps": result["steps"]}
    shown |= {"seconds": result["seconds"], "output_dir": args.output_dir}
    _print(result if own.json else shown, own.json)
    if args.method == "mezo":
        base, log = model.model_name_or_path, f"{args.output_dir}/run.mezo"
        _say(f"next: mezo replay --model {base} --log {log} --output_dir replayed")


def _eval(argv: list[str]) -> None:
    tail = (
        "  --replay LOG                        first rebuild the weights of a run\n"
        "  --batch_size N                      default 32\n"
        "  --json                              one line of JSON\n"
    )
    if {"-h", "--help"} & set(argv):
        return _show_help("mezo eval", (ModelArguments, DataArguments), tail)
    from . import run

    _quiet()
    kinds = (ModelArguments, DataArguments)
    options = {"replay": {}, "batch_size": {"type": int, "default": 32}, "json": JSON}
    model, data, own = _parse(argv, _hf_parser("mezo eval", kinds, **options), kinds)
    result = run.evaluate(model, data, log=own.replay, batch_size=own.batch_size)
    _print(result, own.json)


def _replay(argv: list[str]) -> None:
    tail = (
        "  --log FILE                          the run log\n"
        "  --output_dir DIR                    where the tuned model goes\n"
        "  --until N                           only the first N steps\n"
    )
    if {"-h", "--help"} & set(argv):
        return _show_help("mezo replay", (ModelArguments,), tail)
    from . import run

    _quiet()
    options = {"log": {"required": True}, "output_dir": {"required": True}}
    parser = _hf_parser("mezo replay", (ModelArguments,), **options, until={"type": int}, json=JSON)
    model, own = _parse(argv, parser, (ModelArguments,))
    _print(run.replay(model, own.log, own.output_dir, own.until), own.json)
    _say(f"next: mezo eval --model {own.output_dir} --task ...")


def _log(argv: list[str]) -> None:
    parser = _Parser(prog="mezo log", description="What a run log says, and whether it is whole.")
    parser.add_argument("file")
    parser.add_argument("--steps", action="store_true", help="one line a step")
    parser.add_argument("--recover", action="store_true", help="read what stands before a damage")
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    from . import trajectory

    log = trajectory.read(own.file, recover=own.recover)
    refused = sum(not all(g - g == 0 for g in s.record.projected_grads) for s in log.steps)
    summary = {key: log.header[key] for key in ("format", "seed", "distribution")}
    summary |= {"tensors": len(log.header["tensors"]), "steps": len(log.steps), "refused": refused}
    summary |= {"bytes": Path(own.file).stat().st_size, "torn_bytes": log.torn}
    _print(summary | {"config": log.header["config"]}, own.json)
    if own.steps:
        print("step\tloss\tprojected_grads")
        for step in log.steps:
            grads = "\t".join(f"{g:.6g}" for g in step.record.projected_grads)
            print(f"{step.record.step}\t{step.record.loss:.6g}\t{grads}")


def _demo(argv: list[str]) -> None:
    parser = _Parser(
        prog="mezo demo", description="Fine-tune a small model, offline, and compare with Adam."
    )
    parser.add_argument("--output_dir", default="demo_output", help="default demo_output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    from .demo import demo

    _quiet()

    demo.main(own.output_dir, seed=own.seed, as_json=own.json)
