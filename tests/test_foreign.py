"""Every reader meets files that anybody may have written: one line each, no traceback, no hang."""

import gzip
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from folders import model_folder
from logs import run

from mezo import tasks, trajectory
from mezo.errors import InputError
from mezo.foreign import MAX_OPTIONS, check_file, foreign, parse_json, read_options
from mezo.memory.plan import Planner, config_of
from mezo.models import loading
from mezo.models.arguments import ModelArguments
from mezo.models.safetensors_files import Checkpoint
from mezo.runs.data_arguments import TextArguments
from mezo.runs.text import load_rows
from mezo.tasks.loading import load_examples
from mezo.tasks.task import custom_task

LIMIT = 120  # seconds of a reading: the first imports much, and the machine may be busy
QUICK = 300  # mutations in the suite
MORE = int(os.environ.get("FUZZ_MUTATIONS", "500"))  # of the slow test
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))  # of the slow test, however many that makes
SEED = int(os.environ.get("FUZZ_SEED", "1"))
DEEP = "[" * 100_000
LONG = "1" * 5_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in pairwise("abcdefghi")
)
ROWS = [{"text": "a charming journey", "label": str(i % 2)} for i in range(4)]
REVIEWS = custom_task("{text} It was", [" terrible", " great"])


class Hang(BaseException):
    """No reader takes this for an error of its own."""


@contextmanager
def in_time(told=""):
    """Ends a reading that hangs."""

    def late(*args):
        raise Hang(f"no end within {LIMIT} s: {told}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- one case of each kind -----------------------------------------------------------------------


@pytest.mark.parametrize("text", [DEEP, LONG, '{"a": ', '"\\ud800"', b"\xff", "[" + LONG + "]"])
def test_json_that_is_no_json_is_one_line(text):
    """Three classes of error, of which json documents one; half a surrogate pair is no error."""
    with pytest.raises(InputError, match=r"^here is not JSON: .+$"):
        parse_json(text, "here")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 1,048,576 values"),
        ("a: &a [*a]", "that contains it"),
        ("a: " + DEEP, "nested too deeply"),
        ("a: " + LONG, "not YAML"),
        ("a: 2020-13-45", "not YAML"),
        ("- a", "expected options"),
        ('a: "\\ud800"', "not YAML"),
        ("a: " + "x" * MAX_OPTIONS, "is longer than"),
        ("a: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_yaml_that_grows_nests_or_is_none_is_one_line(tmp_path, text, words):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with in_time(), pytest.raises(InputError, match=words) as caught:
        read_options(path, str(path), "options")
    assert "\n" not in str(caught.value)


def test_an_alias_that_stays_small_is_read(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("a: &a [1, 2]\nb: *a\n")
    assert read_options(path, "it", "options") == {"a": [1, 2], "b": [1, 2]}


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    found = {"pipe.jsonl": "a pipe", "folder.jsonl": "a folder"}
    for name, kind in found.items():
        path = tmp_path / name
        readers = [
            lambda path=path: load_examples(REVIEWS, "train", files=path),
            lambda path=path: read_options(path, "it", "options"),
            lambda path=path: trajectory.read(path),
            lambda path=path: load_rows("sft", TextArguments(train_file=str(path))),
        ]
        for read in readers:
            with in_time(name), pytest.raises(InputError, match=f"{name} is {kind}, not a file"):
                read()
    with pytest.raises(InputError, match="/dev/zero is a device, not a file"):
        check_file("/dev/zero")
    folder = model_folder(tmp_path / "model")
    os.mkfifo(folder / "chat_template.json")
    with in_time(), pytest.raises(InputError, match="is a pipe"):
        loading.load(ModelArguments(str(folder)))


def test_a_parsers_panic_is_one_line_and_a_ctrl_c_is_none():
    """Rust's panics are no Exception in Python; neither is KeyboardInterrupt."""

    class PanicException(BaseException):
        pass

    def raising(error):
        with foreign("file.json"):
            raise error

    with pytest.raises(InputError, match=r"^file.json: its parser failed: at line 3$"):
        raising(PanicException("at line 3"))
    with pytest.raises(KeyboardInterrupt):
        raising(KeyboardInterrupt())


def test_a_json_array_is_read_as_rows(tmp_path):
    """As the data sets' own .json files are, and as `mezo sft` reads them."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    one, other = (load_examples(REVIEWS, "train", files=tmp_path / f"rows.{end}") for end in
                  ("json", "jsonl"))  # fmt: skip
    assert [example.fields for example in one] == [example.fields for example in other]


@pytest.mark.parametrize("cell", ["1", "NA", "null", "1e5", "true"])
def test_a_cell_of_a_csv_file_is_text(tmp_path, cell):
    """A completion that is a number, or the code of Namibia, is trained as it is written."""
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,completion\nCode: ,{cell}\nCode: ,{cell}\n")
    rows, _ = load_rows("sft", TextArguments(train_file=str(path)))
    assert rows["completion"][:] == [cell, cell]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.csv", 'messages\n"[{""role"": ""user""}]"\n', "not a list of messages; a CSV file"),
        ("n.jsonl", '{"prompt": "a", "completion": 1}\n', "column completion, is 1, not text"),
        ("e.csv", "prompt,completion\na,\n", "row 1 has no completion"),
        ("z.csv", "prompt,completion,\x00x\na,b,c\n", "cannot be read as csv"),
        ("m.jsonl", '{"messages": [{"content": "a"}]}\n', "not a list of messages"),
    ],
)  # fmt: skip
def test_rows_that_no_trainer_takes_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        load_rows("sft", TextArguments(train_file=str(tmp_path / name)))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    """Loading would draw it at random, and training would go on with it without a word."""
    from safetensors.torch import load_file, save_file

    folder = model_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("fc1.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for offload in (False, True):
        with pytest.raises(InputError, match=r"the checkpoint lacks .*fc1\.weight, and random"):
            loading.load(ModelArguments(str(folder)), offload=offload)


def test_memory_of_an_encoder_decoder_is_refused_in_a_line(tmp_path):
    from transformers import T5Config

    T5Config(d_model=8, num_layers=1, num_heads=1, d_kv=8, d_ff=8).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is an encoder-decoder, which no method here trains"):
        config_of(str(tmp_path))


def test_a_config_of_billions_of_layers_is_refused(tmp_path):
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with in_time(), pytest.raises(InputError, match="its config has num_hidden_layers 1000000000"):
        loading.load(ModelArguments(str(folder)))


# --- every reader, whatever is in the file -------------------------------------------------------


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


@pytest.mark.parametrize("name", ["[" * 5_000, "a/" * 4_000 + "a", "nul\0"])
def test_a_name_that_no_file_can_have_is_one_line(name, tmp_path):
    """The system refuses to look for it, where Python's own question is whether it is there."""
    config = {"peft_type": "LORA", "base_model_name_or_path": name}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for read in (
        lambda: loading.load(ModelArguments(model_name_or_path=name)),
        lambda: loading.load(ModelArguments(model_name_or_path=str(tmp_path))),
        lambda: load_examples(REVIEWS, "train", data_dir=name),
        lambda: load_rows("sft", TextArguments(train_file=f"{name}.jsonl")),
    ):
        with pytest.raises(InputError, match="no file can have this name"):
            read()


def test_text_that_is_not_utf_8_is_one_line(tmp_path):
    """arrow reads such bytes into a string, which nothing can read again."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "\xaf"}\n')
    with pytest.raises(InputError, match=r"pairs.jsonl is not UTF-8: .* 0xaf"):
        load_rows("sft", TextArguments(train_file=str(path)))
