"""What a rule costs beside plain sgd: the noise and updates of a step, without forward passes.

    python -m benchmarks.rules --shape 125m --output benchmarks/results/rules-cpu.json

Random weights of OPT's shape and a loss that is a constant's worth of work: what is left of a step
is drawing z and moving weights. "reference" is the published code's: torch.normal, four sweeps.
Methods take turns in one process; a figure is the median of its turns.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.step import SHAPES, build, reference_step
from mezo import MeZO
from mezo.rules import Adam, Momentum, Rule
from mezo.runs.result import environment

RULES: dict[str, str | Rule] = {
    "sgd, in place": "sgd",
    "momentum, buffer": "momentum",
    "momentum, window 150": Momentum(0.9, window=150),
    "adam, buffers": "adam",
    "adam, window 50": Adam((0.9, 0.95), window=50),
}


def measure(shape: str, repeats: int) -> dict[str, float]:
    """Seconds a step of each rule, once its window is full."""
    model = build(shape)
    losses = itertools.cycle([1.0, 0.0])
    calls: dict[str, Callable[[], object]] = {}
    calls["reference"] = lambda: reference_step(model, lambda: torch.tensor(next(losses)))
    for distribution in ("gaussian", "rademacher"):
        for name, rule in RULES.items():
            options = {
                "perturbation": "in_place",
                "distribution": distribution,
                "rule": rule,
                "seed": 0,
            }
            optimizer = MeZO(model.named_parameters(), lr=0.0, **options)
            past = [(step, (1.0,)) for step in range(200)]
            optimizer.memory.past, optimizer.memory.number = past, 200
            optimizer.param_groups[0]["step"] = 200
            calls[f"{name}, {distribution}"] = lambda o=optimizer: o.step(lambda: next(losses))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for turn in range(repeats + 1):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if turn:  # the first one compiles and takes the memory
                    seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = measure(args.shape, args.repeats)
    for name, value in found.items():
        kind = name.rsplit(", ", 1)[-1]
        plain = found.get(f"sgd, in place, {kind}", found["reference"])
        ratios = f"{value / plain:7.1f} plain steps {value / found['reference']:7.2f} references"
        print(f"{name:36} {value:8.3f} s {ratios}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"shape": args.shape, "seconds": found, "environment": environment()}
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
