"""Estimators and rules at equal numbers of forward passes: the paper's ablations, and later ideas.

python -m experiments.ablation --data_dir GLUE/SST-2 --model standin
Each method's learning rate is chosen on the dev examples of one seed, among factors of 3 around its
first guess, for as long as the best is at an edge (at most 6 runs); then five seeds are run. Cells
are files in experiments/results/ablation-<model>-<task>/, so that several processes can share the
work; a cell that is there is not run again. --summary joins them in one JSON and prints the table.
"""

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.rules import loops, subspaces
from experiments.rules.anchored import Anchored
from experiments.rules.muon import ZOMuon
from mezo import layer_norms, layers, tasks
from mezo.demo.tune import Recipe, tune
from mezo.errors import InputError
from mezo.estimators import passes_of
from mezo.evaluation.evaluate import evaluate
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives import form_for
from mezo.rules import Momentum, ScalarAdam
from mezo.rules import options as rule_options
from mezo.runs.result import environment

SEEDS = (13, 21, 42, 87, 100)  # the paper's
RESULTS = Path(__file__).parent / "results"
TUNING_SEED, MAX_TRIALS = 13, 6


@dataclass(frozen=True)
class Method:
    """What differs from MeZO: `lr` is the first guess, for the causal model."""

    lr: float
    options: dict[str, Any] = field(default_factory=dict)
    fresh_batches: bool = False
    trainable: str = ""
    layers: str = ""
    subspace: str = ""  # a function of rules/subspaces.py
    loop: str = ""  # a function of rules/loops.py, in the place of a run of MeZO
    prompt: bool = True


def _rule(rule) -> dict[str, Any]:
    return {"rule": rule_options(rule)}


FZOO = {"estimator": "one_sided", "shaping": "z_scores"}
MUON = {"perturbation": "low_rank", "rank": 8, "interval": 100}
INSIDE = "coefficients|values"
METHODS = {
    "mezo": Method(2e-4),
    "no prompt": Method(2e-4, prompt=False),
    "n = 4": Method(6e-4, {"num_samples": 4}),
    "n = 4, fresh batches": Method(6e-4, {"num_samples": 4}, fresh_batches=True),
    "n = 16": Method(2e-3, {"num_samples": 16}),
    "momentum": Method(2e-5, _rule(Momentum(0.9))),
    "adam": Method(1e-4, _rule("adam")),
    "scalar adam": Method(2e-4, _rule(ScalarAdam())),
    "sign": Method(2e-4, _rule("sign")),
    "variance modified, weights": Method(2e-4, layers="variance parameters"),
    "variance modified, gradients": Method(2e-4, layers="variance gradients"),
    "expectation modified, weights": Method(2e-4, layers="expectation parameters"),
    "one point": Method(2e-6, {"estimator": "one_point"}),
    "one sided, n = 8": Method(1e-3, {"estimator": "one_sided", "num_samples": 8}),
    "fzoo": Method(2e-4, FZOO | {"num_samples": 8, "distribution": "rademacher"}),
    "rademacher": Method(2e-4, {"distribution": "rademacher"}),
    "gaussian16": Method(2e-4, {"distribution": "gaussian16"}),
    "low rank": Method(2e-4, {"perturbation": "low_rank"}),
    "low rank, momentum": Method(2e-5, _rule(Momentum(0.9)) | {"perturbation": "low_rank"}),
    "zo-muon": Method(1e-3, {"rule": ZOMuon(vectors=0.1)} | MUON | {"num_samples": 4}),
    "anchored decay": Method(2e-4, {"rule": Anchored(10.0)}),
    "activation subspace": Method(2e-3, trainable=INSIDE, subspace="activations"),
    "sensitive weights": Method(2e-3, trainable=INSIDE, subspace="sensitive"),
    "smaller half": Method(2e-4, {"perturbation": "scratch"}, layers="small"),
    "addax": Method(3e-3, loop="addax"),
    "seeds as experts": Method(1e-3, loop="experts"),  # lr is the scale of the directions
}
FOLDERS = {"standin": "tests/standin"}  # of models that are not embedded
GUESS = {"standin": 1.0, "causal-lm": 0.5, "minilm": 0.5}  # of a model, beside the method's
TASKS = {
    "sst2": ("train", "test"),
    "snli": ("train", "test"),
}


