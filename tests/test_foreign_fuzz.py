"""Every reader, whatever is in its file: the result, or one line."""

import gzip
import json
import os
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from folders import model_folder
from foreign_files import DEEP, LONG, REVIEWS, ROWS, Hang, in_time
from logs import run

from mezo import tasks, trajectory
from mezo.errors import InputError
from mezo.memory.plan import Planner, config_of
from mezo.models import loading
from mezo.models.arguments import ModelArguments
from mezo.models.safetensors_files import Checkpoint
from mezo.runs.data_arguments import TextArguments
from mezo.runs.text import load_rows
from mezo.tasks.loading import load_examples

QUICK = 300  # mutations in the suite

MORE = int(os.environ.get("FUZZ_MUTATIONS", "500"))  # of the slow test

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))  # of the slow test, however many that makes

SEED = int(os.environ.get("FUZZ_SEED", "1"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Good files of every kind, and room for a mutated one."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("good")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "rows.csv").write_text("text,label\n" + "a charming journey,1\n" * 4)
    (folder / "rows.tsv").write_text("text\tlabel\n" + "a charming journey\t1\n" * 4)
    disable_progress_bars()
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    pairs = [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "pairs.csv").write_text("prompt,completion\na, b\nc, d\n")
    Dataset.from_list(pairs).to_parquet(folder / "pairs.parquet")
    answer = {"text": "a charming", "answer_start": 0}
    qas = [{"id": "1", "question": "what?", "answers": [answer]}]
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "a charming film", "qas": qas}]}]}
    (folder / "train-v1.1.json").write_text(json.dumps(squad))
    (folder / "task.yaml").write_text(
        "task: films\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {train: rows.jsonl}}\ntraining_split: train\n"
        'output_type: multiple_choice\ndoc_to_text: "{{text}} It was"\n'
        "doc_to_choice: [terrible, great]\ndoc_to_target: label\n"
    )
    run(folder / "run.mezo", steps=3)
    model_folder(folder / "model")
    base, _ = loading.load(ModelArguments(str(folder / "model")))
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "model")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def examples(path):
    load_examples(tasks.get("squad") if "train-v1.1" in path.name else REVIEWS, "train", files=path)


def own_task(path):
    task = tasks.get(str(path))
    load_examples(task, "train")


def whole_checkpoint(path):
    checkpoint = Checkpoint(path.parent)
    for where in checkpoint.tensors:
        checkpoint.read(where)


def model(path):
    loading.load(ModelArguments(str(path.parent)))


def plan(path):
    config = config_of(str(path.parent))
    Planner(config, torch.float32, 1, 4).plan("scratch", 1)


def log(path):
    list(trajectory.read(path, recover=True).steps)


def text_rows(path):
    load_rows("sft", TextArguments(train_file=str(path)))


QUICK_READERS = {
    "rows.jsonl": [examples],
    "rows.json": [examples],
    "rows.jsonl.gz": [examples],
    "rows.csv": [examples],
    "rows.tsv": [examples],
    "rows.parquet": [examples],
    "train-v1.1.json": [examples],
    "task.yaml": [own_task],
    "run.mezo": [log],
    "model/model.safetensors": [whole_checkpoint],
}

SLOW_READERS = {
    "pairs.jsonl": [text_rows],
    "pairs.csv": [text_rows],
    "pairs.parquet": [text_rows],
    "model/config.json": [model, plan],
    "model/tokenizer.json": [model],
    "model/tokenizer_config.json": [model],
    "model/generation_config.json": [model],
    "model/model.safetensors": [model],
    "adapter/adapter_config.json": [model],
    "adapter/adapter_model.safetensors": [model],
}

PIECES = [b"\x00", b"\xff", b"null", b"-1", b"1e999", b"[]", b"{}", b'"', b"{", b"}", b"\\ud800"]


PIECES += [
    b"99999999999999999999",
    LONG.encode(),
    DEEP[:2000].encode(),
    b"true",
    b",",
    b"\n",
    b": ",
]
PIECES += [
    b"NaN",
    b": ",
    b"*a",
    b"&a ",
    b"!!python/name:os.system ",
    b'"a": 1, ',
    b"0",
    b"9",
    b"\t",
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some pieces replaced, inserted, removed, doubled or cut off."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        size = rng.choice([0, 1, 1, 2, 4, 16, 64])
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[at + size :]
        elif kind == 2:
            data = data[:at] + data[at : at + size] * 2 + data[at + size :]
        elif kind == 3:
            data = data[:at] + rng.randbytes(size) + data[at + size :]
        else:
            data = data[:at] + rng.choice(PIECES) + data[at + size :]
    return data


def survives(place, folder, name, read, data):
    """A reading of the file `name` with these contents ends well, or in an InputError."""
    good = place / name
    where = folder / "fuzzed"
    shutil.rmtree(where, ignore_errors=True)
    if good.parent == place:
        where.mkdir(parents=True)
        shutil.copy(place / "rows.jsonl", where)
    else:
        shutil.copytree(good.parent, where)
    path = where / good.name
    path.write_bytes(data)
    try:
        with in_time(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
    except InputError:
        pass
    except (Exception, Hang) as error:
        kept = Path(folder, f"failed-{name.replace('/', '-')}")
        kept.write_bytes(data)
        raise AssertionError(f"{name}: {type(error).__name__}: {error}; kept as {kept}") from error


def fuzz(place, folder, readers, rng):
    name = rng.choice(sorted(readers))
    read = rng.choice(readers[name])
    survives(place, folder, name, read, mutated((place / name).read_bytes(), rng))


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """Data sets of this test alone: datasets keeps what it reads."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.filterwarnings("ignore")
def test_the_good_files_are_read(place, tmp_path, own_cache):
    """Or the mutations would tell nothing."""
    for name, readers in (*QUICK_READERS.items(), *SLOW_READERS.items()):
        for read in readers:
            read(place / name)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_files_end_in_one_line(place, tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(QUICK // 3):
        fuzz(place, tmp_path, QUICK_READERS, rng)


@pytest.mark.filterwarnings("ignore")
def test_mutated_models_and_texts_end_in_one_line(place, tmp_path, own_cache):
    rng = random.Random(0)
    for _ in range(20):
        fuzz(place, tmp_path, SLOW_READERS, rng)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_files_end_in_one_line(place, tmp_path, own_cache):
    """FUZZ_MUTATIONS of them, or FUZZ_SECONDS, from FUZZ_SEED; else always the same ones."""
    rng, done, end = random.Random(SEED), 0, time.monotonic() + SECONDS
    while time.monotonic() < end if SECONDS else done < MORE:
        fuzz(place, tmp_path, QUICK_READERS if rng.random() < 0.5 else SLOW_READERS, rng)
        done += 1
    sys.stderr.write(f"{done} mutated files were read or refused in one line\n")
