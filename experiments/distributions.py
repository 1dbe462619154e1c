"""Does a run learn the same along gaussian16 as along gaussian directions?

    python -m experiments.distributions [--models causal-lm minilm] [--steps 300]

The demo's opinions and embedded models, five seeds, all weights, the demo's recipe; what differs is
the distribution of the directions alone. The loss and the accuracy on the dev split are compared
seed by seed: batches are the same, directions are not, so that what counts is whether the mean
difference lies within its standard error over seeds. The default distribution may only change where
it does.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from mezo import noise
from mezo.demo.demo import SETTINGS, load
from mezo.demo.tune import tune
from mezo.runs.result import environment

SEEDS = (13, 21, 42, 87, 100)  # the paper's
OUTPUT = Path(__file__).parent / "results" / "distributions.json"


def run(model_name: str, distribution: str, seed: int, steps: int) -> dict:
    model, form, splits = load(model_name)
    recipe = SETTINGS[model_name].recipes["MeZO, all weights"]
    options = recipe.options | {"distribution": distribution}
    recipe = replace(recipe, options=options, steps=steps)
    where = {"seed": seed, "held_out": splits["dev"], "evaluations": 2}
    last = tune(model, form, splits["train"], recipe, **where).points[-1]
    cell = {"model": model_name, "distribution": distribution, "seed": seed, "steps": steps}
    return cell | {"loss": last.loss, "accuracy": last.accuracy}


def compared(cells: list[dict], model_name: str, distribution: str) -> dict[str, float]:
    """Its mean loss and accuracy, and the mean difference to gaussian with its standard error."""
    by_seed = {(c["distribution"], c["seed"]): c for c in cells if c["model"] == model_name}
    seeds = [seed for name, seed in by_seed if name == distribution]
    found = {"seeds": float(len(seeds))}
    for key in ("loss", "accuracy"):
        values = [by_seed[distribution, seed][key] for seed in seeds]
        pairs = [v - by_seed["gaussian", s][key] for v, s in zip(values, seeds, strict=True)]
        error = stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else 0.0
        found |= {key: mean(values), f"{key}_difference": mean(pairs), f"{key}_error": error}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--distributions", nargs="+", default=list(noise.DISTRIBUTIONS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    cells: list[dict] = []
    for model_name in args.models:
        for seed in args.seeds:
            for distribution in args.distributions:
                cells.append(run(model_name, distribution, seed, args.steps))
                print(json.dumps(cells[-1]), flush=True)
                result = {"cells": cells, "environment": environment()}
                args.output.write_text(json.dumps(result, indent=1) + "\n")
        for distribution in args.distributions:
            print(model_name, distribution, compared(cells, model_name, distribution))


if __name__ == "__main__":
    main()
