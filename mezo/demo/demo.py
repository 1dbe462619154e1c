"""`mezo demo`: a small language model learns to tell opinions apart, with forward passes alone.

It runs offline, on an embedded model and an embedded data set. It compares zero-shot answers (plain
and calibrated), in-context learning, MeZO on a subset of the weights and on all of them, and Adam.
It writes a table, a plot and the log of each MeZO run.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from mezo import tasks
from mezo.compare.plots import learning_curves
from mezo.demo.tune import Recipe, extra_memory, tune
from mezo.errors import InputError
from mezo.evaluation.curve import Point
from mezo.evaluation.evaluate import evaluate
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives import Form, form_for
from mezo.objectives.progress import SILENT, Progress
from mezo.runs.result import environment, make_folder
from mezo.tasks import Example


@dataclass(frozen=True)
class Setting:
    """The settings of the demo for one of the embedded models."""

    introduction: str  # shown before anything runs
    recipes: dict[str, Recipe]  # by the name of the method; the last one is Adam's
    demonstrations: int  # examples shown in context
    calibrates: bool  # whether calibrated scores get a row


# Rates and steps come from a few trials on the dev split (docs/log.md); nothing is chosen by the
# test split. MeZO's rates are far below Adam's, and depend on which weights are trained.
SETTINGS = {
    "causal-lm": Setting(
        introduction="A language model of 19.1 M parameters learns to complete an opinion with\n"
        "the right word: 800 opinions to train on, 340 to test. Only Adam runs\n"
        "backward passes.",
        recipes={
            "MeZO, biases and norms": Recipe(
                "mezo", 300, 1e-3, batch_size=16, options={"eps": 1e-2}, trainable=r"bias|norm"
            ),
            "MeZO, all weights": Recipe(
                "mezo", 300, 1e-4, batch_size=16, options={"distribution": "rademacher"}
            ),
            "Adam, all weights": Recipe("adam", 60, 5e-5, batch_size=16),
        },
        demonstrations=4,
        calibrates=True,
    ),
    "minilm": Setting(
        introduction="A sentence encoder (all-MiniLM-L6-v2, 22.7 M parameters) learns to tell\n"
        "positive from negative opinions: 800 to train on, 340 to test. Only Adam\n"
        "runs backward passes.",
        recipes={
            "MeZO, biases and norms": Recipe(
                "mezo", 450, 5e-3, options={"eps": 1e-2}, trainable=r"bias|LayerNorm"
            ),
            "MeZO, all weights": Recipe(
                "mezo", 250, 1.4e-4, options={"distribution": "rademacher"}
            ),
            "Adam, all weights": Recipe("adam", 150, 5e-5, batch_size=16),
        },
        demonstrations=8,
        calibrates=False,
    ),
}


@dataclass
class Row:
    """One row of the table. Memory is in bytes above that of inference on the same batch."""

    method: str
    accuracy: float
    extra_memory: int = 0
    seconds: float = 0.0
    forward_passes: int = 0
    points: list[Point] | None = None
    losses: list[float] | None = None
    log: str | None = None


def load(name: str) -> tuple[Any, Form, dict[str, list[Example]]]:
    """Return a fresh copy of an embedded model, its form on the opinions, and their splits."""
    model, tokenizer = models.load(ModelArguments(name))
    task = tasks.get("opinions")
    splits = {split: tasks.load_examples(task, split) for split in ("train", "dev", "test")}
    return model, form_for(model, tokenizer, task), splits


def baselines(name: str, seed: int, split: str = "test", progress: Progress = SILENT) -> list[Row]:
    """Return the accuracy without training: zero-shot, calibrated, and in context."""
    setting = SETTINGS[name]
    model, form, splits = load(name)
    measured = partial(evaluate, model, examples=splits[split], progress=progress)
    rows = [Row("zero-shot", measured(form).accuracy)]
    if setting.calibrates:
        calibrated = measured(form.calibrate(model))
        rows.append(Row("zero-shot, calibrated", calibrated.accuracy))
    shown = tasks.sample(splits["train"], setting.demonstrations, seed)
    in_context = measured(form, demonstrations=shown)
    return [*rows, Row(f"in context, {len(shown)} examples", in_context.accuracy)]


def run(
    model_name: str,
    method: str,
    seed: int,
    *,
    split: str = "test",
    log: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Row:
    """Tune a fresh model by a method's recipe, and evaluate it on a split along the way."""
    recipe = SETTINGS[model_name].recipes[method]
    model, form, splits = load(model_name)
    extra = extra_memory(model, form, splits["train"], recipe)
    model, form, splits = load(model_name)  # the measurement moved the weights
    tuned = tune(
        model,
        form,
        splits["train"],
        recipe,
        seed=seed,
        held_out=splits[split],  # nothing is chosen by it
        evaluations=6,
        log=log,
        on_step=on_step,
    )
    last = tuned.points[-1]
    return Row(
        method,
        last.accuracy,
        max(0, extra),
        tuned.seconds,
        last.forward_passes,
        tuned.points,
        tuned.losses,
        None if log is None else str(log),
    )


