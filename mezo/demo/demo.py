"""`mezo demo`: a sentence encoder learns opinions, with forward passes alone and by Adam.

Offline, on the embedded data set: zero-shot, in context (8 examples), MeZO on the biases and norms,
MeZO on all weights, Adam on all weights. Leaves a table, a plot, and each run's log.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mezo import tasks
from mezo.compare.plots import learning_curves
from mezo.demo.tune import Recipe, extra_memory, tune
from mezo.evaluation.curve import Point
from mezo.evaluation.evaluate import evaluate
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives import Form, form_for
from mezo.runs.result import environment, make_folder
from mezo.tasks import Example

# from a few trials; MeZO's rates are far from Adam's, and depend on what is tuned
BIASES = r"bias|LayerNorm"
RECIPES = {
    "MeZO, biases and norms": Recipe("mezo", 450, 5e-3, eps=1e-2, trainable=BIASES),
    "MeZO, all weights": Recipe("mezo", 250, 1.4e-4, distribution="rademacher"),
    "Adam, all weights": Recipe("adam", 150, 5e-5, batch_size=16),
}
SHOWN = 8  # demonstrations in context


@dataclass
class Row:
    """One line of the table. Memory is above that of inference on the same batch, in bytes."""

    method: str
    accuracy: float
    extra_memory: int = 0
    seconds: float = 0.0
    forward_passes: int = 0
    points: list[Point] | None = None
    losses: list[float] | None = None
    log: str | None = None


def load() -> tuple[Any, Form, dict[str, list[Example]]]:
    """A fresh copy of the encoder, its form on the opinions, and their splits."""
    model, tokenizer = models.load(ModelArguments("minilm"))
    task = tasks.get("opinions")
    splits = {split: tasks.load_examples(task, split) for split in ("train", "dev", "test")}
    return model, form_for(model, tokenizer, task), splits


def baselines(seed: int) -> list[Row]:
    """Zero-shot, and the forward-only use of a few examples."""
    model, form, splits = load()
    shown = tasks.sample(splits["train"], SHOWN, seed)
    rows = [Row("zero-shot", evaluate(model, form, splits["test"]).accuracy)]
    found = evaluate(model, form, splits["test"], demonstrations=shown)
    return [*rows, Row(f"in context, {SHOWN} examples", found.accuracy)]


def run(
    name: str,
    recipe: Recipe,
    seed: int,
    *,
    log: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Row:
    """Tune a fresh model by a recipe and test it."""
    model, form, splits = load()
    extra = extra_memory(model, form, splits["train"], recipe)
    model, form, splits = load()  # the measurement moved the weights
    tuned = tune(
        model,
        form,
        splits["train"],
        recipe,
        seed=seed,
        held_out=splits["test"],  # nothing is chosen by it
        evaluations=6,
        log=log,
        on_step=on_step,
    )
    last = tuned.points[-1]
    return Row(
        name,
        last.accuracy,
        max(0, extra),
        tuned.seconds,
        last.forward_passes,
        tuned.points,
        tuned.losses,
        None if log is None else str(log),
    )


def main(output_dir: str, seed: int = 0, as_json: bool = False) -> None:
    """Run everything, print the table (stdout), write result.json, curves.png and the run logs."""
    out = Path(output_dir)
    make_folder(output_dir)
    talk = Console(stderr=True)
    talk.print(
        "A sentence encoder (all-MiniLM-L6-v2, 22.7 M parameters) learns to tell\n"
        "positive from negative opinions: 800 to train on, 340 to test. Only Adam\n"
        "runs backward passes.",
        highlight=False,
    )
    rows = baselines(seed)
    for name, recipe in RECIPES.items():
        slug = name.lower().replace(",", "").replace(" ", "-")
        log = out / f"{slug}.mezo" if recipe.method == "mezo" else None
        with _bar(talk, name, recipe.steps) as on_step:
            rows.append(run(name, recipe, seed, log=log, on_step=on_step))
    result = {"seed": seed, "rows": [asdict(row) for row in rows], "environment": environment()}
    result["recipes"] = {name: asdict(recipe) for name, recipe in RECIPES.items()}
    (out / "result.json").write_text(json.dumps(result, indent=1))
    curves = {row.method: row.points for row in rows if row.points}
    memory = {row.method: row.extra_memory for row in rows if row.points}
    learning_curves(out / "curves.png", curves, memory)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        Console(width=100).print(_table(rows))
    _farewell(talk, rows, out)


class _bar:
    """A progress bar with loss, steps a second and time left: a context that gives `on_step`."""

    def __init__(self, console: Console, name: str, steps: int):
        self.progress = Progress(
            TextColumn("{task.description:24}"),
            BarColumn(30),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(name, total=steps, loss=float("nan"), speed="")
        self.loss = 0.0

    def __enter__(self) -> Callable[[int, float], None]:
        self.progress.start()
        return self.step

    def __exit__(self, *exception) -> None:
        self.progress.stop()

    def step(self, step: int, loss: float) -> None:
        self.loss = loss if step == 1 else 0.95 * self.loss + 0.05 * loss
        pace = self.progress.tasks[0].speed
        speed = f"{pace:.1f} steps/s" if pace else ""
        self.progress.update(self.task, completed=step, loss=self.loss, speed=speed)


def _table(rows: list[Row]) -> Table:
    table = Table("", "test accuracy", "memory above inference", "time", "forward passes")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        trained = row.points is not None
        table.add_row(
            row.method,
            f"{100 * row.accuracy:.1f} %",
            f"{row.extra_memory / 2**20:.0f} MiB" if trained else "-",
            f"{row.seconds:.0f} s" if trained else "-",
            str(row.forward_passes) if trained else "-",
        )
    return table


def _farewell(talk: Console, rows: list[Row], out: Path) -> None:
    best = max((r for r in rows if r.log), key=lambda r: r.accuracy)
    adam, zero = rows[-1], rows[0]
    share = (best.accuracy - zero.accuracy) / max(adam.accuracy - zero.accuracy, 1e-9)
    size = Path(str(best.log)).stat().st_size / 1024
    lines = [
        f"{best.method}: {100 * share:.0f} % of Adam's gain over zero-shot.",
        f"Learning curves: {out / 'curves.png'}",
        f"The whole run is {best.log}, {size:.0f} KB. It rebuilds the tuned model, to the bit:",
        f"  mezo replay --log {best.log} --output_dir {out / 'tuned'}",
    ]
    for line in lines:
        talk.print(line, highlight=False, soft_wrap=True)
