"""The demo's recipes over seeds: how much of Adam's gain over zero-shot does MeZO reach?

python -m experiments.demo --seeds 3         # writes experiments/results/demo.json
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from mezo.demo import demo
from mezo.runs.result import environment

OUT = Path(__file__).parent / "results" / "demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    runs = []
    for seed in seeds:
        rows = demo.baselines(seed)
        rows += [demo.run(name, recipe, seed) for name, recipe in demo.RECIPES.items()]
        kept = ("method", "accuracy", "forward_passes", "points")
        cells = [{key: asdict(row)[key] for key in kept} for row in rows]
        runs.append({"seed": seed, "rows": cells})
        print(seed, {row.method: round(row.accuracy, 4) for row in rows}, flush=True)
    table = {row["method"]: [] for row in runs[0]["rows"]}
    for run in runs:
        for row in run["rows"]:
            table[row["method"]].append(row["accuracy"])
    zero, adam = mean(table["zero-shot"]), mean(table["Adam, all weights"])
    summary = {
        name: {
            "mean": mean(values),
            "std": stdev(values) if len(values) > 1 else 0.0,
            "share_of_adams_gain": (mean(values) - zero) / (adam - zero),
        }
        for name, values in table.items()
    }
    recipes = {name: asdict(recipe) for name, recipe in demo.RECIPES.items()}
    result = {"summary": summary, "recipes": recipes, "runs": runs, "environment": environment()}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1))
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
