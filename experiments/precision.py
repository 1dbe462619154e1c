"""Half precision against float32: what rounding does to weights, to the estimate and to a run.

python -m experiments.precision drift                            # synthetic weights, 3 minutes
python -m experiments.precision estimate --data_dir GLUE/SST-2   # the projected gradient
python -m experiments.precision run --data_dir GLUE/SST-2        # 3,000 steps on SST-2, by seed
python -m experiments.precision plot
each writes its part of experiments/results/precision.json; a run that is there is not run again.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mezo import MeZO, noise, tasks, trajectory
from mezo.compare import style
from mezo.demo.tune import Recipe, tune
from mezo.evaluation.evaluate import evaluate
from mezo.forms.rounding import update_
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.modes import to_device
from mezo.noise import NEAREST, ROUND_UPDATE, Move
from mezo.objectives import form_for
from mezo.runs.result import environment
from mezo.trajectory.program import make_, program_of

RESULT = Path(__file__).parent / "results" / "precision.json"
SEEDS = (13, 21, 42)
BASE = Recipe("mezo", 3000, 1e-4, batch_size=8)
RUNS = {  # what is trained in which dtype
    "float32": ("float32", {}),
    "bfloat16 stochastic": ("bfloat16", {}),
    "bfloat16 in place": ("bfloat16", {"perturbation": "in_place", "rounding": "nearest"}),
    "bfloat16 nearest": ("bfloat16", {"rounding": "nearest"}),
    "bfloat16 compensated": ("bfloat16", {"rounding": "compensated"}),
    "bfloat16 master": ("bfloat16", {"rounding": "master"}),
    "float16 stochastic": ("float16", {}),
}


def drift(elements: int = 2**18, steps: int = 1000) -> dict:
    """1,000 steps on w ~ N(0, 0.02^2): how far weights go without an update, and what stays of one.

    The update is lr g z with g ~ N(0, 1) given: its sum in float64 is the true move.
    """
    key, found = noise.tensor_key(1, "w"), {}
    start = 0.02 * noise.draw(noise.tensor_key(0, "w"), 0, elements, step=0)
    grads = noise.draw(noise.tensor_key(0, "g"), 0, steps, step=0).tolist()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        base = start.to(dtype)
        walked = base.clone()
        for step in range(steps):
            walk = [Move(step, 0, 1.0, c) for c in (1e-3, -2e-3, 1e-3)]
            noise.apply_(walked, key, walk)
        moved = (walked.double() - base.double()).norm() / base.double().norm()
        found[f"{name} walks alone"] = {"moved": float(moved)}
        for lr in (1e-6, 1e-5, 1e-4):
            true = torch.zeros(elements, dtype=torch.float64)
            table = [Move(step, 0, 1.0, -lr * g) for step, g in enumerate(grads)]
            noise.apply_(true, key, table)
            for rounding in ("in place", "nearest", "stochastic", "compensated", "master"):
                weights, state = base.clone(), {}
                for step, g in enumerate(grads):
                    moves = []
                    if rounding == "in place":
                        moves = [Move(step, 0, 1.0, c) for c in (1e-3, -2e-3, 1e-3)]
                    code = ROUND_UPDATE if rounding == "stochastic" else NEAREST
                    moves += [Move(step, 0, 1.0, -lr * g, code)]
                    how = "nearest" if rounding == "in place" else rounding
                    update_(weights, key, moves, how, "gaussian", state)
                move = weights.double() - base.double()
                error = float((move - true).norm() / true.norm())
                kept = float(move @ true / (true @ true))
                found[f"{name} {rounding} {lr:g}"] = {"error": error, "kept": kept}
    return found


def load(dtype: str):
    model, tokenizer = models.load(ModelArguments("causal-lm"))
    model.to(getattr(torch, dtype))
    return model, form_for(model, tokenizer, tasks.get("sst2"))


def estimate(data_dir: str, directions: int = 200) -> dict:
    """projected_grad of float32 weights and of the same numbers in 16 bits, direction by direction.

    "loss in dtype" is what a loss that is not computed in float32 gives.
    """
    examples = tasks.load_examples(tasks.get("sst2"), "train", data_dir=data_dir)
    shown = tasks.sample(examples, 16, 0)
    found = {}
    for dtype in ("bfloat16", "float16"):
        grads: dict[str, list[float]] = {}
        for name in ("float32", "loss in float32", "loss in dtype"):
            model, form = load(dtype)
            if name == "float32":
                model.float()
            batch = to_device(form.collate([form.encode(e) for e in shown]), model)
            optimizer = MeZO(model.named_parameters(), 0.0, seed=5, perturbation="scratch")

            def loss(model=model, form=form, batch=batch, name=name, dtype=dtype):
                value = form.loss(model, batch)
                return value.to(getattr(torch, dtype)) if name == "loss in dtype" else value

            grads[name] = []
            for _ in range(directions):
                grads[name].append(optimizer.estimate(loss).projected_grad)
                optimizer.step()
        true = torch.tensor(grads["float32"], dtype=torch.float64)
        for name in ("loss in float32", "loss in dtype"):
            got = torch.tensor(grads[name], dtype=torch.float64)
            found[f"{dtype} {name}"] = {
                "error_std": float((got - true).std()),
                "correlation": float(torch.corrcoef(torch.stack([got, true]))[0, 1]),
                "zeros": int((got == 0).sum()),
            }
        found[f"{dtype} float32"] = {"std": float(true.std()), "directions": directions}
    return found


def run(name: str, seed: int, data_dir: str) -> dict:
    dtype, options = RUNS[name]
    task, recipe = tasks.get("sst2"), replace(BASE, options=options)
    train = tasks.load_examples(task, "train", data_dir=data_dir)
    mixed = tasks.sample(train, 2500, seed)
    model, form = load(dtype)
    test = tasks.load_examples(task, "test", data_dir=data_dir)
    held_out = mixed[2000:]
    with tempfile.TemporaryDirectory() as folder:
        options = {"seed": seed, "held_out": held_out, "log": f"{folder}/run.mezo"}
        tuned = tune(model, form, mixed[:2000], recipe, evaluations=10, **options)
        found = {"recipe": asdict(recipe), "curve": [asdict(p) for p in tuned.points]}
        if "rounding" not in recipe.options and dtype != "float32":
            rebuilt, _ = load(dtype)
            rounded_once(rebuilt, f"{folder}/run.mezo")
            again = evaluate(rebuilt, form, held_out)
            found["rounded_once"] = {"accuracy": again.accuracy, "loss": again.loss}
    result = evaluate(model, form, test)
    return found | {"test_accuracy": result.accuracy, "test_loss": result.loss}


def rounded_once(model, log: str) -> None:
    """The run's updates summed in float32 on the base weights, and rounded once, at the end."""
    read = trajectory.read(log)
    header = read.header | {"rounding": "master"}
    program = program_of(header, read.steps, 0)
    entries = {entry["name"]: entry for entry in header["tensors"]}
    for name, p in model.named_parameters():
        make_(p.detach(), entries[noise.canonical_name(name)], header, program, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["drift", "estimate", "run", "plot"])
    parser.add_argument("--data_dir")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--runs", nargs="+", default=list(RUNS))
    args = parser.parse_args()
    if args.part == "drift":
        return save("drift", drift())
    if args.part == "plot":
        return plot(Path(__file__).parents[1] / "docs" / "numerics.png")
    if args.part == "estimate":
        return save("estimate", estimate(args.data_dir))
    for seed in args.seeds:
        for name in args.runs:
            key = f"{name} seed={seed}"
            if key not in stored().get("runs", {}):
                save("runs", {key: run(name, seed, args.data_dir)})
                last = stored()["runs"][key]["curve"][-1]
                print(key, round(last["loss"], 4), round(last["accuracy"], 4), flush=True)
    return None


