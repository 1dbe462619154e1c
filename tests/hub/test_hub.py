"""Run logs on the hub: pushed with a card, pulled and checked, refused in one line.

The hub is a stand-in on this machine (hub_standin.py); its client is the real one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import mezo, model_folder
from huggingface_hub import ModelCard
from processes import SEARCHED
from transformers import AutoModelForCausalLM

from mezo import MeZO, trajectory
from mezo.errors import InputError
from mezo.hub import repository as hub
from mezo.hub.card import card

CONFIG = {"task": "sst2", "model_name_or_path": "facebook/opt-1.3b", "max_steps": 3}
CONFIG |= {"output_dir": "/home/me/secret", "candidates": [" terrible", " great"]}


def run(path, model, config=CONFIG, keep=lambda name: True):
    named = [(name, p) for name, p in model.named_parameters() if keep(name)]
    optimizer = MeZO(named, lr=1e-2, seed=6)
    with trajectory.record(optimizer, path, model=model, config=config):
        for step in range(3):
            optimizer.step(lambda step=step: float(named[0][1].square().sum()))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    model_folder(folder / "tiny")
    run(folder / "run.mezo", AutoModelForCausalLM.from_pretrained(folder / "tiny"))
    linear = torch.nn.Linear(3, 3)
    run(folder / "plain.mezo", linear, {"model_name_or_path": "me/my-folder"})
    (folder / "bad.mezo").write_bytes((folder / "run.mezo").read_bytes()[:-20] + b"\0" * 20)
    return folder


PUSH = ["push", "--log", "run.mezo", "--repo"]
LOAD = """
import mezo, torch
model = mezo.load("./tiny", "user/first")
torch.save(model.state_dict(), "loaded.pt")
mezo.load("./tiny", "hub:user/first", until=0)
"""
COMMANDS = {
    "push": [*PUSH, "user/first", "--private", "--json"],
    "push again": [*PUSH, "user/first", "--base_model", "user/other-base"],
    "plain": ["push", "--log", "plain.mezo", "--repo", "user/second"],
    "pull": ["pull", "user/first", "--json"],
    "to a file": ["pull", "user/first", "--output", "mine.mezo"],
    "load": ["python", LOAD],
    "is there": ["pull", "user/first", "--output", "mine.mezo"],
    "no folder": ["pull", "user/first", "--output", "none/mine.mezo"],
    "no repo": ["pull", "user/none"],
    "no log": ["pull", "user/empty"],
    "noise": ["pull", "user/noise"],
    "gated": ["pull", "user/gated"],
    "dead": ["pull", "user/dead"],
    "name": ["pull", "user/a/b"],
    "name of push": [*PUSH, "a b"],
    "rights": [*PUSH, "other/run"],
    "damaged": ["push", "--log", "bad.mezo", "--repo", "user/bad"],
    "missing": ["push", "--log", "none.mezo", "--repo", "user/bad"],
    "down": ["down"],
    "down, push": [*PUSH, "user/first"],
    "down, cached": ["pull", "user/first", "--output", "cached.mezo"],
}


@pytest.fixture(scope="module")
def done(place):
    """All commands, one after the other, in one process: {name: what came of it}, and the hub."""
    here = Path(__file__).parents[1]
    env = os.environ | {"HF_HOME": str(place / "hf"), "PYTHONPATH": SEARCHED}
    process = subprocess.run(
        [sys.executable, here / "hub_standin.py"],
        input=json.dumps(list(COMMANDS.values())),
        env=env,
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    names = [name for name in COMMANDS if name != "down"]
    return dict(zip(names, found["results"], strict=True)) | {"hub": found}


def page(done, repo):
    """The card that a repository got."""
    return bytes.fromhex(done["hub"]["repos"][repo]["README.md"]).decode()


def test_what_is_pushed_is_the_log_and_a_card(done, place):
    result = json.loads(done["push"]["out"])
    assert result["repo"] == "user/first"
    assert result["url"].endswith("/user/first")
    assert result["base_model"] == "facebook/opt-1.3b"
    assert done["push"]["err"] == "next: mezo pull user/first\n"
    made = {repo["name"]: repo for repo in done["hub"]["created"]}
    private = {"visibility": "private"}.items(), {"private": True}.items()  # the latter: hub 1.5
    assert any(words <= made["first"].items() for words in private)
    assert not any(words <= made["second"].items() for words in private)
    files = done["hub"]["repos"]["user/first"]
    assert files.keys() == {"run.mezo", "README.md"}
    assert bytes.fromhex(files["run.mezo"]) == (place / "run.mezo").read_bytes()


def test_pushing_again_updates_the_card(done):
    """The base model that is given goes before the log's."""
    assert done["push again"]["code"] == 0
    assert ModelCard(page(done, "user/first")).data.base_model == "user/other-base"


