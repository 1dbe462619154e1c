"""Six classification tasks, k = 16 and 512, on the embedded models: all methods of `mezo compare`.

    python -m experiments.classification --data_dir DATA               # hours: docs/results.md
    python -m experiments.classification --data_dir DATA --quick       # does it run?

Cells lie in experiments/results/classification/MODEL/TASK-kK, each with config, result and run log;
what is done is not done again. The summary is experiments/results/classification-MODEL.json; the
table beside the paper's: python -m experiments.tables.

DATA has folders SST-2, SST-5, superglue and k-shot-1k-test. SNLI has no training set: its examples
are those of the few-shot folders. BoolQ has its dev set alone: 1,000 of it are the test set.
minilm, a sentence encoder, has a form for SST-2 and SST-5 alone; the others are refused by name.
"""

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

from mezo.compare import compare, recipes
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.runs.arguments import TrainArguments
from mezo.runs.data_arguments import DataArguments

RESULTS = Path(__file__).parent / "results"
TASKS = ("sst2", "sst5", "snli", "rte", "boolq", "multirc")
MODELS = ("causal-lm", "minilm")
FOLDERS = {"sst2": "SST-2", "sst5": "SST-5", "rte": "superglue/RTE", "multirc": "superglue/MultiRC"}
FOLDERS |= {"copa": "superglue/COPA", "wsc": "superglue/WSC"}
SNLI_LABELS = 3
KEPT = (
    "method",
    "seed",
    "name",
    "folder",
    "dev",
    "test",
    "steps",
    "kept_step",
    "chosen",
    "seconds",
)


def data_of(task: str, k: int, args: argparse.Namespace) -> DataArguments:
    folder, work = args.data_dir, args.output_dir
    limits = {"num_test": args.num_test, "num_dev": args.num_dev}
    shared = DataArguments(task=task, truncate=True, **limits)
    if task == "snli":
        own = str(folder / "k-shot-1k-test" / "SNLI" / f"{k}-{{seed}}")
        return replace(shared, data_dir=own, num_train=SNLI_LABELS * k)
    if task == "boolq":
        return replace(shared, data_dir=str(split_boolq(folder, work)), k=k)
    return replace(shared, data_dir=str(folder / FOLDERS[task]), k=k)


def split_boolq(folder: Path, work: Path) -> Path:
    """A folder with train.jsonl and test.jsonl, made of BoolQ's dev set by seed 0."""
    made = work / "boolq"
    made.mkdir(parents=True, exist_ok=True)
    rows = (folder / "superglue" / "BoolQ" / "val.jsonl").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    (made / "test.jsonl").write_text("".join(rows[:1000]))
    (made / "train.jsonl").write_text("".join(rows[1000:]))
    return made


def one(
    model: str, task: str, k: int, args: argparse.Namespace, settings: compare.Settings
) -> dict:
    """The summary of a task, without curves: they are in the cells' result.json."""
    place = args.output_dir / model / f"{task}-k{k}"
    data = data_of(task, k, args)
    if args.quick:
        data = replace(data, num_test=50, num_dev=32)
    train = TrainArguments(str(place), disable_tqdm=True, use_cpu=True)

    def told(at: int, number: int, cell: compare.Cell, what: str) -> None:
        print(f"{model} {task} k={k} [{at}/{number}] {what}: {cell.method} {cell.seed}", flush=True)

    found = compare.compare(ModelArguments(model), data, train, settings, on_cell=told)
    found["cells"] = [{name: cell[name] for name in KEPT} for cell in found["cells"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--k", nargs="+", type=int, default=(16, 512))
    parser.add_argument("--methods", nargs="+", default=recipes.DEFAULT)
    parser.add_argument("--seeds", nargs="+", type=int, default=(13, 21, 42))
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--num_test", type=int, default=1000)
    parser.add_argument("--num_dev", type=int, help="at most so many dev examples")
    parser.add_argument("--adam_steps", type=int, help="default: a tenth of MeZO's")
    parser.add_argument("--grid", default="none")
    parser.add_argument("--output_dir", type=Path, default=RESULTS / "classification")
    parser.add_argument("--quick", action="store_true", help="one seed, ten steps, 50 to test")
    args = parser.parse_args()
    shared = {"methods": tuple(args.methods), "grid": args.grid, "adam_steps": args.adam_steps}
    settings = compare.Settings(**shared, seeds=tuple(args.seeds), max_steps=args.max_steps)
    if args.quick:
        settings = replace(settings, seeds=settings.seeds[:1], max_steps=10)
    for model in args.models:
        name = f"classification-{model}" + ("-quick" if args.quick else "")
        path = (args.output_dir if args.quick else RESULTS) / f"{name}.json"
        for task in args.tasks:
            for k in args.k:
                began = time.perf_counter()
                try:
                    found = one(model, task, k, args, settings)
                except InputError as error:  # the model has no form for the task
                    found = {"refused": str(error)}
                    print(f"{model} {task} k={k} was refused: {error}", flush=True)
                summary = json.loads(path.read_text()) if path.exists() else {}  # others write too
                path.write_text(json.dumps(summary | {f"{task} k={k}": found}, indent=1))
                print(f"{model} {task} k={k}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
