"""Objectives without a gradient: accuracy beside cross-entropy, a judge of text, F1 on SQuAD.

python -m experiments.rewards metrics --data_dir DATA    # Table 3's question
python -m experiments.rewards text --data_dir DATA       # causal-lm, sampled text
python -m experiments.rewards squad --data_dir DATA      # LoRA, token F1 of the answer
python -m experiments.rewards plot
writes experiments/results/rewards-*.json, cell by cell: a cell that is there is not run again.
--quick makes a fiftieth of the steps with one seed, into other files: to see that it runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mezo import MeZO, rewards, tasks
from mezo.compare import style
from mezo.demo.tune import batches
from mezo.evaluation.evaluate import evaluate
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.modes import evaluating, to_device
from mezo.models.trainable import select
from mezo.objectives import form_for
from mezo.objectives.generation import Generation
from mezo.objectives.metric_losses import metric_closure
from mezo.runs.result import environment

SEEDS = (13, 21, 42, 87, 100)  # the paper's
BIASES = r"bias|LayerNorm|layer_norm"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    steps: int
    lr: float
    eps: float
    batch_size: int
    trainable: str = BIASES


# accuracy moves by 1 / batch_size at least, so that its eps is larger; the rate of cross-entropy is
# that of experiments/ablation.py
METRICS = {
    "cross_entropy": Setting(150, 6e-4, 1e-3, 128, ""),
    "accuracy": Setting(150, 2e-3, 1e-2, 128, ""),
}
TEXT = {"form": Setting(150, 6e-3, 3e-2, 48), "sentiment": Setting(150, 6e-3, 3e-2, 48)}
SQUAD = Setting(100, 1e-3, 1e-2, 16, "")
GENERATION = Generation(20, stop=(".",), temperature=1.0)
DEV_DRAW = 2**31


def optimizer_of(model, setting: Setting, seed: int) -> MeZO:
    if setting.trainable:
        select(model, setting.trainable)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return MeZO(trained, lr=setting.lr, eps=setting.eps, seed=seed)


def metrics_cell(data: Path, task_name: str, objective: str, seed: int, setting: Setting) -> dict:
    """Accuracy on the test set of causal-lm trained on a metric; 512 examples a label."""
    model, tokenizer = models.load(ModelArguments("causal-lm"))
    if task_name == "sst2":
        task = tasks.get("sst2")
        train = tasks.load_examples(task, "train", data_dir=str(data / "SST-2"))
        test = tasks.load_examples(task, "test", data_dir=str(data / "SST-2"))
        train, _ = tasks.few_shot(train, 512, seed)
    else:  # the public dev set stands for the train set, which is not here
        task = tasks.get("snli")
        train = tasks.load_examples(task, "dev", data_dir=str(data / "SNLI"))
        train, _ = tasks.few_shot(train, 512, seed)
        test = tasks.load_examples(task, "test", data_dir=str(data / "SNLI"))
        test = tasks.sample(test, 1000, 0)
    form = form_for(model, tokenizer, task)
    before = evaluate(model, form, test).accuracy
    optimizer, ties = optimizer_of(model, setting, seed), rewards.Ties()
    optimizer.observers.append(ties)
    stream = batches([form.encode(e) for e in train], setting.batch_size, seed)
    curve = []
    for step in range(1, setting.steps + 1):
        optimizer.param_groups[0]["lr"] = setting.lr * (1 - (step - 1) / setting.steps)
        batch = to_device(form.collate(next(stream)), model)
        with evaluating(model):
            loss = optimizer.step(metric_closure(form, model, batch, objective))
        if step % max(1, setting.steps // 20) == 0:
            curve.append([step, loss])
    found = {"before": before, "accuracy": evaluate(model, form, test).accuracy}
    return found | {"train_loss": curve, "ties": ties.ties, "estimates": ties.estimates}


def sentiment() -> rewards.RewardFunc:
    """Probability that minilm, zero-shot, gives to "positive"."""
    model, tokenizer = models.load(ModelArguments("minilm"))
    form = form_for(model, tokenizer, tasks.get("sst2"))

    def sentiment(completions, **kwargs) -> list[float]:
        examples = [tasks.Example({"sentence": text or "."}, 0, "") for text in completions]
        with evaluating(model):
            scores = form.scores(model, form.collate([form.encode(e) for e in examples]))
        return scores.softmax(-1)[:, 1].tolist()

    return sentiment


def form_reward(completions, **kwargs) -> list[float]:
    """A checker's points: 5 to 9 words, none twice, only letters, commas and apostrophes."""
    found = []
    for text in completions:
        words = text.split()
        points = [5 <= len(words) <= 9, len(set(words)) == len(words)]
        points.append(bool(words) and all(c.isalpha() or c in " ,'" for c in text))
        found.append(sum(points) / 3)
    return found


