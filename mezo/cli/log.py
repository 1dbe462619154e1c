"""The command `mezo log`: show, verify, compact and merge run logs."""

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezo.cli.parsing import JSON, Parser, hf_parser, parse, print_result, quiet, say, with_config
from mezo.models.arguments import ModelArguments

if TYPE_CHECKING:  # importing it would import torch, which would slow --help by a second
    from mezo.trajectory.format import Log, Segment

USAGE = """\
commands:
  mezo log FILE [--steps]                        Show its contents; also mezo log show FILE.
  mezo log verify FILE [--model MODEL]           Check that it is whole and starts from MODEL.
  mezo log compact FILE -o OUT                   Write it in a third of the bytes.
  mezo log merge FILE FILE ... -o OUT            Join the logs of one run.
"""


def main(argv: list[str]) -> None:
    """Run `mezo log`; `argv` are the words that follow. Raises InputError for a mistake."""
    commands = {"show": _show, "verify": _verify, "compact": _compact, "merge": _merge}
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in commands else ("show", argv)
    commands[name](rest)


def _show(argv: list[str]) -> None:
    parser = Parser(
        prog="mezo log",
        description="Show what a run log contains.",
        epilog=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file")
    parser.add_argument("--steps", action="store_true", help="Print one line per step.")
    parser.add_argument("--recover", action="store_true", help="Read what precedes the damage.")
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    from mezo import trajectory

    log = trajectory.read(own.file, recover=own.recover)
    found = _summary(own.file, log)
    if own.json:
        rows = [_settings(segment) for segment in log.segments]
        records = {"records": [vars(step.record) for step in log.steps]} if own.steps else {}
        found |= {"segments": rows} | {key: log.header[key] for key in ("config", "versions")}
        return print_result(_without_nan(found | records), as_json=True)
    for key in ("config", "versions"):
        found |= {f"{key}.{name}": value for name, value in log.header[key].items()}
    print_result(
        {_printable(name): _printable(value) for name, value in found.items()}, as_json=False
    )
    print("from\tto\teps\tlr\tweight_decay\tcycles")
    for segment in log.segments:
        if len(segment.grads):
            print(*_line(segment), sep="\t")
    if own.steps:
        print("step\tloss\tprojected_grads")
        for step in log.steps:
            r = step.record
            print(r.step, f"{r.loss:.6g}", *(f"{g:.6g}" for g in r.projected_grads), sep="\t")


def _summary(file: str, log: "Log") -> dict[str, Any]:
    header, steps = log.header, log.steps
    keys = ("format", "seed", "distribution", "perturbation", "rounding", "rule")
    found: dict[str, Any] = {"compact": True} if log.compact else {}
    found |= {key: header[key] for key in keys}
    found["tensors"] = len(header["tensors"])
    found["parameters"] = sum(math.prod(entry["shape"]) for entry in header["tensors"])
    found |= {"start": log.start} if log.start else {}
    found |= {"steps": len(steps), "refused": sum(s.refused for s in log.segments)}
    found["digests"] = ", ".join(map(str, log.digests)) or "none"
    if header.get("losses") is False:
        found["losses"] = "left out"
    elif steps:
        found |= {"first_loss": steps[0].record.loss, "last_loss": steps[-1].record.loss}
    return found | {"bytes": Path(file).stat().st_size, "torn_bytes": log.torn}


def _settings(segment: "Segment") -> dict[str, Any]:
    keys = ("start", "eps", "lr", "weight_decay", "cycles", "lr_in_records")
    return {key: segment.header[key] for key in keys} | {"steps": len(segment.grads)}


def _line(segment: "Segment") -> list[str]:
    """Return a row of the table of settings; a moving learning rate shows as "first to last"."""
    header = segment.header
    lrs = [header["lr"]] if not segment.lrs.size else [segment.lrs[0], segment.lrs[-1]]
    rates = " to ".join(_numbers(row) for row in lrs)
    span = [str(segment.start), str(segment.end - 1), f"{header['eps']:g}"]
    return [*span, rates, _numbers(header["weight_decay"]), _numbers(header["cycles"])]


def _numbers(values: Any) -> str:
    """Join numbers with commas ("0.1,0.2"), or abbreviate equal ones ("3 x 0.1")."""
    words = [f"{x:g}" for x in values]
    short = len(words) > 1 and len(set(words)) == 1
    return f"{len(words)} x {words[0]}" if short else ",".join(words)


def _printable(value: Any) -> Any:
    """Escape text that is not printable: a file could hold control sequences for the terminal."""
    text = value if isinstance(value, str) else repr(value)
    if isinstance(value, dict | int | float | None) or text.isprintable():
        return value
    return ascii(value)


def _without_nan(value: Any) -> Any:
    """Replace every number that is not finite by None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _verify(argv: list[str]) -> None:
    own, model = _verify_options(argv)
    from mezo import trajectory

    log = trajectory.read(own.file)
    found = {"log": own.file, "steps": len(log.steps), "torn_bytes": log.torn}
    if model is not None:
        from mezo.runs.rebuild import rebuilt

        found["model"] = model.model_name_or_path
        rebuilt(model, own.file, log.start)  # replays no step, but compares all weights first
    if own.json:
        return print_result(found, as_json=True)
    line = f"{own.file}: {found['steps']} steps, whole"
    line += f" but for {log.torn} bytes of an unfinished one" if log.torn else ""
    print(line + (f", from the weights of {found['model']}" if model is not None else ""))


def _verify_options(argv: list[str]) -> tuple[argparse.Namespace, ModelArguments | None]:
    """Return the command's options and the model's, or None if the model's are not used.

    Parsing the model's options imports transformers, which is slow.
    """
    given = {word for word in argv if word.startswith("-")}
    if given - {"--json", "-h", "--help"}:
        quiet()
        slow = hf_parser("mezo log verify", (ModelArguments,), json=JSON)
        slow.add_argument("file")
        model, own = parse(with_config(argv), slow, (ModelArguments,))
        return own, model
    text = (
        "Check that a run log is whole. With --model, and the options for it that mezo train "
        "takes, also check that the run started from that model."
    )
    parser = Parser(prog="mezo log verify", description=text)
    parser.add_argument("file")
    parser.add_argument("--model", help="Hub name or folder of the base model.")
    parser.add_argument("--json", **JSON)
    return parser.parse_args(argv), None


def _compact(argv: list[str]) -> None:
    text = (
        "Write a run log in a third of the bytes. It replays to the same weights, but nothing can "
        "be appended to it."
    )
    parser = Parser(prog="mezo log compact", description=text)
    parser.add_argument("file")
    parser.add_argument("-o", "--output_file", required=True, help="A new file.")
    parser.add_argument(
        "--without_losses",
        action="store_true",
        help="Halve the size again; the learning curve is lost.",
    )
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    from mezo import trajectory

    trajectory.compact(own.file, own.output_file, losses=not own.without_losses)
    _report(own.output_file, own.json)


def _merge(argv: list[str]) -> None:
    text = (
        "Join the logs of one run, each of which covers a range of its steps. A single compact "
        "log is written in its long form."
    )
    parser = Parser(prog="mezo log merge", description=text)
    parser.add_argument("files", nargs="+", metavar="file")
    parser.add_argument("-o", "--output_file", required=True, help="A new file.")
    parser.add_argument("--json", **JSON)
    own = parser.parse_args(argv)
    from mezo import trajectory

    trajectory.merge(own.files, own.output_file)
    _report(own.output_file, own.json)


def _report(file: str, as_json: bool) -> None:
    from mezo import trajectory

    log, size = trajectory.read(file), Path(file).stat().st_size
    steps = len(log.steps)
    found = {"log": file, "steps": steps, "bytes": size, "bytes_a_step": size / max(steps, 1)}
    print_result(found, as_json)
    say(f"next: mezo replay --model ... --log {shlex.quote(file)} --output_dir ...")
