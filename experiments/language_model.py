"""Does MeZO learn with the embedded language model? Eight tasks, seven methods, five seeds.

    python -m experiments.language_model --data_dir DATA --minutes 10   # again, until it is done
    python -m experiments.language_model --data_dir DATA --list         # what is left

The learning rates of experiments/language_model.yaml are tried on SST-2 with k = 512 and seed 13.
The dev examples choose one for each method, which all other cells take; they also choose the step
that is tested. The test examples are looked at once. Cells lie in
experiments/results/language-model/TASK-kK, each with config, result and run log; what is done is
not done again. JOBS are in order of worth, so that whatever is finished is a usable table:
`python -m experiments.tables` prints it. DATA is described in experiments/classification.py.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from experiments.classification import data_of
from mezo.compare import compare
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.runs.arguments import TrainArguments
from mezo.runs.data_arguments import DataArguments

RESULTS = Path("experiments/results/language-model")  # from the root of the repository
TRIED, RATES = Path("experiments/language_model.yaml"), RESULTS / "rates.yaml"
SEEDS = (13, 21, 42, 87, 100)  # the paper's
TRAINED = ("mezo", "mezo-biases_and_norms", "ft")
BASIC = ("zero-shot", "calibrated", "lp", "mezo", "ft")
LEFT = 3  # the exit code when the minutes are over


@dataclass(frozen=True)
class Job:
    """Cells of one task; one cell is a method and a seed."""

    task: str
    k: int
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    steps: int = 300
    adam_steps: int = 100
    evaluations: int = 5  # on dev examples, of which there are at most num_dev
    num_dev: int = 200

    @property
    def folder(self) -> Path:
        return RESULTS / f"{self.task}-k{self.k}"


PAIR = ("mezo", "ft")
REST = ("icl", "mezo-biases_and_norms")
SMALL = {"steps": 100, "adam_steps": 50, "evaluations": 2, "num_dev": 100}
BROAD = (
    Job("snli", 512, (13,), BASIC, **SMALL),
    Job("copa", 100, (13,), BASIC, **SMALL),
    Job("sst5", 512, (13,), BASIC, **SMALL),
    Job("rte", 512, (13,), BASIC, **SMALL | {"steps": 50, "adam_steps": 25}),
    Job("boolq", 512, (13,), BASIC, **SMALL | {"steps": 50, "adam_steps": 25}),
)
JOBS = (
    Job("sst2", 512, (13,), (*BASIC, *REST)),
    Job("sst2", 512, (21,), PAIR),
    Job("sst2", 16, (13,), PAIR, steps=150),
    *(replace(job, methods=PAIR) for job in BROAD[:2]),
    *(replace(job, methods=BASIC[:2]) for job in BROAD[:4]),
    Job("sst2", 512, (42,), PAIR),
    Job("sst2", 16, (21, 42), PAIR, steps=150),
    *BROAD,
    Job("sst2", 512, (87, 100), PAIR),
    Job("sst2", 16, (87, 100), PAIR, steps=150),
    Job("sst2", 512, SEEDS[1:], ("lp", *REST)),
    Job("sst2", 16, SEEDS, ("lp", *REST), steps=150),
    *(replace(job, seeds=(21, 42)) for job in BROAD),
    *(replace(job, seeds=(13, 21, 42), methods=REST) for job in BROAD),
    Job("wsc", 200, (13, 21, 42), BASIC, **SMALL),
    Job("multirc", 512, (13, 21, 42), BASIC, **SMALL | {"steps": 50, "adam_steps": 25}),
)


class TimeUp(Exception):
    """The minutes are over; what is left is for the next call."""


def data_for(job: Job, args: argparse.Namespace) -> DataArguments:
    """The job's data: at most 500 test examples, or all 872 of SST-2."""
    options = argparse.Namespace(data_dir=args.data_dir, output_dir=args.work_dir)
    options.num_dev, options.num_test = job.num_dev, 872 if job.task == "sst2" else 500
    return data_of(job.task, job.k, options)


def run(job: Job, seed: int, args: argparse.Namespace, ends: float) -> None:
    first = job.task == "sst2" and job.k == 512 and seed == SEEDS[0]
    grid = TRIED if first else rates_of(job)
    settings = compare.Settings(job.methods, (seed,), str(grid), job.steps, job.adam_steps)
    train = TrainArguments(
        str(job.folder), disable_tqdm=True, use_cpu=not torch.cuda.is_available()
    )
    each = 1 / job.evaluations
    train = replace(train, lr_scheduler_type="linear", eval_steps=each, save_steps=each)
    train = replace(train, logging_steps=0.2)

    def told(at: int, number: int, cell: compare.Cell, what: str) -> None:
        if what == "found":
            return
        if args.list or time.monotonic() > ends:
            raise TimeUp(f"{job.folder.name}/{cell.method}/seed-{seed}")
        clock = time.strftime("%H:%M:%S")
        print(f"{clock} {job.folder.name} {what}: {cell.method} {seed} {cell.name}", flush=True)

    given = {"lr_scheduler_type", "eval_steps", "save_steps", "logging_steps"}
    compare.compare(
        ModelArguments("causal-lm"), data_for(job, args), train, settings, given=given, on_cell=told
    )
    if first:
        choose()


def rates_of(job: Job) -> Path:
    """A file with the chosen rates of the job's methods."""
    chosen = yaml.safe_load(RATES.read_text())
    path = job.folder / "rates.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({m: chosen[m] for m in job.methods if m in chosen}))
    return path


def choose() -> None:
    """Write the rate of the best dev metric of each trained method."""
    chosen = {}
    for method in TRAINED:
        tried = RESULTS / "sst2-k512" / method / f"seed-{SEEDS[0]}"
        found = [json.loads(path.read_text()) for path in sorted(tried.glob("*/result.json"))]
        best = max(found, key=lambda result: result["dev"])
        chosen[method] = {"learning_rate": best["config"]["learning_rate"]}
    RATES.write_text(yaml.safe_dump(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/language-model"))
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--list", action="store_true", help="name the first cell that is left")
    args = parser.parse_args()
    ends = time.monotonic() + 60 * args.minutes
    for job in JOBS:
        for seed in job.seeds:
            try:
                run(job, seed, args, ends)
            except TimeUp as left:
                print(f"left: {left}")
                sys.exit(LEFT)
            except InputError as error:
                print(f"{job.folder.name} seed {seed} was refused: {error}", flush=True)


if __name__ == "__main__":
    main()