def text_cell(data: Path, name: str, seed: int, setting: Setting) -> dict:
    """causal-lm goes on from the first three words of sentences; its text is judged."""
    model, tokenizer = models.load(ModelArguments("causal-lm"))
    task = tasks.get("sst2")
    examples = tasks.load_examples(task, "train", data_dir=str(data / "SST-2"))
    words = [e.fields["sentence"].split() for e in examples]
    prompts = sorted({" ".join(w[:3]) for w in words if len(w) > 8})
    prompts = [str(p) for p in tasks.sample(prompts, 4000, 0)]  # type: ignore[type-var]
    dev, train = prompts[:128], prompts[128:]
    judge = sentiment() if name == "sentiment" else form_reward
    return learn(model, tokenizer, judge, train, dev, GENERATION, setting, seed)


def squad_cell(data: Path, seed: int, setting: Setting) -> dict:
    """The sentence that holds the answer, and the question: token F1 of what is generated."""
    model, tokenizer = models.load(ModelArguments("causal-lm", use_peft=True), adapter_seed=seed)
    file = data / "SQuAD" / "dev-v1.1.reconstructed.json"
    articles = json.loads(file.read_text())["data"]
    found = [row for a in articles[:40] for p in a["paragraphs"] for row in questions(p)]
    held_out = [row for a in articles[40:] for p in a["paragraphs"] for row in questions(p)]
    train, dev = tasks.sample(found, 2000, 0), tasks.sample(held_out, 128, 0)
    generation = Generation(12, stop=("\n",))
    return learn(model, tokenizer, rewards.token_f1, train, dev, generation, setting, seed)


def questions(paragraph: dict) -> list[dict]:
    rows = []
    for qa in paragraph["qas"]:
        at = qa["answers"][0]["answer_start"]
        start = paragraph["context"].rfind(". ", 0, at) + 1
        text = paragraph["context"][start:].strip()[:400]
        prompt = f"{text}\nQuestion: {qa['question'].strip()}\nAnswer:"
        rows.append({"prompt": prompt, "answers": [a["text"] for a in qa["answers"]]})
    return [row for row in rows if len(row["prompt"]) < 400]  # the model has 256 positions


