"""Of several processes the first one alone writes and prints, in every kind of run.

Run by torchrun, this file is the worker: it makes one run and says what its process has written.
"""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from folders import model_folder, reviews, training
from processes import LIMIT

from mezo.cli.main import main

TESTS = Path(__file__).parents[1]
SHORT = {"max_steps": 1, "save_strategy": "no", "load_best_model_at_end": False}
SHORT |= {"disable_tqdm": True, "ddp_backend": "gloo", "eval_strategy": "no"}


def commands(folder):
    """One short run of each kind."""
    shared = {"model": folder / "tiny", "output_dir": folder / "a run", "use_cpu": True} | SHORT
    shared |= {"per_device_train_batch_size": 2}
    sft = shared | {"train_file": folder / "rows.jsonl"}
    reward = shared | {"train_file": folder / "prompts.jsonl", "max_completion_length": 2}
    reward |= {"reward": f"{folder / 'rules.py'}:length", "num_dev": 2}
    several = SHORT | {"max_steps": 10, "num_train": 8, "num_test": 8}
    return {
        "compare": [
            *("compare", *without_rate(training(folder, folder / "tiny", **several))),
            *("--methods", "zero-shot", "mezo", "--seeds", "1", "--equal", "passes"),
        ],
        "grid": [
            *("train", *without_rate(training(folder, folder / "tiny", **SHORT))),
            f"--grid={folder / 'rates.yaml'}",
        ],
        "task": ["train", *training(folder, folder / "tiny", **SHORT)],
        "sft": ["sft", *(f"--{name}={value}" for name, value in sft.items())],
        "reward": ["train", *(f"--{name}={value}" for name, value in reward.items())],
    }


def without_rate(words):
    """The grid or the methods have rates of their own."""
    return [word for word in words if not word.startswith("--learning_rate=")]


def worker(folder, kind):
    rank, written = os.environ["RANK"], []

    def watch(event, details):
        if event == "open" and str(details[0]).startswith(str(folder / "a run")):
            reads = details[2] & (os.O_WRONLY | os.O_RDWR) == 0
            written.extend([] if reads else [Path(details[0]).name])

    sys.addaudithook(watch)
    with redirect_stdout(io.StringIO()) as printed:
        code = main(commands(folder)[kind])
    found = {"code": code, "printed": printed.getvalue(), "written": sorted(set(written))}
    (folder / f"{rank}.json").write_text(json.dumps(found))


SEEN = {  # by kind: what the first process prints, its files, the last line of its talk
    "task": ("steps\t1", {"run.mezo", "result.json"}, "next: mezo replay"),
    "sft": ("steps\t1", {"run.mezo", "result.json"}, "next: mezo replay"),
    "reward": ("steps\t1", {"run.mezo", "result.json"}, "next: mezo replay"),
    "grid": ("cells\t2", {"run.mezo", "result.json", "grid.json"}, "all cells: "),
    "compare": (
        "zero-shot",
        {"run.mezo", "result.json", "compare.json", "report.html", "log.txt"},
        "each cell's folder and commands: ",
    ),
}


@pytest.mark.slow  # 15 to 60 s: both processes import transformers
@pytest.mark.parametrize("kind", SEEN)
def test_the_first_process_alone_writes_and_prints(kind, tmp_path):
    """`mezo sft` under torchrun printed and wrote everything twice, rewards too."""
    if kind == "sft":
        pytest.importorskip("trl")
    model_folder(tmp_path / "tiny")
    reviews(tmp_path / "reviews.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a film :", "completion": " dull"}\n' * 8)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a film"}\n' * 12)
    (tmp_path / "rates.yaml").write_text("learning_rate: [1e-3, 1e-4]\n")
    (tmp_path / "rules.py").write_text(
        "def length(completions, **more):\n    return [float(len(x)) for x in completions]\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [*command, __file__, str(tmp_path), kind],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["code"], second["code"]) == (0, 0), done.stderr[-3000:]
    printed, written, last = SEEN[kind]
    assert printed in first["printed"]
    assert written <= set(first["written"])
    assert (second["printed"], second["written"]) == ("", [])
    assert done.stderr.count(last) == 1


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
