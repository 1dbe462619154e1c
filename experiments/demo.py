"""The demo's recipes over seeds: how much of Adam's gain over zero-shot does MeZO reach?

python -m experiments.demo --seeds 3                  # writes results/demo-causal-lm.json
python -m experiments.demo --split dev --seeds 2      # prints only: recipes are chosen on dev
python -m experiments.demo --model minilm
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

from mezo.demo import demo
from mezo.runs.result import environment

RESULTS = Path(__file__).parent / "results"


def summary_of(accuracies: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By method: mean and standard deviation over seeds, and the share of Adam's gain."""
    zero, adam = mean(accuracies["zero-shot"]), mean(accuracies["Adam, all weights"])
    return {
        method: {
            "mean": mean(values),
            "std": stdev(values) if len(values) > 1 else 0.0,
            "share_of_adams_gain": (mean(values) - zero) / (adam - zero),
        }
        for method, values in accuracies.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=demo.SETTINGS, default="causal-lm")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    recipes = demo.SETTINGS[args.model].recipes
    runs, accuracies = [], {}
    for seed in range(args.seeds):
        rows = demo.baselines(args.model, seed, args.split)
        rows += [demo.run(args.model, method, seed, split=args.split) for method in recipes]
        kept = ("method", "accuracy", "seconds", "forward_passes", "points")
        runs.append(
            {"seed": seed, "rows": [{key: asdict(row)[key] for key in kept} for row in rows]}
        )
        for row in rows:
            accuracies.setdefault(row.method, []).append(row.accuracy)
        print(seed, {row.method: round(row.accuracy, 4) for row in rows}, flush=True)
    result = {
        "model": args.model,
        "split": args.split,
        "summary": summary_of(accuracies),
        "recipes": {method: asdict(recipe) for method, recipe in recipes.items()},
        "runs": runs,
        "environment": environment(),
    }
    if args.split == "test":
        RESULTS.mkdir(exist_ok=True)
        Path(RESULTS, f"demo-{args.model}.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
