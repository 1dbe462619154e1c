"""Rows as the hub has them, and what is said where there are none."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import SEARCHED

from mezo import tasks
from mezo.errors import InputError
from mezo.tasks import load_examples

HUB = [  # task, row as on the hub, what is asked for, label, answers
    ("sst2", {"sentence": "fine ", "label": 1, "idx": 0}, ("nyu-mll/glue",), 1, ()),
    ("sst5", {"text": "fine", "label": 3, "label_text": "positive"}, ("SetFit/sst5",), 3, ()),
    (
        "trec",
        {"text": "Who ?", "label": 40, "label_coarse": 2, "label_coarse_original": "HUM"},
        ("SetFit/TREC-QC",),
        3,
        (),
    ),
    (
        "snli",
        {"premise": "A.", "hypothesis": "B.", "label": 2},
        ("stanfordnlp/snli",),
        2,
        (),
    ),
    ("mnli", {"premise": "A.", "hypothesis": "B.", "label": 1, "idx": 0}, ("nyu-mll/glue",), 1, ()),
    (
        "rte",
        {"premise": "A.", "hypothesis": "B.", "label": 1, "idx": 0},
        ("aps/super_glue",),
        1,
        (),
    ),
    ("cb", {"premise": "A.", "hypothesis": "B.", "label": 1, "idx": 0}, ("aps/super_glue",), 1, ()),
    ("boolq", {"question": "is it", "answer": False, "passage": "P."}, ("google/boolq",), 1, ()),
    (
        "wsc",
        {
            "text": "Mark saw Pete. He left.",
            "span1_index": 0,
            "span2_index": 3,
            "span1_text": "Mark",
            "span2_text": "He",
            "idx": 0,
            "label": 1,
        },
        ("aps/super_glue",),
        1,
        (),
    ),
    (
        "wic",
        {"word": "w", "sentence1": "A.", "sentence2": "B.", "start1": 1, "idx": 0, "label": 0},
        ("aps/super_glue",),
        0,
        (),
    ),
    (
        "multirc",
        {
            "paragraph": "P. ",
            "question": "Q?",
            "answer": "a",
            "idx": {"paragraph": 3, "question": 0, "answer": 1},
            "label": 1,
        },
        ("aps/super_glue",),
        1,
        (),
    ),
    (
        "copa",
        {"premise": "P.", "choice1": "A.", "choice2": "B.", "question": "cause", "label": 1},
        ("aps/super_glue",),
        1,
        (),
    ),
    (
        "record",
        {
            "passage": "Zoe met Ann.",
            "query": "@placeholder smiled",
            "entities": ["Ann", "Zoe"],
            "answers": ["Zoe"],
            "idx": {"passage": 0, "query": 0},
        },
        ("aps/super_glue",),
        1,
        ("Zoe",),
    ),
    (
        "squad",
        {
            "id": "a",
            "title": "T",
            "context": "C",
            "question": "Q?",
            "answers": {"text": ["x", "y"], "answer_start": [0, 1]},
        },
        ("rajpurkar/squad",),
        -1,
        ("x", "y"),
    ),
    (
        "drop",
        {
            "section_id": "s",
            "query_id": "q",
            "passage": "P.",
            "question": "Q?",
            "answers_spans": {"spans": ["1", "2"], "types": ["number", "span"]},
        },
        ("ucinlp/drop",),
        -1,
        ("1", "2"),
    ),
]


@pytest.mark.parametrize(("name", "row", "asked", "label", "answers"), HUB)
def test_rows_of_the_hub(monkeypatch, name, row, asked, label, answers):
    """The columns and the types that the data sets' cards give."""
    import datasets

    calls = []

    def load_dataset(*args, **options):
        calls.append((*args, options["revision"]))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = load_examples(tasks.get(name), "test")
    assert (example.label, example.answers) == (label, answers)
    assert calls[0][:1] == asked
    assert calls[0][1:] == (tasks.get(name).hub.config, tasks.get(name).hub.revision)


def test_every_task_of_the_hub_has_such_a_row():
    covered = {name for name, *_ in HUB} | {"mnli_mm"}
    assert {name for name, task in tasks.TASKS.items() if task.hub} == covered


# Folders of parquet files, one a configuration, or JSONL; their splits beside train.
FOLDERS = {"snli": "plain_text", "boolq": "data", "squad": "plain_text", "drop": "data"}
PARTS = {
    "mnli": ("validation_matched", "validation_mismatched", "test_matched"),
    "sst5": ("dev", "test"),
    "trec": ("test",),
    "boolq": ("validation",),
    "squad": ("validation",),
    "drop": ("validation",),
}
ROWS = {"train": 1, "validation": 2, "dev": 2, "validation_matched": 2, "test": 3}
ROWS |= {"validation_mismatched": 4, "test_matched": 5}


def published():
    """id -> path in its repository -> rows; a split is told by how many it has."""
    sets = {}
    for name, row, (repo,), *_ in HUB:
        folder = FOLDERS.get(name, tasks.get(name).hub.config)
        for split in ("train", *PARTS.get(name, ("validation", "test"))):
            path = f"{folder}/{split}.parquet" if folder else f"{split}.jsonl"
            sets.setdefault(repo, {})[path] = [row] * ROWS[split]
    return sets


def test_every_task_is_read_from_its_repository_at_the_commit_it_names(tmp_path):
    """By `datasets` itself, from files laid out as there, over HTTP; no other commit is served."""
    assert all(re.fullmatch("[0-9a-f]{40}", t.hub.revision) for t in tasks.TASKS.values() if t.hub)
    here = Path(__file__).parents[1]
    program = [sys.executable, str(here / "hub_datasets.py"), str(tmp_path)]
    given = {"input": json.dumps(published()), "env": os.environ | {"PYTHONPATH": SEARCHED}}
    done = subprocess.run(program, capture_output=True, text=True, **given)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tests = {"trec": {"test": 3}, "sst5": {"dev": 2, "test": 3}, "mnli_mm": {"dev": 4, "test": 4}}
    for name, *_, label, answers in [*HUB, ("mnli_mm", 1, ())]:
        counts = {"train": 1} | tests.get(name, {"dev": 2, "test": 2})
        assert {split: len(rows) for split, rows in found[name].items()} == counts
        for rows in found[name].values():
            assert all(row == [label, list(answers)] for row in rows)


def test_a_part_that_the_hub_lacks_is_one_line():
    with pytest.raises(InputError, match="SetFit/TREC-QC has no dev split: take a part of train"):
        load_examples(tasks.get("trec"), "dev")


def test_a_data_set_that_is_a_script_is_one_line(monkeypatch):
    """datasets 4 raises RuntimeError for these."""
    import datasets

    def refuse(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match="no longer supported"):
        load_examples(tasks.get("cb"), "train")
