"""The command `mezo memory`: estimate what a run needs, without loading any weights."""

import argparse

from mezo.cli.parsing import JSON, Parser, say
from mezo.errors import InputError

DTYPES = ("bfloat16", "float16", "float32")
PLANNED = ["in_place", "scratch", "low_rank", "offload", "lora", "lora_checkpointing"]
PLANNED += ["adam", "adam_checkpointing"]


def memory(argv: list[str]) -> None:
    parser = Parser(
        prog="mezo memory",
        description="Estimate memory, size of the run log and time per step of each method, for a "
        "model and a batch, from the model's config alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="facebook/opt-125m to -175b, a folder, or a hub name.")
    add("--dtype", choices=DTYPES, default="bfloat16", help="Data type of the weights.")
    add("--batch_size", "--batch-size", type=int, default=16, help="Examples in a batch.")
    add("--max_length", "--max-length", type=int, default=300, help="Tokens per example.")
    add(
        "--method",
        nargs="+",
        choices=PLANNED,
        metavar="METHOD",
        help=f"By default all: {', '.join(PLANNED)}.",
    )
    add("--steps", type=int, default=20000, help="Steps of the run, for the size of its log.")
    add(
        "--all_logits",
        "--all-logits",
        action="store_true",
        help="Compute the loss of all tokens instead of one.",
    )
    add("--lora_r", "--lora-r", type=int, default=8, help="Rank of LoRA.")
    add("--device", help="Device to measure for the time; by default the accelerator, or cpu.")
    add("--no_time", "--no-time", action="store_true", help="Do not measure the time.")
    add("--json", **JSON)
    own = parser.parse_args(argv)
    for name in ("batch_size", "max_length", "steps", "lora_r"):
        if getattr(own, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(own, name)}")
    import torch

    from mezo.compatibility import accelerator
    from mezo.memory import plan as planning
    from mezo.objectives.progress import Progress

    dtype = getattr(torch, own.dtype)
    planner = planning.Planner(
        planning.config_of(own.model),
        dtype,
        own.batch_size,
        own.max_length,
        all_logits=own.all_logits,
        rank=own.lora_r,
    )
    machine = None
    if not own.no_time:
        found = accelerator()
        device = own.device or ("cpu" if found is None else found.type)
        try:
            machine = planning.calibrate(device, dtype)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from None
    plans = []
    for method in Progress(say).over(own.method or PLANNED, "method"):
        if method == "in_place" and dtype.itemsize < 4 and not own.method:
            continue
        plans.append(planner.plan(method, own.steps, machine))
    if own.json:
        print(planning.to_json(plans, planner, machine))
        return
    _report(own.method or PLANNED, planner, plans, machine)


def _report(methods, planner, plans, machine) -> None:
    say(f"{planner.parameters / 1e9:.3g} B parameters, weights {_size(planner.weights)}")
    for line in _table(plans):
        print(line)
    if "offload" in methods:
        say("offload: mezo train --offload; --offload_folder DIR keeps the weights in a file")
    if machine is not None:
        say(
            f"time: {machine.flops / 1e12:.3g} Tflop/s, {machine.draws / 1e9:.3g} G draws/s, "
            f"{machine.bandwidth / 1e9:.3g} GB/s to and fro, measured here on {machine.device}"
        )


def _table(plans) -> list[str]:
    from mezo.memory.plan import PLANNED as named

    lines = ["method\tdevice memory\thost memory\tto store\ttime of a step"]
    for plan in plans:
        cells = [_size(x) if x else "-" for x in (plan.device, plan.host, plan.stored)]
        seconds = "-" if plan.seconds is None else f"{plan.seconds:.3g} s"
        lines.append("\t".join([named[plan.method], *cells, seconds]))
    return lines


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.4g} GB" if count >= 100 else f"{count:.3g} GB"
