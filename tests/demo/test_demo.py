"""The demo, with its recipes cut to a few steps."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from mezo import tasks, trajectory
from mezo.demo import demo


@pytest.fixture
def short(monkeypatch):
    """Two steps a recipe, 32 examples to train on, 6 to choose by and to test."""
    recipes = {name: replace(recipe, steps=2) for name, recipe in demo.RECIPES.items()}
    monkeypatch.setattr(demo, "RECIPES", recipes)
    load = demo.load

    def load_little():
        model, form, splits = load()
        few = {"train": 32, "dev": 6, "test": 6}
        return model, form, {split: splits[split][:number] for split, number in few.items()}

    monkeypatch.setattr(demo, "load", load_little)


def test_the_demo_ends_with_a_table_a_plot_and_logs_that_replay(short, tmp_path, capsys):
    demo.main(str(tmp_path), seed=1)
    shown = capsys.readouterr()
    for name in ("zero-shot", "in context, 8 examples", *demo.RECIPES):
        assert name in shown.out
    assert "mezo replay --log" in shown.err.splitlines()[-1]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["method"] for row in result["rows"][2:]] == list(demo.RECIPES)
    for row in result["rows"]:
        if row["log"]:
            assert len(trajectory.read(row["log"]).steps) == 2
            model, _, _ = demo.load()
            before = {name: p.clone() for name, p in model.named_parameters()}
            trajectory.replay(row["log"], model)  # checks the fingerprint of what it starts from
            moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
            assert all("bias" in n or "LayerNorm" in n for n in moved) == (
                "biases" in row["method"]
            )


def test_json_on_stdout_is_json_alone(short, tmp_path, capsys, monkeypatch):
    """Of one recipe; the others print in the same way."""
    monkeypatch.setattr(demo, "RECIPES", dict([*demo.RECIPES.items()][:1]))
    demo.main(str(tmp_path), as_json=True)
    assert {"rows", "recipes", "environment"} <= set(json.loads(capsys.readouterr().out))


def test_the_opinions_are_balanced_distinct_and_in_plain_ascii():
    task, texts = tasks.get("opinions"), []
    for split, number in (("train", 800), ("dev", 100), ("test", 340)):
        examples = tasks.load_examples(task, split)
        assert len(examples) == number
        assert Counter(example.label for example in examples) == {0: number // 2, 1: number // 2}
        texts += [example.fields["text"].lower() for example in examples]
    assert len(set(texts)) == len(texts)
    assert all(text.isascii() for text in texts)
