"""SST-2 with the embedded models: zero-shot, in context, MeZO, Adam; k = 16, 512, 1,000 examples.

python -m experiments.sst2 --data_dir GLUE/SST-2 --model minilm --seeds 3
writes experiments/results/sst2-<model>.json, cell by cell: a cell that is there is not run again.
k examples a label for training and k for dev, drawn as the paper's RoBERTa splits; "1000" is 1,000
examples in all and 500 for dev, as the paper's OPT runs. Tested on all 872 of the public dev set.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from mezo import tasks
from mezo.demo.tune import Recipe, tune
from mezo.evaluation.evaluate import evaluate
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives import form_for
from mezo.runs.result import environment

SEEDS = (13, 21, 42, 87, 100)  # the paper's
ZERO_SHOT = ("zero-shot", "zero-shot-calibrated")
BIASES = r"bias|LayerNorm|layer_norm"
RECIPES = {
    "minilm": {
        "mezo-biases": Recipe("mezo", 450, 5e-3, options={"eps": 1e-2}, trainable=BIASES),
        "mezo-biases-2000": Recipe("mezo", 2000, 5e-3, options={"eps": 1e-2}, trainable=BIASES),
        "mezo": Recipe("mezo", 250, 1.4e-4, options={"distribution": "rademacher"}),
        "adam": Recipe("adam", 150, 5e-5, batch_size=16),
    },
    "causal-lm": {
        "mezo-biases": Recipe("mezo", 600, 3e-3, options={"eps": 1e-2}, trainable=BIASES),
        "mezo": Recipe("mezo", 600, 2e-4),
        "adam": Recipe("adam", 200, 3e-4, batch_size=16),
    },
}


def splits_of(train, size: str, seed: int):
    if size == "1000":
        mixed = tasks.sample(train, 1500, seed)
        return mixed[:1000], mixed[1000:]
    return tasks.few_shot(train, int(size), seed)


def cell(model_name: str, method: str, size: str, seed: int, data_dir: str) -> dict:
    model, tokenizer = models.load(ModelArguments(model_name))
    task = tasks.get("sst2")
    form = form_for(model, tokenizer, task)
    train, dev = splits_of(tasks.load_examples(task, "train", data_dir=data_dir), size, seed)
    test = tasks.load_examples(task, "test", data_dir=data_dir)
    began, found = time.perf_counter(), {}
    if method in ZERO_SHOT or method == "in-context":
        form = form.calibrate(model) if method == "zero-shot-calibrated" else form
        shown = tasks.sample(train, 8, seed) if method == "in-context" else []
        result = evaluate(model, form, test, demonstrations=shown)
    else:
        recipe = RECIPES[model_name][method]
        held_out = tasks.sample(dev, 200, seed)  # dev itself is sorted by label
        tuned = tune(model, form, train, recipe, seed=seed, held_out=held_out, evaluations=3)
        result = evaluate(model, form, test)
        found = {"recipe": asdict(recipe), "curve": [asdict(p) for p in tuned.points]}
        found |= {"train_loss_last_50": sum(tuned.losses[-50:]) / len(tuned.losses[-50:])}
    found |= {"accuracy": result.accuracy, "loss": result.loss}
    return found | {"seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--model", choices=RECIPES, default="minilm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["16", "512", "1000"])
    parser.add_argument("--methods", nargs="+")
    args = parser.parse_args()
    out = Path(__file__).parent / "results" / f"sst2-{args.model}.json"
    done = json.loads(out.read_text()) if out.exists() else {"cells": {}}
    out.parent.mkdir(exist_ok=True)
    methods = args.methods or [*ZERO_SHOT, "in-context", *RECIPES[args.model]]
    for seed in SEEDS[: args.seeds]:
        for size in args.sizes:
            for method in methods:
                key = f"{method} k={size} seed={seed}"
                if method in ZERO_SHOT:
                    key = method  # neither examples nor seed
                if key in done["cells"]:
                    continue
                done["cells"][key] = cell(args.model, method, size, seed, args.data_dir)
                done["environment"] = environment()
                out.write_text(json.dumps(done, indent=1))
                print(key, round(done["cells"][key]["accuracy"], 4), flush=True)


if __name__ == "__main__":
    main()
