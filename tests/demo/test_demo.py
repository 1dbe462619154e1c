"""The demo, with its recipes cut to a few steps."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from mezo import tasks, trajectory
from mezo.demo import demo
from mezo.errors import InputError


@pytest.fixture
def short(monkeypatch):
    """Two steps of four examples a recipe, six examples to choose by and to test."""
    for name, setting in demo.SETTINGS.items():
        recipes = {
            method: replace(recipe, steps=2, batch_size=4)
            for method, recipe in setting.recipes.items()
        }
        short = replace(setting, recipes=recipes, demonstrations=2)
        monkeypatch.setitem(demo.SETTINGS, name, short)
    load = demo.load

    def load_little(name):
        model, form, splits = load(name)
        few = {"train": 16, "dev": 6, "test": 6}
        return model, form, {split: splits[split][:number] for split, number in few.items()}

    monkeypatch.setattr(demo, "load", load_little)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "minilm")) for name in demo.SETTINGS],
)
def test_the_demo_ends_with_a_table_a_plot_and_logs_that_replay(name, short, tmp_path, capsys):
    """What a newcomer sees first: every row is there, and the last line is a command that works."""
    demo.main(str(tmp_path), seed=1, model=name)
    shown = capsys.readouterr()
    setting = demo.SETTINGS[name]
    calibrated = ["zero-shot, calibrated"] if setting.calibrates else []
    methods = ["zero-shot", *calibrated, "in context, 2 examples", *setting.recipes]
    for method in methods:
        assert method in shown.out
    command = shown.err.splitlines()[-1].split()
    assert command[:4] == ["mezo", "replay", "--model", name]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["method"] for row in result["rows"]] == methods
    for row in result["rows"]:
        if row["log"]:
            assert len(trajectory.read(row["log"]).steps) == 2
            model, _, _ = demo.load(name)
            before = {name: p.clone() for name, p in model.named_parameters()}
            trajectory.replay(row["log"], model)  # checks the fingerprint of what it starts from
            moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
            trained = setting.recipes[row["method"]].trainable
            assert moved
            assert all(re.search(trained, n) for n in moved)


def test_json_on_stdout_is_json_alone(short, tmp_path, capsys, monkeypatch):
    """Shown with one recipe; the others print in the same way."""
    setting = demo.SETTINGS["causal-lm"]
    one = replace(setting, recipes=dict([*setting.recipes.items()][:1]))
    monkeypatch.setitem(demo.SETTINGS, "causal-lm", one)
    demo.main(str(tmp_path), as_json=True)
    assert {"rows", "recipes", "environment"} <= set(json.loads(capsys.readouterr().out))


def test_a_model_without_a_demo_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="causal-lm, minilm, not gpt2"):
        demo.main(str(tmp_path / "out"), model="gpt2")
    assert not (tmp_path / "out").exists()


def test_the_opinions_are_balanced_distinct_and_in_plain_ascii():
    task, texts = tasks.get("opinions"), []
    for split, number in (("train", 800), ("dev", 100), ("test", 340)):
        examples = tasks.load_examples(task, split)
        assert len(examples) == number
        assert Counter(example.label for example in examples) == {0: number // 2, 1: number // 2}
        texts += [example.fields["text"].lower() for example in examples]
    assert len(set(texts)) == len(texts)
    assert all(text.isascii() for text in texts)
