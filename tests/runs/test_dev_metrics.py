"""A run is validated by what it is tested by, for every metric and any number of answers."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import OWN, model_folder, reviews
from task_runs import settings

from mezo import tasks
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.objectives import form_for
from mezo.objectives.metric_losses import metric_closure, metric_loss
from mezo.runs import task as run
from mezo.runs.data_arguments import DataArguments
from mezo.runs.task_trainer import PLACE, _choose_metric, _collate, _metrics
from mezo.tasks import Example

MODEL = "tiny"
NAMES = ["film", "year", "wit"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dev")
    model_folder(folder / MODEL)
    reviews(folder / "reviews.jsonl")
    rows = [
        {"passage": "the film of the year .", "query": f"{word} @placeholder was great ."}
        | {"entities": NAMES[: 2 + i % 2], "answers": NAMES[: 2 + i % 2]}
        for i, word in enumerate(["never", "only", "simply", "too", "long", "dull"])
    ]
    (folder / "record.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(place, path, data, **changes):
    return run.train(
        ModelArguments(str(place / MODEL)),
        data,
        settings(path, **({"load_best_model_at_end": True} | changes)),
    )


def test_a_dev_example_with_several_answers_is_right_with_each_of_them(place, tmp_path):
    """ReCoRD: every entity is an answer here, so that whatever is predicted is right."""
    file = str(place / "record.jsonl")
    data = DataArguments("record", train_file=file, dev_file=file, test_file=file)
    result = trained(place, tmp_path, data)
    assert result["test"]["accuracy"] == 1.0
    assert result["dev"] == 1.0
    assert [row["dev_accuracy"] for row in result["curve"]] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("metric", "asked", "greater"),
    [
        ("accuracy", "task", True),
        ("accuracy", "eval_loss", False),
        ("macro_f1", "accuracy", True),
        ("f1", "task", True),
        ("f1", "exact_match", True),
        ("exact_match", "f1", True),
        ("exact_match", "loss", False),
    ],
)
def test_more_is_better_of_every_metric_but_the_loss(metric, asked, greater):
    args = SimpleNamespace(metric_for_best_model=asked, greater_is_better=None)
    _choose_metric(args, replace(tasks.get("sst2"), metric=metric))
    expected = metric if asked == "task" else asked.removeprefix("eval_")
    assert (args.metric_for_best_model, args.greater_is_better) == (expected, greater)


def test_a_batch_of_one_dev_example_has_its_index():
    class Form:
        def collate(self, features):
            return {}

    assert _collate(Form(), [{PLACE: 7}])[PLACE].tolist() == [7]
    assert _collate(Form(), [{}]) == {}


def test_the_best_weights_are_chosen_by_the_task_s_own_metric(place, tmp_path, monkeypatch):
    """Macro F1, of dev, of test and of the curve: on the same examples it is the same number."""
    custom = tasks.custom_task(OWN[1], OWN[3:], name="films")
    monkeypatch.setitem(tasks.TASKS, "films", replace(custom, metric="macro_f1"))
    file = str(place / "reviews.jsonl")
    data = DataArguments("films", train_file=file, dev_file=file, test_file=file)
    result = trained(place, tmp_path, data)
    assert result["metric"] == "macro_f1"
    assert result["dev"] == result["test"]["macro_f1"] != result["test"]["accuracy"]
    best = max(row["dev_macro_f1"] for row in result["curve"])
    assert best == result["dev"]
    first = next(row["step"] for row in result["curve"] if row["dev_macro_f1"] == best)
    assert result["kept_step"] == first


def test_another_metric_may_choose_and_dev_is_still_the_task_s(place, tmp_path):
    file = str(place / "reviews.jsonl")
    own = {"prompt": OWN[1], "candidates": OWN[3:]}
    data = DataArguments(train_file=file, dev_file=file, test_file=file, **own)
    result = trained(place, tmp_path / "a", data, metric_for_best_model="loss")
    assert result["dev"] == result["test"]["accuracy"]
    losses = {row["step"]: row["dev_loss"] for row in result["curve"]}
    assert result["kept_step"] == min(losses, key=losses.__getitem__)
    with pytest.raises(
        InputError, match="metric_for_best_model 'bleu' is not one of accuracy, loss"
    ):
        trained(place, tmp_path / "b", data, metric_for_best_model="bleu")


class Gathered:
    """What the Trainer hands to compute_metrics: scores, and the labels with the places."""

    def __init__(self, scores, places):
        self.predictions = np.array(scores, dtype=np.float32)
        self.label_ids = (np.zeros(len(scores)), np.array(places))


def test_filled_up_scores_are_no_candidates_and_the_order_does_not_matter():
    """Log-probabilities below -100 are possible; the Trainer fills up with -100."""
    record = tasks.get("record")
    dev = [
        Example({}, 1, candidates=(" a", " b"), choices=("a", "b"), answers=("b",)),
        Example({}, 0, candidates=(" a", " b", " c"), choices=("a", "b", "c"), answers=("a", "c")),
    ]
    scores = {0: [-150.0, -120.0, -100.0], 1: [-3.0, -4.0, -2.0]}
    for places in ([0, 1], [1, 0]):
        found = _metrics(record, dev, Gathered([scores[i] for i in places], places))
        assert found["accuracy"] == 1.0


def test_a_score_that_is_nan_is_no_prediction():
    sst2 = tasks.get("sst2")
    dev = [Example({"sentence": "dull"}, label) for label in (0, 1)]
    found = _metrics(sst2, dev, Gathered([[np.nan, 0.0], [0.0, 1.0]], [0, 1]))
    assert found == {"accuracy": 0.5}


def test_a_metric_as_the_objective_accepts_every_right_candidate(place):
    """The loss that trains accuracy is 1 - the accuracy that is reported."""
    record = tasks.get("record")
    form = form_for(*_model(place), record)
    found = tasks.load_examples(record, "train", files=str(place / "record.jsonl"))
    batch = form.collate([form.encode(example) for example in found])
    assert batch["right"].tolist() == [[True, True, i % 2 == 1] for i in range(6)]
    model, _ = _model(place)
    assert float(metric_closure(form, model, batch, "accuracy")()) == 0.0
    scores = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    labels, right = torch.tensor([0, 0]), torch.tensor([[True, True], [True, False]])
    assert metric_loss(scores, labels, "accuracy") == 1.0
    assert metric_loss(scores, labels, "accuracy", right) == 0.5
    entropy = metric_loss(scores, labels, "cross_entropy", right)
    assert entropy == pytest.approx(np.log(1 + np.e), rel=1e-6)


def _model(place):
    from mezo.models import loading

    return loading.load(ModelArguments(str(place / MODEL)))
