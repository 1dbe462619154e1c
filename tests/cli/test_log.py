"""`mezo log`: show, verify, compact, merge."""

import json
import shutil
import subprocess
import sys

import pytest
from folders import mezo, model_folder
from logs import eventful, make_parts, run
from safetensors.torch import load_file, save_file

from mezo import MeZO, trajectory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Logs: a plain one, an eventful one, those of parts of a run; torn and damaged ones."""
    path = tmp_path_factory.mktemp("my logs")
    run(path / "plain.mezo", steps=5)
    eventful(path / "eventful.mezo")
    make_parts(path)
    records_end = trajectory.read(path / "plain.mezo").ends[-1]  # the digests come after them
    data = (path / "plain.mezo").read_bytes()[:records_end]
    (path / "torn.mezo").write_bytes(data[:-3])
    (path / "bad.mezo").write_bytes(data[:-20] + b"\0" + data[-19:])
    (path / "none.txt").write_text("no log")
    return path


def rows(out):
    return dict(line.split("\t", 1) for line in out.splitlines())


@pytest.mark.parametrize("words", [["log"], ["log", "show"]])
def test_show_says_what_the_run_was(folder, capsys, words):
    code, out, err = mezo(capsys, *words, folder / "eventful.mezo")
    found = rows(out)
    assert (code, err) == (0, "")
    assert (found["steps"], found["refused"], found["tensors"]) == ("43", "1", "3")
    assert (found["perturbation"], found["rounding"]) == ("in_place", "stochastic")
    assert (found["config.task"], found["parameters"]) == ("toy", "128")
    log = trajectory.read(folder / "eventful.mezo")
    assert found["first_loss"] == f"{log.steps[0].record.loss:.4g}"
    assert found["last_loss"] == "0.5"


def test_show_says_where_the_settings_change(folder, capsys):
    """Two groups; a moving learning rate as its first and last value; no empty segments."""
    _, out, _ = mezo(capsys, "log", folder / "eventful.mezo")
    table = out[out.index("from\t") :].splitlines()
    assert table[0] == "from\tto\teps\tlr\tweight_decay\tcycles"
    assert table[1] == "0\t8\t0.001\t0.01,0.003\t0.1,0\t2 x 1"
    assert [row.split("\t")[0] for row in table[1:]] == ["0", "9", "10", "14", "23", "42"]
    assert table[2].endswith("\t2,1")
    assert table[4].split("\t")[2] == "0.002"
    assert " to " in table[5]
    _, out, _ = mezo(capsys, "log", folder / "eventful.mezo", "--json")
    found = json.loads(out)["segments"]
    assert sum(segment["steps"] for segment in found) == 43
    assert found[1] | {"start": 0} == found[0] | {"cycles": [2, 1], "steps": 1}


def test_steps_are_json_that_any_program_reads(folder, capsys):
    """A refused step's numbers are null, not NaN."""
    _, out, _ = mezo(capsys, "log", folder / "eventful.mezo", "--steps", "--json")
    found = json.loads(out, parse_constant=lambda word: pytest.fail(word))
    assert [record["step"] for record in found["records"]] == list(range(43))
    assert found["records"][5]["projected_grads"] == [None, None]
    _, out, _ = mezo(capsys, "log", folder / "eventful.mezo", "--steps")
    assert out.splitlines()[-44] == "step\tloss\tprojected_grads"


def test_what_is_in_a_file_does_not_steer_the_terminal(folder, capsys):
    data = (folder / "plain.mezo").read_bytes()
    (length,) = (int.from_bytes(data[8:12], "little"),)
    header = json.loads(data[12 : 12 + length])
    header["config"] = {"a\x1b[31m": "b\x1b[2J\nc", "d": ["\x1b[2J"], "e": "\ud800"}
    log = trajectory.format.frame(header) + data[16 + length :]
    (folder / "coloured.mezo").write_bytes(log)
    code, out, _ = mezo(capsys, "log", folder / "coloured.mezo")
    assert code == 0
    assert "\x1b" not in out
    assert r"'b\x1b[2J\nc'" in out
    assert rows(out)["config.e"] == r"'\ud800'"


def test_verify_is_one_line(folder, capsys):
    path = folder / "plain.mezo"
    assert mezo(capsys, "log", "verify", path) == (0, f"{path}: 5 steps, whole\n", "")
    path = folder / "torn.mezo"
    line = f"{path}: 4 steps, whole but for 13 bytes of an unfinished one\n"
    assert mezo(capsys, "log", "verify", path) == (0, line, "")
    _, out, _ = mezo(capsys, "log", "verify", path, "--json")
    assert json.loads(out) == {"log": str(path), "steps": 4, "torn_bytes": 13}


