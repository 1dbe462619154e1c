"""The command line: stdout is data, stderr is talk, a mistake is one line and exit code 2."""

import io
import json
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import fields

import pytest
from folders import OWN, mezo, model_folder, reviews, same_weights, training

from mezo import objectives, trajectory
from mezo.cli import main as cli
from mezo.cli.parsing import default_output_dir
from mezo.cli.train import SEARCH, TRAIN_HELP
from mezo.models.arguments import ModelArguments
from mezo.objectives import progress
from mezo.runs.data_arguments import DataArguments
from mezo.trajectory.format import encode


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a space in its name, a model, and files good and bad."""
    folder = tmp_path_factory.mktemp("my files")
    model_folder(folder / "tiny")
    reviews(folder / "reviews.jsonl")
    (folder / "empty.jsonl").write_text("")
    (folder / "label.jsonl").write_text('{"text": "a", "label": 7}\n')
    (folder / "list.yaml").write_text("- a\n")
    (folder / "broken.yaml").write_text("a: [\n")
    (folder / "typo.yaml").write_text("max_step: 3\n")
    (folder / "word.yaml").write_text("max_steps: three\n")
    (folder / "pickled").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "pickled" / name).write_bytes((folder / "tiny" / name).read_bytes())
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """A finished run, through the command line: its folder, its stdout and its stderr."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["train", *training(place, place / "tiny", load_best_model_at_end=False), "--json"]
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(argv)
    assert code == 0, err.getvalue()
    return place / "a run", out.getvalue(), err.getvalue()


