"""Every reader meets files that anybody may have written: one line each, no traceback, no hang."""

import json
import os
from itertools import pairwise

import pytest
from folders import model_folder
from foreign_files import DEEP, LONG, REVIEWS, ROWS, in_time

from mezo import trajectory
from mezo.errors import InputError
from mezo.foreign import MAX_OPTIONS, check_file, foreign, parse_json, read_options
from mezo.memory.plan import config_of
from mezo.models import loading
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import TextArguments
from mezo.runs.text import load_rows
from mezo.tasks.loading import load_examples

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in pairwise("abcdefghi")
)


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


@pytest.mark.parametrize("text", ["null\n", 'nullpr{"prompt": "a"}\n', "3\n", '{"prompt": \n'])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_of_text_that_are_no_objects_end_in_a_line(text, suffix, tmp_path):
    """Arrow ends the process with a segmentation fault where the first row is null."""
    path = tmp_path / f"rows{suffix}"
    path.write_text(text)
    with pytest.raises(InputError, match=r"rows\.json"):
        load_rows("sft", TextArguments(train_file=str(path)))
