"""Does someone who gives no learning rate get what a search over rates would find? Three models.

    python -m experiments.newcomer --data_dir DATA --minutes 10   # again, until it is done

The run without a rate takes the default of `mezo train`, which measures one on the model. The other
runs differ in the rate alone: RATES, and the next one outside while the best of a seed lies at an
end. Of the tuned runs the dev examples choose the rate, by seed; the test examples compare it with
the default. A cell that is finished is not run again, and the order of SEEDS makes a usable table
of whatever is finished: `python -m experiments.tables` prints it. DATA has a folder SST-2.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mezo.models.arguments import ModelArguments
from mezo.runs.arguments import TrainArguments
from mezo.runs.data_arguments import DataArguments
from mezo.runs.result import environment
from mezo.runs.task import train

RESULTS = Path(__file__).parent / "results" / "newcomer.json"
SEEDS = (13, 21, 42)
RATES = (3e-5, 1e-4, 3e-4)
OUTSIDE = (1e-6, 3e-6, 1e-5, *RATES, 1e-3, 3e-3, 1e-2)
STEPS = 200


@dataclass(frozen=True)
class Setting:
    """A model, and a task that it can learn; the third model is the tests' stand-in of 3.0 M."""

    model: str
    task: str
    num_dev: int = 400


SETTINGS = {
    "minilm": Setting("minilm", "opinions"),
    "stand-in": Setting("tests/standin", "sst2"),
    "causal-lm": Setting("causal-lm", "sst2"),
}


def one(setting: Setting, seed: int, rate: float | None, args: argparse.Namespace) -> dict:
    """The cell of a rate; None is the run of someone who gives none."""
    own = {} if setting.task == "opinions" else {"data_dir": str(args.data_dir / "SST-2")}
    own |= {} if setting.task == "opinions" else {"k": 512, "num_test": 872}
    data = DataArguments(
        setting.task, num_dev=setting.num_dev, split_seed=seed, truncate=True, **own
    )
    folder = args.work_dir / Path(setting.model).name / f"seed-{seed}" / str(rate)
    options = TrainArguments(
        str(folder),
        learning_rate=rate,
        max_steps=STEPS,
        seed=seed,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    found = train(ModelArguments(setting.model), data, options)
    kept = {name: found[name] for name in ("dev", "train_loss", "seconds")}
    kept |= {"zero_shot": found["zero_shot"], "test": found["test"]}
    return kept | {"learning_rate": found["config"]["learning_rate"]}


def left(cells: dict[str, dict], models: list[str]) -> Iterator[tuple[str, int, float | None]]:
    """What is still to run, asked anew after each cell, since the ends of a grid can move."""
    for seed in SEEDS:
        for name in models:
            for rate in (None, *RATES):
                if key_of(name, seed, rate) not in cells:
                    yield name, seed, rate
            if (rate := beyond(cells, name, seed)) is not None:
                yield name, seed, rate


def beyond(cells: dict[str, dict], name: str, seed: int) -> float | None:
    """The rate outside the tried ones on the side on which the best lies, or None within."""
    tried = {r: cells[k] for r in OUTSIDE if (k := key_of(name, seed, r)) in cells}
    if not tried:
        return None
    best = max(tried, key=lambda rate: tried[rate]["dev"])
    beside = {min(tried): -1, max(tried): 1}
    place = OUTSIDE.index(best) + beside.get(best, 0)
    return OUTSIDE[place] if best in beside and 0 <= place < len(OUTSIDE) else None


def key_of(name: str, seed: int, rate: float | None) -> str:
    return f"{name} seed={seed} rate={'default' if rate is None else rate}"


def finished() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"steps": STEPS, "cells": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/newcomer"))
    parser.add_argument("--models", nargs="+", default=[*SETTINGS], choices=SETTINGS)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes
    while (cell := next(left(finished()["cells"], args.models), None)) is not None:
        if time.monotonic() > ends:
            break
        name, seed, rate = cell
        found = one(SETTINGS[name], seed, rate, args)
        done = finished()  # another process may have added to it
        done["cells"][key_of(*cell)], done["environment"] = found, environment()
        RESULTS.write_text(json.dumps(done, indent=1))
        print(f"{key_of(*cell)}: {found['learning_rate']:g} {found['test']}", flush=True)


if __name__ == "__main__":
    main()