def test_help_imports_nothing_heavy():
    """A second of imports for a help text is a second too much."""
    code = """
import sys
from mezo.cli.main import main
assert main(["--help"]) == main(["--version"]) == 0
for command in ("train", "eval", "replay", "sft", "dpo"):
    assert main([command, "--help"]) == 0
for command in ("log", "demo"):
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
print(sorted({"torch", "transformers", "numpy", "yaml", "datasets"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.endswith("\n[]\n")
    for kind in (ModelArguments, DataArguments):
        assert all(f"--{f.name}" in done.stdout for f in fields(kind))


def test_the_training_options_of_the_help_exist():
    """They are written by hand, as a list of all would be long and slow."""
    from mezo.compatibility import checkpointing_option
    from mezo.runs.arguments import TrainArguments

    known = {f"--{f.name}" for f in fields(TrainArguments)} | {"--json", "--help_all"}
    known |= {f"--{name}" for name in SEARCH}
    if checkpointing_option(TrainArguments) == "gradient_checkpointing":  # its older name
        known |= {"--activation_checkpointing"}
    asked_for = "perturbation rule estimator rounding bf16 num_samples distribution"
    assert {f"--{name}" for name in asked_for.split()} <= set(TRAIN_HELP.split())
    shown = {word.strip("(") for word in TRAIN_HELP.split() if word.strip("(").startswith("--")}
    assert shown <= known
    defaults = TrainArguments("x", use_cpu=True)
    assert (defaults.max_steps, defaults.per_device_train_batch_size) == (20000, 16)


def test_no_command_is_a_mistake_with_the_usage(capsys):
    code, out, err = mezo(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("usage: mezo COMMAND")


FILE = ["--model=tiny", "--test_file=reviews.jsonl"]
MISTAKES = [
    (["trian"], "unknown command 'trian'; did you mean train?"),
    (["eval", "--modle", "x"], "unknown option --modle; did you mean --model?"),
    (["eval", "--replai=x"], "did you mean --replay?"),
    (["train", "--max_step", "3"], "did you mean --max_steps?"),
    (["eval", "--zzz", "x"], "mezo eval --help lists them"),
    (["eval", "tiny"], "unexpected argument 'tiny'"),
    (["eval", "--task", "sst3"], "unknown task 'sst3'; did you mean sst2 or sst5?"),
    (["eval", "--task", "custom"], "a custom task needs --prompt"),
    (["eval", "--task=sst2", *OWN], "--prompt and --candidates are for --task custom, not sst2"),
    (["eval", "--candidates", " a", " b"], "a custom task needs --prompt"),
    (["eval", "--prompt", "{text}"], "needs candidates"),
    (["eval", "--dtype", "float31"], "invalid choice: 'float31'"),
    (["eval", "--k", "sixteen"], "invalid int value: 'sixteen'"),
    (["eval", "--model"], "expected one argument"),
    (["eval", "--until", "3"], "until is for the run log that --replay names"),
    (["eval", "--demonstrations=-1"], "demonstrations must not be negative, got -1"),
    (["eval", "--model=./none", *FILE[1:], *OWN], "model ./none: no such folder"),
    (["eval", "--model=a/b/c", *FILE[1:], *OWN], "model a/b/c: "),
    (["eval", "--model=pickled", *FILE[1:], *OWN], "convert its weights to safetensors"),
    (["eval", *FILE, *OWN, "--test_file=none.jsonl"], "file not found: none.jsonl"),
    (["eval", *FILE, *OWN, "--test_file=empty.jsonl"], "empty.jsonl is empty"),
    (["eval", *FILE, *OWN, "--test_file=label.jsonl"], "label '7' is not one of 0, 1"),
    (["eval", *FILE, *OWN, "--prompt={txt}"], "no column 'txt', it has text, label"),
    (["eval", *FILE, *OWN, "--prompt={text"], "template '{text'"),
    (["eval", *FILE, *OWN, "--candidates", " a"], "two or more distinct labels"),
    (["eval", *FILE, *OWN, "--max_length=3"], "tokens, the limit is 3"),
    (["eval", *FILE, *OWN, "--max_length=999"], "max_length must be from 2 to 64, got 999"),
    (["eval", *FILE, *OWN, "--batch_size=0"], "batch_size must be at least 1, got 0"),
    (["eval", *FILE, *OWN, "--replay=none"], "none: No such file"),
    (["eval", *FILE, *OWN, "--replay=reviews.jsonl"], "is not a MeZO run log"),
    (["eval", *FILE, *OWN, "--use_peft", "--lora_r=0"], "LoRA: "),
    (["eval", "--config", "none.yaml"], "none.yaml: No such file"),
    (["eval", "--config=list.yaml"], "list.yaml: expected lines 'option: value'"),
    (["eval", "--config=broken.yaml"], "broken.yaml is not YAML"),
    (["eval", "--config"], "expected one argument"),
    (["train", "--config=typo.yaml"], "unknown option --max_step; did you mean --max_steps?"),
    (["train", "--config=word.yaml"], "invalid int value: 'three'"),
    (["train", "--lr_scheduler_type=foo"], "foo is not a valid SchedulerType"),
    (["replay", "--log=x"], "required: --output_dir"),
    (["log"], "required: file"),
    (["log", "none"], "none: No such file"),
    (["log", "reviews.jsonl"], "reviews.jsonl is not a MeZO run log"),
    (["demo", "--seed=x"], "invalid int value: 'x'"),
]


@pytest.mark.parametrize(
    ("argv", "message"), MISTAKES, ids=[" ".join(argv)[:50] for argv, _ in MISTAKES]
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, message, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    code, out, err = mezo(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("mezo: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"perturbation": "scrath"},
            "perturbation must be in_place, scratch or low_rank, got 'scrath'",
        ),
        ({"rounding": "up"}, "rounding must be stochastic, compensated, master or nearest"),
        ({"clip_quantile": 2}, "clip_quantile must be between 0 and 1, got 2.0"),
        ({"mezo_eps": 0}, "eps must be positive, got 0.0"),
        ({"distribution": "normal"}, "got 'normal'"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect on a task"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha cannot be combined with MeZO"),
        ({"max_steps": -3}, "max_steps must be at least 1, or -1 for num_train_epochs, got -3"),
        ({"seed": -1}, "Seed must be between 0"),
        ({"report_to": "tensorbord"}, "tensorbord is not supported"),
        ({"k": 16}, "k 16 is too many: 24 training examples leave no dev set"),
        ({"trainable": "zzz"}, "trainable 'zzz' matches no parameter"),
        ({"trainable": "("}, "trainable '(' is not a regular expression"),
        ({"freeze_layers": 2}, "model.decoder.layers has 2 layers, 2 cannot be frozen"),
        ({"output_dir": "reviews.jsonl"}, "output_dir reviews.jsonl: File exists"),
        ({"resume_from_checkpoint": "none"}, "none is no folder with a trainer_state.json"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_a_mistake_in_training_is_one_line_too(changes, message, place, capsys, monkeypatch):
    """One found before the first step; behind the warnings that led to it, at most."""
    monkeypatch.chdir(place)
    changes = {"output_dir": "unborn"} | changes
    code, out, err = mezo(capsys, "train", *training(place, "tiny", **changes))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("mezo: ")
    assert err.count("mezo: ") == 1
    assert "Traceback" not in err
    assert message in err


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(trajectory, "read", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["log", "x"])


def test_flags_win_over_the_config_file(place, capsys, monkeypatch):
    """And values keep their leading spaces, lists and truth values."""
    monkeypatch.chdir(place)
    (place / "c.yaml").write_text(
        'model: tiny\ntest_file: none.jsonl\nprompt: "{text} It was"\ntruncate: true\n'
        'candidates: [" terrible", " great"]\nlabels: []\nk: null\njson: true\n'
    )
    code, out, _ = mezo(capsys, "eval", "--test_file=reviews.jsonl", "--config", "c.yaml")
    assert code == 0
    _, flags, _ = mezo(capsys, "eval", *FILE, *OWN, "--json")
    assert json.loads(out) == json.loads(flags)


def test_output_dir_is_named_after_the_task(place):
    assert default_output_dir(["--task", "sst2"]) == ["--output_dir=runs/sst2"]
    assert default_output_dir([]) == ["--output_dir=runs/opinions"]
    assert default_output_dir(OWN) == ["--output_dir=runs/custom"]


def test_json_is_all_that_stdout_gets(trained):
    """The Trainer prints its logs to stdout, which is ours."""
    _, out, err = trained
    result = json.loads(out)
    assert (result["steps"], result["test"]["n"]) == (4, 24)
    assert "train_runtime" in err
    assert err.splitlines()[-1].startswith("next: mezo replay --model ")
    assert "Warning" not in err


def test_replay_gives_the_trained_weights(trained, place, capsys, monkeypatch):
    """Bitwise, by the command that the last line of training suggests; it says how far it is."""
    monkeypatch.setattr(progress, "FIRST", 0.0)  # instead of after ten seconds
    monkeypatch.setattr(progress, "EVERY", 0.0)
    folder, _, _ = trained
    made = place / "replayed"
    argv = ["--model", place / "tiny", "--log", folder / "run.mezo", "--output_dir", made]
    code, out, err = mezo(capsys, "replay", *argv, "--json")
    assert (code, json.loads(out)["steps"]) == (0, 4)
    *lines, last = [line for line in err.splitlines() if line.startswith(("tensor", "next"))]
    number = len(trajectory.read(folder / "run.mezo").header["tensors"])
    assert [line.split(",")[0] for line in lines] == [
        f"tensor {done}/{number}" for done in range(1, number + 1)
    ]
    assert last.startswith("next: mezo eval --model ")
    assert same_weights(made, folder)
    assert not same_weights(place / "tiny", folder)
    code, _, _ = mezo(capsys, "replay", *argv, "--until=0")
    assert code == 0
    assert same_weights(made, place / "tiny")


def test_a_replay_that_is_not_the_run_says_so_and_what_to_do(trained, place, capsys):
    """A callback wrote to the weights, say: the log's digests at the end are others."""
    folder, _, _ = trained
    segments = trajectory.read(folder / "run.mezo").segments
    digests = segments[-1].header["digests"]
    segments[-1].header["digests"] = ("1" if digests[0] == "0" else "0") + digests[1:]
    (place / "forged.mezo").write_bytes(encode(segments))
    argv = ["--model", place / "tiny", "--log", place / "forged.mezo", "--output_dir"]
    code, out, err = mezo(capsys, "replay", *argv, place / "refused")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "something besides the optimizer wrote to " in err
    assert "between steps 2 and 4 of the run" in err  # of which 2 has a checkpoint
    code, _, _ = mezo(capsys, "replay", *argv, place / "log's", "--no_verify")
    assert code == 0
    assert same_weights(place / "log's", folder)