def main(output_dir: str, seed: int = 0, as_json: bool = False, model: str = "causal-lm") -> None:
    """Run everything, print the table (stdout), write result.json, curves.png and the run logs.

    `model` is one of `SETTINGS`; raise InputError for any other.
    """
    if model not in SETTINGS:
        raise InputError(f"the demo has the models {', '.join(SETTINGS)}, not {model}")
    setting = SETTINGS[model]
    out = Path(output_dir)
    make_folder(output_dir)
    talk = Console(stderr=True)
    talk.print(setting.introduction, highlight=False)
    progress = Progress(partial(talk.print, highlight=False, soft_wrap=True))
    rows = baselines(model, seed, progress=progress)
    for name, recipe in setting.recipes.items():
        slug = name.lower().replace(",", "").replace(" ", "-")
        log = out / f"{slug}.mezo" if recipe.method == "mezo" else None
        shown: AbstractContextManager = _bar(talk, name, recipe.steps)
        if not talk.is_terminal:  # a log, a notebook: lines
            shown = _lines(progress, name, recipe.steps)
        with shown as on_step:
            rows.append(run(model, name, seed, log=log, on_step=on_step))
    result = {
        "seed": seed,
        "model": model,
        "rows": [asdict(row) for row in rows],
        "environment": environment(),
    }
    result["recipes"] = {name: asdict(recipe) for name, recipe in setting.recipes.items()}
    (out / "result.json").write_text(json.dumps(result, indent=1))
    curves = {row.method: row.points for row in rows if row.points}
    memory = {row.method: row.extra_memory for row in rows if row.points}
    learning_curves(out / "curves.png", curves, memory)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        Console(width=100).print(_table(rows))
    _farewell(talk, model, rows, out)


@contextmanager
def _lines(progress: Progress, name: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Give `on_step`, as _bar does; a line every so often, and one at the end."""
    loop = progress.of(f"{name}: step", steps)
    yield loop.at
    loop.end()


class _bar(AbstractContextManager):
    """A progress bar with loss, steps a second and time left: a context that gives `on_step`."""

    def __init__(self, console: Console, name: str, steps: int):
        self.progress = Bars(
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


def _farewell(talk: Console, model: str, rows: list[Row], out: Path) -> None:
    best = max((r for r in rows if r.log), key=lambda r: r.accuracy)
    adam, zero = rows[-1], rows[0]
    share = (best.accuracy - zero.accuracy) / max(adam.accuracy - zero.accuracy, 1e-9)
    size = Path(str(best.log)).stat().st_size / 1024
    lines = [
        f"{best.method}: {100 * share:.0f} % of Adam's gain over zero-shot.",
        f"Learning curves: {out / 'curves.png'}",
        f"The whole run is {best.log}, {size:.0f} KB; it rebuilds the tuned model, to the bit:",
        f"  mezo replay --model {model} --log {best.log} --output_dir {out / 'tuned'}",
    ]
    for line in lines:
        talk.print(line, highlight=False, soft_wrap=True)