def test_a_base_model_that_the_hub_has_not_is_not_named(done):
    """It is a folder of the owner's that looks like a name."""
    assert "give it with --base_model NAME" in done["plain"]["err"]
    text = page(done, "user/second")
    assert ModelCard(text).data.base_model is None
    assert "my-folder" not in text
    assert "BASE_MODEL is the model with the fingerprints below" in text


def test_what_is_pulled_is_what_was_pushed(done, place):
    assert json.loads(done["pull"]["out"]) == {"log": "first.mezo"}
    assert done["pull"]["err"].startswith("next: mezo replay --model ... --log first.mezo ")
    for name in ("first.mezo", "mine.mezo", "cached.mezo"):
        assert (place / name).read_bytes() == (place / "run.mezo").read_bytes()


def test_one_line_pulls_and_gives_the_tuned_model(done, place):
    assert done["load"]["code"] == 0
    model = AutoModelForCausalLM.from_pretrained(place / "tiny")
    trajectory.replay(place / "run.mezo", model)
    expected, found = model.state_dict(), torch.load(place / "loaded.pt", weights_only=True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("is there", "mine.mezo exists"),
        ("no folder", "none/mine.mezo: No such file or directory"),
        ("no repo", "no repository user/none, or none that you may see: log in with"),
        ("no log", "the repository user/empty has no run.mezo"),
        ("noise", "run.mezo is not a MeZO run log"),
        ("gated", "the repository user/gated is gated: ask for access, and log in"),
        ("dead", "user/dead: no answer from http://127.0.0.1:"),
        ("name", "'user/a/b' is not the name of a repository, user/name"),
        ("name of push", "'a b' is not the name of a repository, user/name"),
        ("rights", "other/run: the hub answers 403: log in with: hf auth login"),
        ("damaged", "bad.mezo: "),
        ("missing", "none.mezo: No such file"),
        ("down, push", "user/first: no answer from http://127.0.0.1:"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(done, name, message):
    found = done[name]
    assert (found["code"], found["out"]) == (2, "")
    assert found["err"].startswith("mezo: ")
    assert found["err"].count("\n") == 1
    assert message in found["err"]
    assert "hf_secret" not in found["err"]


def test_nothing_of_a_refused_push_is_on_the_hub(done):
    assert "user/bad" not in done["hub"]["repos"]
    assert "other/run" not in done["hub"]["repos"]


def test_offline_is_said(capsys, place, monkeypatch):
    """HF_HUB_OFFLINE, which the tests set."""
    monkeypatch.chdir(place)
    code, _, err = mezo(capsys, *PUSH, "user/first")
    assert code == 2
    assert err == "mezo: user/first: HF_HUB_OFFLINE is set\n"
    code, _, err = mezo(capsys, "pull", "user/nowhere")
    assert (code, err.count("\n")) == (2, 1)
    assert "user/nowhere: no answer from" in err


def test_a_file_goes_before_a_repository(place, monkeypatch):
    """user/name may be a folder's file; a name that ends in .mezo is never a repository."""
    (place / "user").mkdir()
    (place / "user" / "run").write_bytes(b"")
    monkeypatch.chdir(place)
    assert hub.resolve("user/run") == Path("user/run")
    assert hub.resolve("runs/run.mezo") == Path("runs/run.mezo")
    assert hub.resolve(Path("/a/b")) == Path("/a/b")
    for name in ("user/none", "hub:user/none"):
        with pytest.raises(InputError, match="user/none: no answer from"):
            hub.resolve(name)


def test_the_card_says_what_the_log_says(place):
    """Nothing else, and no path of the owner's."""
    text, log = card(place / "run.mezo", "user/first", "a/b"), trajectory.read(place / "run.mezo")
    data = ModelCard(text).data.to_dict()
    assert data == {
        "base_model": "a/b",
        "library_name": "mezo-lm",
        "tags": ["mezo", "zeroth-order"],
        "datasets": ["nyu-mll/glue"],
    }
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    found = {row[0].strip("`"): row[1].strip("`") for row in rows}
    assert (found["steps"], found["seed"], found["directions a step"]) == ("3", "6", "1")
    assert found["training loss of the last step"] == f"{log.steps[2].record.loss:.4f}".rstrip("0")
    assert found["config: candidates"] == '[" terrible", " great"]'
    assert "secret" not in text
    for entry in log.header["tensors"]:
        assert f"| `{entry['name']}` | `float32` |" in text
        assert entry["sha256"] in text
    assert "mezo pull user/first --output run.mezo\n" in text
    assert "mezo replay --model a/b --log run.mezo --output_dir tuned\n" in text
    assert 'mezo.load("a/b", "user/first")' in text
    assert "arXiv:2305.17333" in text
    assert "@inproceedings{malladi2023mezo," in text


def test_a_card_of_data_of_one_s_own_names_no_data_set(tmp_path):
    for i, own in enumerate(({"train_file": "x"}, {"data_dir": "x"}, {"task": "?"}, {"task": []})):
        path = run(tmp_path / f"{i}.mezo", torch.nn.Linear(2, 2), CONFIG | own)
        assert "datasets" not in ModelCard(card(path, "a/b")).data.to_dict()


def test_a_config_cannot_write_the_card(tmp_path):
    """It may come from elsewhere: code, in one cell, whatever it holds."""
    bad = {"a|b": "x | y` <script>\n# Title", "`": "~" * 1000, "x\n---\nlicense: mit": 1, "n": None}
    text = card(run(tmp_path / "run.mezo", torch.nn.Linear(2, 2), bad), "a/b")
    assert r"| `config: a\|b` | `x \| y' <script> # Title` |" in text
    assert "~" * 201 not in text
    assert "\n# Title" not in text
    assert "\nlicense" not in text
    assert "license" not in ModelCard(text).data.to_dict()


def test_a_card_says_if_the_adapter_is_the_reader_s_to_make(tmp_path):
    model = torch.nn.ModuleDict({"base_model": torch.nn.Linear(2, 2)})
    path = run(tmp_path / "run.mezo", model, {})
    assert "does not say how its adapter was made" in card(path, "a/b")
    path = run(tmp_path / "lora.mezo", model, {"use_peft": True})
    assert "does not say how its adapter was made" not in card(path, "a/b")


def test_a_card_names_the_gguf_file_that_the_run_began_with(tmp_path):
    """Whoever reads the card needs that file; a base model on the hub goes before it."""
    model = torch.nn.Linear(2, 2)
    model.gguf_sha256 = "ab" * 32
    path = run(tmp_path / "run.mezo", model, {})
    assert f"BASE_MODEL is the GGUF file with the SHA-256 `{'ab' * 32}`" in card(path, "a/b")
    assert "BASE_MODEL" not in card(path, "a/b", "user/base")


def test_a_run_of_no_steps_has_a_card(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = MeZO(model.named_parameters(), seed=1)
    trajectory.record(optimizer, tmp_path / "run.mezo").close()
    assert "| `steps` | `0` |" in card(tmp_path / "run.mezo", "a/b")
