"""Tasks of one's own in YAML, with the field names of lm-evaluation-harness."""

import json
from importlib.util import find_spec

import pytest
import yaml
from folders import mezo, model_folder, reviews

from mezo import tasks
from mezo.errors import InputError
from mezo.runs import lm_eval as harness
from mezo.runs.data import load_splits
from mezo.runs.data_arguments import DataArguments
from mezo.tasks import fill

CHOICE = {
    "task": "films",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "reviews.jsonl", "val": "reviews.jsonl"}},
    "training_split": "train",
    "validation_split": "val",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}} {It} was",
    "doc_to_choice": ["terrible", "great"],
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1},
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_choice": None,
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match"}],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
}


@pytest.fixture
def place(tmp_path):
    reviews(tmp_path / "reviews.jsonl")
    return tmp_path


def written(place, **changes):
    given = {name: value for name, value in (CHOICE | changes).items() if value is not None}
    path = place / "task.yaml"
    path.write_text(yaml.safe_dump(given))
    return str(path)


def rows(place, *given):
    (place / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))


def first(place, **changes):
    """The task, and the first of its training examples."""
    task = tasks.get(written(place, **changes))
    return task, tasks.load_examples(task, "train")[0]


def test_the_prompt_is_the_harness_s(place):
    """Text, target_delimiter, choice; braces and white space as they are."""
    rows(place, {"text": " a {b} ", "label": 1})
    task, example = first(place)
    assert fill(task.prompt, example.fields) == " a {b}  {It} was"
    assert task.candidates_of(example) == (" terrible", " great")
    assert (example.label, task.metric, task.kind) == (1, "accuracy", "classification")
    task, example = first(place, target_delimiter="", doc_to_text="text")
    assert fill(task.prompt, example.fields) == " a {b} "
    assert task.candidates_of(example) == ("terrible", "great")


def test_the_right_one_may_be_spelled_out(place):
    rows(place, {"text": "a", "label": "great"}, {"text": "b", "label": "terrible"})
    assert first(place)[1].label == 1


def test_choices_of_a_row(place):
    """A column that holds a list; the target is an index or one of them."""
    choices = {"doc_to_choice": "{{options}}", "doc_to_target": "{{right}}"}
    for right, label in ((2, 2), ("y", 1)):
        rows(place, {"text": "a", "options": ["x", "y", "z"], "right": right})
        task, example = first(place, **choices)
        assert task.candidates_of(example) == (" x", " y", " z")
        assert (example.label, example.is_right(label)) == (label, True)
    rows(place, {"text": "a", "options": ["x", "y"], "right": 2})
    with pytest.raises(InputError, match=r"row 1: column 'right': 2 is neither a choice"):
        first(place, **choices)
    rows(place, {"text": "a", "right": 0})
    task, example = first(place, doc_to_choice=["{{text}}", "none"], doc_to_target="right")
    assert task.candidates_of(example) == (" a", " none")


def test_what_is_written(place):
    rows(place, {"text": "a", "answer": "b"})
    task, example = first(place, **WRITTEN)
    assert (task.kind, task.stop, task.max_new_tokens) == ("generation", ("\n",), 5)
    assert task.completion_of(example) == " b\n"
    assert (example.answers, task.metric) == (("b",), "exact_match")


def test_splits_are_the_file_s(place):
    """The dev set is the test set where there is none; both are split off where neither is."""
    task = tasks.get(written(place))
    splits = load_splits(task, DataArguments(num_dev=5, num_test=7))
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [24, 5, 7]
    task = tasks.get(written(place, validation_split=None))
    splits = load_splits(task, DataArguments(num_dev=4))
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [20, 4, 4]
    assert splits["dev"] == splits["test"]
    hub = {"dataset_path": "nyu-mll/glue", "dataset_name": "sst2", "dataset_kwargs": None}
    found = tasks.get(written(place, **hub, test_split="val")).hub
    assert (found.id, found.config, found.train, found.test) == (
        "nyu-mll/glue", "sst2", "train", "val",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_text": "{{text.strip()}}"}, r"doc_to_text: '\{\{text.strip\(\)"),
        ({"doc_to_text": "no column"}, "doc_to_text names no column"),
        ({"doc_to_text": "{{text}}{% if 1 %}"}, r"doc_to_text: '\{% if 1"),
        ({"doc_to_text": "{{text}} {{a|b}}"}, r"doc_to_text: '\{\{a|b"),
        ({"process_docs": "x"}, "field 'process_docs' has no counterpart"),
        ({"doc_to_txt": "x"}, "did you mean doc_to_text"),
        ({"output_type": "loglikelihood"}, "output_type 'loglikelihood'"),
        ({"metric_list": [{"metric": "bleu"}]}, "metric_list: 'bleu' has no counterpart"),
        ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, "acc is a mean here"),
        ({"doc_to_target": "{{label + 1}}"}, "doc_to_target must name a column"),
        ({"doc_to_choice": "{{[a, b]}}"}, "doc_to_choice must name a column"),
        ({"training_split": "other"}, "data_files has no file 'other'"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "only data_files"),
        (WRITTEN | {"generation_kwargs": {"do_sample": True}}, "do_sample True has no counterpart"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(place, changes, message):
    with pytest.raises(InputError, match=message):
        tasks.get(written(place, **changes))


def test_no_function_is_looked_up(place):
    """The harness would import it."""
    path = place / "task.yaml"
    path.write_text("task: x\nprocess_docs: !function os.system\n")
    with pytest.raises(InputError, match=r"task .*task\.yaml is not YAML: .*!function"):
        tasks.get(str(path))
    with pytest.raises(InputError, match="No such file"):
        tasks.get(str(place / "none.yaml"))


def test_a_file_trains(place, capsys):
    model = model_folder(place / "tiny")
    argv = ["train", "--model", model, "--task", written(place), "--output_dir", place / "out"]
    code, out, _ = mezo(capsys, *argv, "--max_steps", 2, "--use_cpu", "true", "--json")
    assert code == 0
    assert (json.loads(out)["task"], json.loads(out)["steps"]) == ("films", 2)


def test_numbers_of_the_harness():
    row = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 1}
    assert harness._numbers(row | {"sample_len": 3}) == {"acc": 0.5, "exact_match,strict": 1.0}


@pytest.mark.slow  # the harness takes long to import
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")
@pytest.mark.filterwarnings("ignore")
def test_the_harness_reads_the_same_file(place, capsys):
    """The same accuracy of one-token candidates, offline; what it does not know has a nearest name.

    (A text's leading white space is dropped here, and kept there.)
    """
    rows = [json.loads(line) for line in (place / "reviews.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"text": row["text"].strip()}) + "\n" for row in rows]
    (place / "reviews.jsonl").write_text("".join(lines))
    model, path = model_folder(place / "tiny"), str(place / "reviews.jsonl")
    files = {"dataset_kwargs": {"data_files": {"train": path, "val": path}}}
    written(place, **files, doc_to_text="{{text}} It was")
    argv = ["eval", "--model", model, "--json"]
    code, out, _ = mezo(capsys, *argv, "--tasks", "films", "--include_path", place)
    assert code == 0
    found = json.loads(out)
    assert found["n"] == {"films": 24}
    code, out, _ = mezo(capsys, *argv, "--task", place / "task.yaml")
    assert code == 0
    assert json.loads(out)["accuracy"] == found["results"]["films"]["acc"]
    code, _, err = mezo(capsys, *argv, "--tasks", "film", "--include_path", place)
    assert (code, "did you mean films?" in err) == (2, True)