def test_verify_names_the_place_of_a_damage(folder, capsys):
    code, out, err = mezo(capsys, "log", "verify", folder / "bad.mezo")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "a damaged record (step 3) at byte" in err
    assert err.endswith("the 3 steps before it are intact\n")


@pytest.fixture(scope="module")
def model_log(folder):
    """A run on a model in a folder."""
    from mezo.models import loading as models
    from mezo.models.arguments import ModelArguments

    model_folder(folder / "tiny")
    model, _ = models.load(ModelArguments(str(folder / "tiny")))
    optimizer = MeZO(model.named_parameters(), lr=1e-3, seed=1)
    with trajectory.record(optimizer, folder / "model.mezo", model=model):
        optimizer.step(lambda: 0.5)
    return folder / "model.mezo"


def test_verify_with_a_model_compares_the_weights(folder, model_log, capsys):
    """The first tensor that differs is named."""
    code, out, _ = mezo(capsys, "log", "verify", model_log, "--model", folder / "tiny")
    assert code == 0
    assert out == f"{model_log}: 1 steps, whole, from the weights of {folder / 'tiny'}\n"
    shutil.copytree(folder / "tiny", folder / "other")
    file = folder / "other" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("fc1.bias"))
    tensors[name][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    code, out, err = mezo(capsys, "log", "verify", model_log, "--model", folder / "other")
    assert (code, out) == (2, "")
    assert f"sha256 of {name} is" in err.splitlines()[-1]


def test_compact_and_merge_make_the_file_again(folder, tmp_path, capsys):
    path = folder / "eventful.mezo"
    code, out, err = mezo(capsys, "log", "compact", path, "-o", tmp_path / "small")
    assert (code, rows(out)["steps"]) == (0, "43")
    assert int(rows(out)["bytes"]) == (tmp_path / "small").stat().st_size
    assert err.startswith("next: mezo replay --model ... --log ")
    _, out, _ = mezo(capsys, "log", tmp_path / "small")
    assert rows(out)["compact"] == "True"
    code, out, _ = mezo(
        capsys, "log", "merge", tmp_path / "small", "-o", tmp_path / "again", "--json"
    )
    assert (code, json.loads(out)["steps"]) == (0, 43)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_show_says_that_losses_were_left_out(folder, tmp_path, capsys):
    argv = ["log", "compact", folder / "plain.mezo", "--output_file", tmp_path / "small"]
    assert mezo(capsys, *argv, "--without_losses")[0] == 0
    _, out, _ = mezo(capsys, "log", tmp_path / "small")
    assert rows(out)["losses"] == "left out"
    assert "first_loss" not in rows(out)


def test_merge_joins_the_parts_of_a_run(folder, tmp_path, capsys):
    parts = [folder / f"{name}.mezo" for name in ("4-9", "0-4")]
    code, out, _ = mezo(capsys, "log", "merge", *parts, "-o", tmp_path / "whole")
    assert (code, rows(out)["steps"]) == (0, "9")
    _, out, _ = mezo(capsys, "log", folder / "4-9.mezo")
    assert (rows(out)["start"], rows(out)["steps"]) == ("4", "5")


MISTAKES = [
    (["verify"], "required: file"),
    (["verify", "none"], "none: No such file"),
    (["verify", "none.txt"], "none.txt is not a MeZO run log"),
    (["verify", "plain.mezo", "--modle", "x"], "unknown option --modle; did you mean --model?"),
    (["compact", "plain.mezo"], "required: -o/--output_file"),
    (["compact", "bad.mezo", "-o", "x"], "a damaged record (step 3)"),
    (["compact", "plain.mezo", "-o", "torn.mezo"], "torn.mezo exists: a log is not overwritten"),
    (["compact", "plain.mezo", "-o", "a/b"], "a/b: No such file or directory"),
    (["merge", "-o", "x"], "required: file"),
    (["merge", "0-4.mezo", "6-9.mezo", "-o", "x"], "the steps between them are missing"),
    (["merge", "0-4.mezo", "plain.mezo", "eventful.mezo", "-o", "x"], "not logs of one run"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(folder, argv, message, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    code, out, err = mezo(capsys, "log", *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (folder / "x").exists()


def test_help_is_quick_and_names_the_commands():
    code = """
import sys
from mezo.cli.main import main
for words in ([], ["show"], ["verify"], ["compact"], ["merge"]):
    try:
        main(["log", *words, "--help"])
    except SystemExit as end:
        assert end.code == 0
print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.endswith("\n[]\n")
    for command in ("verify", "compact", "merge"):
        assert f"mezo log {command} FILE" in done.stdout