def test_eval_after_replay_is_eval_of_the_saved_model(trained, place, capsys):
    folder, out, _ = trained
    rest = ["--test_file", place / "reviews.jsonl", *OWN, "--json"]
    log = ["--replay", folder / "run.mezo"]
    _, replayed, _ = mezo(capsys, "eval", "--model", place / "tiny", *log, *rest)
    _, saved, _ = mezo(capsys, "eval", "--model", folder, *rest)
    _, base, _ = mezo(capsys, "eval", "--model", place / "tiny", *log, "--until=0", *rest)
    loss = json.loads(replayed)["loss"]
    assert loss == json.loads(saved)["loss"] == json.loads(out)["test"]["loss"]
    assert json.loads(base)["loss"] == json.loads(out)["zero_shot"]["loss"] != loss


def test_log_says_what_the_run_was(trained, capsys):
    folder, _, _ = trained
    code, out, err = mezo(capsys, "log", folder / "run.mezo", "--steps")
    rows = dict(line.split("\t", 1) for line in out.splitlines())
    assert (code, err, rows["steps"], rows["refused"]) == (0, "", "4", "0")
    assert (rows["config.learning_rate"], rows["config.max_steps"]) == ("0.001", "4")
    assert out.splitlines()[-5] == "step\tloss\tprojected_grads"
    _, out, _ = mezo(capsys, "log", folder / "run.mezo", "--steps", "--json")
    found = json.loads(out)
    assert [record["step"] for record in found["records"]] == [0, 1, 2, 3]
    assert found["config"]["seed"] == found["seed"] == 5