class Setting:
    """A model's copies and a task's data, loaded once."""

    def __init__(self, args):
        self.args, self.task = args, tasks.get(args.task)
        self.folder = RESULTS / f"ablation-{args.model}-{args.task}"
        self.folder.mkdir(parents=True, exist_ok=True)
        where = {"data_dir": args.data_dir}
        self.train = tasks.load_examples(self.task, "train", **where)
        self.test = tasks.sample(tasks.load_examples(self.task, "test", **where), 872, 0)

    def recipe(self, method: Method, lr: float) -> Recipe:
        how = {name: getattr(method, name) for name in ("options", "fresh_batches", "trainable")}
        plain = Recipe("mezo", 1, lr, batch_size=16, **how)
        passes = passes_of(method.options.get("estimator", "two_point"), plain.num_samples)
        return replace(plain, steps=max(1, self.args.passes // passes))

    def run(self, name: str, lr: float, seed: int) -> dict[str, Any]:
        """One cell: dev loss decides on lr, test accuracy is the result."""
        began, method = time.perf_counter(), METHODS[name]
        model, tokenizer = models.load(
            ModelArguments(FOLDERS.get(self.args.model, self.args.model))
        )
        task = self.task if method.prompt else replace(self.task, prompt="{sentence}")
        form = form_for(model, tokenizer, task)
        train, dev = tasks.few_shot(self.train, 512, seed)
        held_out = tasks.sample(dev, 200, seed)
        recipe = self.recipe(method, lr)
        if method.loop:
            return self._looped(name, model, form, train, held_out, lr, seed)
        if method.subspace:
            subspaces.install(model, _subspace(model, form, train, method))
        if method.layers:
            recipe = replace(
                recipe, options=recipe.options | {"layers": _layers(model, form, train, method)}
            )
        try:
            tuned = tune(model, form, train, recipe, seed=seed, held_out=held_out, evaluations=2)
        except InputError:  # the loss is not finite any more
            recipe = replace(recipe, options={})
            return {
                "method": name,
                "seed": seed,
                "dev_loss": 1e9,
                "recipe": asdict(recipe),
            } | dict.fromkeys(("accuracy", "loss", "seconds"), 0.0)
        last, found = tuned.points[-1], evaluate(model, form, self.test)
        cell = {"method": name, "seed": seed, "dev_loss": last.loss, "dev_accuracy": last.accuracy}
        cell |= {
            "accuracy": found.accuracy,
            "loss": found.loss,
            "curve": [asdict(p) for p in tuned.points],
        }
        recipe = replace(recipe, options={k: v for k, v in recipe.options.items() if k != "layers"})
        return cell | {"recipe": asdict(recipe), "seconds": time.perf_counter() - began}

    def _looped(self, name, model, form, train, held_out, lr: float, seed: int) -> dict[str, Any]:
        """Return a cell of a method with a loop of its own, which has no loss: dev errors judge."""
        began = time.perf_counter()
        loop = getattr(loops, METHODS[name].loop)
        accuracy = loop(model, form, train, self.args.passes, lr, seed)
        dev, test = accuracy(held_out), accuracy(self.test)
        cell = {"method": name, "seed": seed, "dev_loss": 1 - dev, "dev_accuracy": dev}
        cell |= {"accuracy": test, "loss": None, "recipe": {"lr": lr, "steps": None}}
        return cell | {"seconds": time.perf_counter() - began}

    def cell(self, name: str, lr: float, seed: int) -> dict[str, Any] | None:
        """A cell that is there, or is run now; None if another process is at it."""
        path = self.folder / f"{name.replace(' ', '_')}-{lr:.3g}-{seed}.json"
        if path.exists():
            return json.loads(path.read_text())
        claim = path.with_suffix(".running")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return None
        try:
            found = self.run(name, lr, seed)
            path.write_text(json.dumps(found))
        finally:
            claim.unlink()
        print(path.stem, round(found["dev_loss"], 4), round(found["accuracy"], 4), flush=True)
        return found


def _layers(model, form, train, method: Method) -> dict[str, Any]:
    named = list(model.named_parameters())
    if method.layers == "small":
        return layer_norms.small(named, 0.5)
    modified, norms = method.layers.split()
    if norms == "parameters":
        scales = layer_norms.parameter_norms(named)
    else:
        batch = form.collate([form.encode(e) for e in train[:: len(train) // 32]])
        scales = layer_norms.gradient_norms(named, lambda: form.loss(model, batch))
    make = {"variance": layers.variance_modified, "expectation": layers.expectation_modified}
    return make[modified](scales)


def _subspace(model, form, train, method: Method) -> subspaces.Subspace:
    """Return rank 8 of the activations, or the 1 % of weights of the largest gradients."""
    batch = form.collate([form.encode(e) for e in train[:: len(train) // 32]])
    find, share = getattr(subspaces, method.subspace), {"activations": 8, "sensitive": 0.01}
    return find(model, lambda: form.loss(model, batch), share[method.subspace])


def tuned_lr(setting: Setting, name: str) -> float | None:
    """The learning rate of the lowest dev loss; None if a cell is being run elsewhere."""
    guess = METHODS[name].lr * GUESS[setting.args.model]
    found: dict[int, float] = {}
    wanted = [0, 1, -1]
    while wanted:
        step = wanted.pop(0)
        cell = setting.cell(name, guess * 3.0**step, TUNING_SEED)
        if cell is None:
            return None
        found[step] = cell["dev_loss"] if math.isfinite(cell["dev_loss"]) else math.inf
        best = min(found, key=lambda k: found[k])
        if not wanted and len(found) < MAX_TRIALS:
            wanted = [k for k in (best + 1, best - 1) if k not in found][:1]
    return guess * 3.0 ** min(found, key=lambda k: found[k])


def summary(setting: Setting) -> None:
    """Write and print the rows of the cells that are here; other rows of the file are kept."""
    rows, out = {}, RESULTS / f"ablation-{setting.args.model}-{setting.args.task}.json"
    cells = [json.loads(p.read_text()) for p in sorted(setting.folder.glob("*.json"))]
    before = next(c["curve"][0] for c in cells if "curve" in c)
    print(f"before: dev loss {before['loss']:.4f}, accuracy {before['accuracy']:.3f}")
    for name in METHODS:
        mine = [c for c in cells if c["method"] == name]
        trials = {c["recipe"]["lr"]: c for c in mine if c["seed"] == TUNING_SEED}
        if not trials:
            continue
        lr = min(trials, key=lambda k: trials[k]["dev_loss"])
        final = [c for c in mine if c["recipe"]["lr"] == lr]
        row: dict[str, Any] = {"lr": lr, "steps": final[0]["recipe"]["steps"], "seeds": len(final)}
        for key in ("loss", "accuracy", "seconds"):
            values = [c[key] for c in final]
            if None in values:
                row[key] = None
                continue
            row[key] = mean(values)
            row[f"{key}_std"] = stdev(values) if len(values) > 1 else 0.0
        row["trials"] = {f"{k:.3g}": c["dev_loss"] for k, c in sorted(trials.items())}
        rows[name] = row
        test = "-" if row["loss"] is None else f"{row['loss']:.3f} ± {row['loss_std']:.3f}"
        accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_std']:.1f}"
        print(f"| {name} | {lr:.1e} | {test} | {accuracy} | {len(final)} |")
    had = json.loads(out.read_text())["rows"] if out.exists() else {}
    found = {"passes": setting.args.passes, "rows": had | rows, "before": before}
    out.write_text(json.dumps(found | {"environment": environment()}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--task", choices=TASKS, default="sst2")
    parser.add_argument("--model", choices=GUESS, default="standin")
    parser.add_argument("--passes", type=int, default=600, help="forward passes of 16 examples")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    setting = Setting(args)
    if args.summary:
        return summary(setting)
    left = list(args.methods)
    while left:
        for name in list(left):
            lr = tuned_lr(setting, name)
            cells = [setting.cell(name, lr, s) for s in SEEDS[: args.seeds]] if lr else [None]
            if all(cells) or (lr is None and len(left) == 1):
                left.remove(name)
        time.sleep(1)


if __name__ == "__main__":
    main()
