"""mezo sft and mezo dpo: TRL's formats and trainers from the command line, rebuilt from the log."""

import json

import pytest
from datasets import Dataset
from folders import mezo, model_folder, same_weights
from models import tiny_model
from tiny_tokenizers import byte_bpe
from transformers import AutoTokenizer

from mezo import trajectory

trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # of datasets, after an error
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}{% else %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
)
PAIRS = [(" no wit , only", " labored gags"), ("a charming", " journey . It was great")] * 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    model_folder(folder / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tiny")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    write(folder / "pairs.jsonl", rows)
    Dataset.from_list(rows).to_csv(folder / "pairs.csv", index=False)
    Dataset.from_list(rows).to_parquet(folder / "pairs.parquet")
    write(folder / "text.jsonl", [{"text": prompt + completion} for prompt, completion in PAIRS])
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    chats = [[user | {"content": p}, assistant | {"content": c}] for p, c in PAIRS]
    write(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    turns = [{"prompt": chat[:1], "completion": chat[1:]} for chat in chats]
    write(folder / "turns.jsonl", turns)
    write(
        folder / "preferences.jsonl",
        [{"prompt": p, "chosen": c, "rejected": " dull boring"} for p, c in PAIRS],
    )
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(place, kind, file, out, *more):
    options = {"model": place / "tiny", "train_file": place / file, "output_dir": out}
    options |= {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    options |= {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    return [kind, *(f"--{name}={value}" for name, value in options.items()), *more]


RUNS = [
    ("sft", "pairs.jsonl", []),
    ("sft", "pairs.csv", ["--use_peft"]),
    ("sft", "pairs.parquet", ["--use_peft", "--peft_type=prefix"]),
    ("sft", "text.jsonl", ["--packing=true", "--max_length=32"]),
    ("sft", "chats.jsonl", ["--trainable=head"]),
    ("sft", "chats.jsonl", ["--assistant_only_loss=true", "--packing=true", "--max_length=32"]),
    ("sft", "turns.jsonl", ["--use_peft", "--peft_type=prompt"]),
    ("dpo", "preferences.jsonl", []),
    ("dpo", "preferences.jsonl", ["--use_peft"]),
    ("dpo", "preferences.jsonl", ["--use_peft", "--peft_type=prefix"]),
]


@pytest.mark.parametrize(
    ("kind", "file", "more"), RUNS, ids=[" ".join([a, b, *c]) for a, b, c in RUNS]
)
def test_a_run_is_rebuilt_from_its_log_without_trl(place, tmp_path, capsys, kind, file, more):
    """All formats and files, packed and not, whole and adapters: bitwise by `mezo replay`."""
    argv = command(place, kind, file, tmp_path / "a", *more, "--json")
    code, out, err = mezo(capsys, *argv)
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "a" / "result.json").read_text())
    assert (result["steps"], result["forward_passes"]) == (2, 4)
    assert result["stored_bytes"] == (tmp_path / "a" / "run.mezo").stat().st_size
    log = ["--log", tmp_path / "a" / "run.mezo", "--output_dir", tmp_path / "b"]
    code, _, err = mezo(capsys, "replay", "--model", place / "tiny", *log)
    assert code == 0, err
    assert same_weights(tmp_path / "a", tmp_path / "b")
    start = [*log[:-1], tmp_path / "c", "--until=0"]
    mezo(capsys, "replay", "--model", place / "tiny", *start)
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def test_a_file_is_its_rows_whatever_its_format(place, tmp_path, capsys):
    """And the loss is of the completion alone: the same rows as text give another."""
    losses = []
    for file in ("pairs.jsonl", "pairs.csv", "pairs.parquet", "text.jsonl"):
        assert mezo(capsys, *command(place, "sft", file, tmp_path / file))[0] == 0
        steps = trajectory.read(tmp_path / file / "run.mezo").steps
        losses.append([step.record.loss for step in steps])
    assert losses[0] == losses[1] == losses[2] != losses[3]


def test_of_messages_the_loss_may_be_the_answers_alone(place, tmp_path, capsys):
    """By the template's marks: then it is that of the same turns as prompt and completion."""
    losses = {}
    for name, file, more in [
        ("all", "chats.jsonl", []),
        ("answers", "chats.jsonl", ["--assistant_only_loss=true"]),
        ("turns", "turns.jsonl", []),
    ]:
        assert mezo(capsys, *command(place, "sft", file, tmp_path / name, *more))[0] == 0
        steps = trajectory.read(tmp_path / name / "run.mezo").steps
        losses[name] = [step.record.loss for step in steps]
    assert losses["answers"] == losses["turns"] != losses["all"]


def test_rows_to_evaluate_on_are_evaluated(place, tmp_path, capsys):
    more = [f"--dev_file={place / 'pairs.csv'}", "--eval_steps=2", "--json"]
    code, out, _ = mezo(capsys, *command(place, "sft", "pairs.jsonl", tmp_path, *more))
    assert code == 0
    result = json.loads(out)
    assert 0 < result["eval_loss"] < 10


def test_an_interrupted_run_goes_on(place, tmp_path, capsys):
    """From its log; a folder with a run in it is not overwritten."""
    prefix = ["--use_peft", "--peft_type=prefix", "--save_strategy=no"]
    whole = command(place, "sft", "pairs.jsonl", tmp_path / "whole", *prefix, "--max_steps=3")
    assert mezo(capsys, *whole)[0] == 0
    cut = command(place, "sft", "pairs.jsonl", tmp_path / "cut", *prefix)
    assert mezo(capsys, *cut)[0] == 0
    code, _, err = mezo(capsys, *cut)
    assert code == 2
    assert "--resume_from_checkpoint true goes on with that run" in err
    assert mezo(capsys, *cut, "--max_steps=3", "--resume_from_checkpoint=true")[0] == 0
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


REFUSED = [
    ("sft", '{"a": 1}', [], "sft wants the columns messages, or prompt and completion, or text"),
    ("sft", '{"prompt": "x", "completion": null}', [], "row 1 has no completion"),
    ("sft", '{"messages": []}', [], "row 1 has no messages"),
    ("sft", '{"prompt"', [], "own.jsonl row 1 is not JSON"),
    ("sft", "", [], "own.jsonl is empty"),
    ("dpo", '{"prompt": "x", "completion": "y"}', [], "dpo wants the columns chosen and rejected"),
    ("sft", '{"text": "x"}', ["--train_file=none.jsonl"], "file not found: none.jsonl"),
    ("sft", '{"text": "x"}', ["--train_file=a.txt"], "a.txt is not one of .jsonl, .json, .csv"),
    ("sft", '{"text": "x"}', ["--dataset_name=a/b"], "--train_file or --dataset_name, one of them"),
    ("sft", '{"text": "x"}', ["--paking=true"], "unknown option --paking; did you mean --packing?"),
    ("sft", '{"text": "x"}', ["--peft_type=prefix"], "peft_type prefix needs --use_peft"),
]


@pytest.mark.parametrize(("kind", "text", "more", "message"), REFUSED)
def test_a_mistake_is_one_line(place, tmp_path, capsys, kind, text, more, message, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.jsonl").write_text(text)
    argv = command(place, kind, tmp_path / "own.jsonl", tmp_path / "out", *more)
    code, out, err = mezo(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err
    lines = [line for line in err.splitlines() if line.startswith("mezo: ")]
    assert len(lines) == 1
    assert not (tmp_path / "out").exists()


def test_help_needs_no_trl(capsys):
    for kind, own in (("sft", "--packing"), ("dpo", "--beta")):
        code, out, _ = mezo(capsys, kind, "--help")
        assert code == 0
        assert {own, "--train_file", "--peft_type"} <= set(out.split())


def test_a_tokenizer_without_a_template_is_one_line(place, tmp_path, capsys):
    tiny_model("opt", 400).float().save_pretrained(tmp_path / "bare")
    byte_bpe().save_pretrained(tmp_path / "bare")
    argv = command(place, "sft", "chats.jsonl", tmp_path / "out", f"--model={tmp_path / 'bare'}")
    code, _, err = mezo(capsys, *argv)
    assert code == 2
    assert "chat_template is not set" in err


def test_rows_that_are_cut_off_whole_are_said(place, tmp_path, capsys):
    """TRL drops rows without a token to train on; of none it would make a sampler that fails."""
    rows = [
        {"prompt": f"a long preamble, number {i}, and more: ", "completion": " yes"}
        for i in range(8)
    ]
    write(tmp_path / "long.jsonl", rows)
    options = command(place, "sft", tmp_path / "long.jsonl", tmp_path / "out", "--max_length=8")
    code, _, err = mezo(capsys, *options)
    assert code == 2
    assert "max_length 8 cuts off all that would be trained" in err.splitlines()[-1]