def learn(model, tokenizer, judge, train, dev, generation, setting: Setting, seed: int) -> dict:
    """Reward on the held-out prompts along the way; the same noise at every evaluation."""
    rows = [row if isinstance(row, dict) else {"prompt": row} for row in [*train, *dev]]
    train, dev = rows[: -len(dev)], rows[-len(dev) :]
    optimizer, functions = optimizer_of(model, setting, seed), rewards.RewardFunctions(judge)
    ties = rewards.Ties()
    optimizer.observers.append(ties)

    def closure(chosen: list[dict], draw: int, keep: Callable) -> Callable[[], float]:
        columns = {n: [row[n] for row in chosen] for n in chosen[0] if n != "prompt"}
        prompts = [row["prompt"] for row in chosen]
        options = {"columns": columns, "draw": draw, "on_sample": keep, "batch_size": 64}
        return rewards.closure(model, tokenizer, prompts, functions, generation, **options)

    def held_out() -> rewards.Sampled:
        seen: list[rewards.Sampled] = []
        closure(dev, DEV_DRAW, seen.append)()
        return seen[0]

    first = held_out()
    curve = [[0, first.scores.mean]]
    order = tasks.sample(train, len(train), seed)
    for step in range(1, setting.steps + 1):
        optimizer.param_groups[0]["lr"] = setting.lr * (1 - (step - 1) / setting.steps)
        at = (step - 1) * setting.batch_size % (len(order) - setting.batch_size + 1)
        chosen = order[at : at + setting.batch_size]
        optimizer.step(closure(chosen, step, lambda sampled: None))
        if step % max(1, setting.steps // 10) == 0:
            curve.append([step, held_out().scores.mean])
    last = held_out()
    samples = [
        {"prompt": row["prompt"], "before": a.text, "after": b.text}
        for row, a, b in zip(dev[:8], first.completions, last.completions, strict=False)
    ]
    found = {"before": curve[0][1], "after": last.scores.mean, "curve": curve}
    return found | {"samples": samples, "ties": ties.ties, "estimates": ties.estimates}


def cells(what: str, data: Path, quick: bool):
    """(key, setting, function of a setting) of every cell."""
    for seed in SEEDS[: 1 if quick else None]:
        if what == "metrics":
            for task in ("sst2",):  # causal-lm learns nothing of SNLI: docs/log.md
                for name, setting in METRICS.items():
                    run = lambda s, t=task, n=name, k=seed: metrics_cell(data, t, n, k, s)  # noqa: E731
                    yield f"{task} {name} seed={seed}", setting, run
        elif what == "text":
            for name, setting in TEXT.items():
                run = lambda s, n=name, k=seed: text_cell(data, n, k, s)  # noqa: E731
                yield f"text {name} seed={seed}", setting, run
        else:
            yield f"squad token_f1 seed={seed}", SQUAD, lambda s, k=seed: squad_cell(data, k, s)


def plot(folder: Path, path: Path) -> None:
    """Reward on held-out prompts against steps: every seed, and their mean. SQuAD's stays at 0."""
    done = json.loads((folder / "rewards-text.json").read_text())["cells"]
    known = ("text sentiment", "text form")
    names = [name for name in known if any(key.startswith(name) for key in done)]
    figure, colour = style.figure(3.8 * len(names)), style.COLOURS[0]
    for axes, name in zip(style.panels(figure, rows=len(names)), names, strict=True):
        curves = [cell["curve"] for key, cell in done.items() if key.startswith(name)]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=colour, alpha=0.3, linewidth=1)
        means = [statistics.mean(r for _, r in points) for points in zip(*curves, strict=True)]
        axes.plot([step for step, _ in curves[0]], means, color=colour, marker="o", markersize=4)
        axes.set(title=name, xlabel="steps", ylabel="reward on held-out prompts")
    style.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("metrics", "text", "squad", "plot"))
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.what == "plot":
        return plot(RESULTS, RESULTS.parents[1] / "docs" / "rewards.png")
    out = RESULTS / f"rewards-{args.what}{'-quick' if args.quick else ''}.json"
    if args.data_dir is None:
        parser.error("--data_dir is missing")
    done = json.loads(out.read_text()) if out.exists() else {"cells": {}}
    out.parent.mkdir(exist_ok=True)
    for key, setting, run in cells(args.what, args.data_dir, args.quick):
        if key in done["cells"]:
            continue
        if args.quick:
            setting = Setting(**(asdict(setting) | {"steps": max(1, setting.steps // 50)}))
        began = time.perf_counter()
        cell = run(setting) | {"setting": asdict(setting)}
        done["cells"][key] = cell | {"seconds": time.perf_counter() - began}
        done["environment"] = environment()
        out.write_text(json.dumps(done, indent=1))
        after = cell.get("after", cell.get("accuracy"))
        print(f"{key}  {cell['before']:.4f} -> {after:.4f}  ties {cell['ties']}", flush=True)


if __name__ == "__main__":
    main()