def test_log_of_a_torn_or_damaged_file(trained, tmp_path, capsys):
    """A killed run's last record is left out; damage is refused, with the way to what is whole."""
    folder, _, _ = trained
    end = trajectory.read(folder / "run.mezo").ends[-1]  # digests come after the last record
    data = (folder / "run.mezo").read_bytes()[:end]
    (tmp_path / "torn").write_bytes(data[:-3])
    _, out, _ = mezo(capsys, "log", tmp_path / "torn", "--json")
    assert (json.loads(out)["steps"], json.loads(out)["torn_bytes"]) == (3, 13)
    (tmp_path / "bad").write_bytes(data[:-20] + b"\0" + data[-19:])
    code, _, err = mezo(capsys, "log", tmp_path / "bad")
    assert (code, err.count("\n")) == (2, 1)
    assert "damaged record (step 2)" in err
    _, out, _ = mezo(capsys, "log", tmp_path / "bad", "--recover", "--json")
    assert json.loads(out)["steps"] == 2
    (tmp_path / "stub").write_bytes(data[:40])
    code, _, err = mezo(capsys, "log", tmp_path / "stub")
    assert code == 2
    assert "the header is cut off" in err


def test_a_run_is_not_overwritten(trained, place, capsys):
    """The same command twice would replace hours of work by a new start."""
    folder, _, _ = trained
    before = (folder / "run.mezo").read_bytes()
    code, _, err = mezo(capsys, "train", *training(place, place / "tiny"))
    assert code == 2
    assert "run.mezo exists: --resume_from_checkpoint true goes on with that run" in err
    assert (folder / "run.mezo").read_bytes() == before


def test_an_interrupted_run_goes_on_to_the_same_weights(
    trained, place, tmp_path, capsys, monkeypatch
):
    """Ctrl-C within a forward pass of step 3; the last checkpoint is that of step 2.

    The first step looks at the loss twice more.
    """
    folder, _, _ = trained
    argv = training(
        place, place / "tiny", load_best_model_at_end=False, output_dir=tmp_path / "cut"
    )
    loss, calls = objectives.Causal.loss, []

    def interrupted(self, model, batch):
        calls.append(1)
        if len(calls) == 2 + 6:
            signal.raise_signal(signal.SIGINT)
        return loss(self, model, batch)

    monkeypatch.setattr(objectives.Causal, "loss", interrupted)
    code, out, err = mezo(capsys, "train", *argv)
    assert (code, out) == (130, "")
    again = "--resume_from_checkpoint true\n"
    assert again in err
    assert err.endswith("mezo: interrupted\n")
    monkeypatch.undo()
    assert (tmp_path / "cut" / "checkpoint-2").is_dir()
    code, _, err = mezo(capsys, "train", *argv, "--resume_from_checkpoint", "true")
    assert code == 0
    assert "starting anew" not in err
    assert same_weights(tmp_path / "cut", folder)
    records = [
        [step.record for step in trajectory.read(path / "run.mezo").steps]
        for path in (tmp_path / "cut", folder)
    ]
    assert records[0] == records[1]


def test_a_closed_pipe_is_no_error(trained):
    """mezo log --steps | head"""
    folder, _, _ = trained
    code = "import sys; from mezo.cli.main import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "log", str(folder / "run.mezo"), "--steps"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize("verb", sorted(set(cli.COMMANDS) - {"env"}))
def test_every_option_of_the_help_is_told_in_a_whole_sentence(verb, capsys):
    """Half of the help was telegrams, such as `default 500`, beside the sentences of the rest."""
    with suppress(SystemExit):  # argparse's own way to end
        cli.main([verb, "--help"])
    options: list[str] = []
    for line in capsys.readouterr().out.splitlines():
        if re.match(" {2,4}-", line):
            options.append(line)
        elif options and line.startswith(" " * 20):
            options[-1] += " " + line.strip()
    assert options
    for option in options:
        text = re.sub(r" +(\[.*\]|\(default: .*\))$", "", option)
        assert text.endswith(".") or "show this help message and exit" in text, option