def plot(path: Path) -> None:
    """Dev loss along the runs (mean over seeds), and what is kept of small updates."""
    figure = style.figure(8.4)
    upper, lower = style.panels(figure, rows=2)
    runs = stored()["runs"]
    for colour, name in zip(style.COLOURS, RUNS, strict=False):
        curves = [found["curve"] for key, found in runs.items() if key.startswith(f"{name} seed=")]
        if not curves:
            continue
        steps = [point["step"] for point in curves[0]]
        losses = torch.tensor([[point["loss"] for point in curve] for curve in curves])
        thick = {"linewidth": 2.5} if name in ("float32", "bfloat16 stochastic") else {}
        dashed = {"linestyle": "--"} if name == "bfloat16 in place" else {}
        label = f"{name} ({len(curves)})"
        upper.plot(steps, losses.mean(0), label=label, color=colour, **thick, **dashed)
    upper.set(xlabel="step", ylabel="dev loss, mean over seeds", title="SST-2, causal-lm (3 M)")
    upper.set(ylim=(0.61, 0.67))  # it begins at 0.79
    style.legend(upper, "upper center", columns=2)
    rates = ("1e-06", "1e-05", "0.0001")
    roundings = ("in place", "nearest", "stochastic", "compensated", "master")
    for colour, rounding in zip(style.COLOURS, roundings, strict=False):
        errors = [stored()["drift"][f"bfloat16 {rounding} {rate}"]["error"] for rate in rates]
        line = {"linestyle": ":"} if rounding == "master" else {}
        line |= {"marker": "o", "label": rounding, "color": colour}
        lower.plot([float(rate) for rate in rates], errors, **line)
    lower.set(xscale="log", yscale="log", xlabel="lr * |projected_grad|, weights of 0.02")
    lower.set(ylabel="|error of the move| / |move|", title="bfloat16, 1,000 updates")
    style.legend(lower, "lower left")
    style.save(figure, path)


def stored() -> dict:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {}


def save(part: str, found: dict) -> None:
    whole = stored()
    whole[part] = whole.get(part, {}) | found
    whole["environment"] = environment()
    RESULT.write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
