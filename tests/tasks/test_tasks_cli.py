"""The command `mezo tasks`, and the examples that a run draws of a task."""

import json

import numpy as np
import pytest
from folders import mezo

from mezo import tasks
from mezo.errors import InputError
from mezo.runs.data import load_splits
from mezo.runs.data_arguments import DataArguments


def test_the_table_has_a_line_for_every_task(capsys):
    code, out, err = mezo(capsys, "tasks")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["name", *tasks.TASKS]
    assert "next: mezo tasks" in err
    code, out, _ = mezo(capsys, "tasks", "--json")
    assert json.loads(out) == tasks.describe()


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_is_shown_with_its_prompt_and_what_is_right(capsys, name):
    code, out, err = mezo(capsys, "tasks", name)
    assert (code, err) == (0, "")
    found = json.loads(mezo(capsys, "tasks", name, "--json")[1])
    assert found["prompt"] in out
    if found["kind"] == "generation":
        assert f"{found['prompt']}| {found['answers'][0]}\n" in out
    else:
        assert f"\n*|{found['candidates'][found['label']]}" in out
    for key in ("mask_prompt", "text"):
        assert found.get(key, "") in out
    assert tasks.get(name).source in out


def test_a_mistake_is_one_line(capsys):
    code, out, err = mezo(capsys, "tasks", "reccord")
    assert (code, out) == (2, "")
    assert err == "mezo: unknown task 'reccord'; did you mean record?\n"
    assert mezo(capsys, "tasks", "--foo")[0] == 2


@pytest.fixture
def sst2(tmp_path):
    """GLUE's folder with 60 training and 1,005 dev sentences."""
    for name, number in (("train", 60), ("dev", 1005)):
        rows = "".join(f"{name} {i}\t{i % 2}\n" for i in range(number))
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + rows)
    return str(tmp_path)


def numbers(examples):
    return [int(example.fields["sentence"].split()[1]) for example in examples]


def test_a_run_draws_training_and_dev_examples_as_the_reference(sst2):
    """Ends of one permutation; the test examples by the same seed."""
    args = DataArguments(data_dir=sst2, num_train=20, num_dev=10, num_test=30, split_seed=3)
    splits = load_splits(tasks.get("sst2"), args)
    order = np.random.RandomState(3).permutation(60)[:30].tolist()
    assert numbers(splits["train"]) == order[:20]
    assert numbers(splits["dev"]) == order[20:]
    assert numbers(splits["test"]) == np.random.RandomState(3).permutation(1005)[:30].tolist()


def test_few_shot_runs_of_all_seeds_are_tested_on_the_same_1000(sst2):
    first = load_splits(tasks.get("sst2"), DataArguments(data_dir=sst2, k=4, split_seed=13))
    other = load_splits(tasks.get("sst2"), DataArguments(data_dir=sst2, k=4, split_seed=21))
    assert first["train"] != other["train"]
    assert first["test"] == other["test"]
    assert numbers(first["test"]) == np.random.RandomState(42).permutation(1005)[:1000].tolist()


def test_a_dev_set_that_leaves_nothing_to_train_on_is_refused(sst2):
    with pytest.raises(InputError, match="num_dev must leave examples to train on: got 60 of 60"):
        load_splits(tasks.get("sst2"), DataArguments(data_dir=sst2, num_dev=60))


def test_a_folder_with_a_test_set_of_its_own_gives_its_dev_set(sst2, tmp_path):
    """As the few-shot folders; in GLUE's the dev set is for testing."""
    args = DataArguments(data_dir=sst2)
    splits = load_splits(tasks.get("sst2"), args)
    assert {example.origin.split()[0] for example in splits["dev"]} == {"train.tsv"}
    (tmp_path / "test.tsv").write_text("sentence\tlabel\ntest 0\t0\ntest 1\t1\n")
    splits = load_splits(tasks.get("sst2"), args)
    origins = {name: {e.origin.split()[0] for e in found} for name, found in splits.items()}
    assert origins == {name: {f"{name}.tsv"} for name in ("train", "dev", "test")}
    assert len(splits["dev"]) == 1005
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tunlabelled\n")
    splits = load_splits(tasks.get("sst2"), args)
    assert {example.origin.split()[0] for example in splits["test"]} == {"dev.tsv"}
