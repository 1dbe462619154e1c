"""`mezo train --objective`: the metric is what is trained, and evaluation stays as it was."""

from types import SimpleNamespace

import pytest
from folders import model_folder, reviews
from models import tiny_model
from task_runs import data, settings, trained
from tiny_tokenizers import byte_bpe

from mezo import trajectory
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.objectives import form_for, metric_losses
from mezo.runs import task as run
from mezo.runs.task_trainer import task_trainer
from mezo.tasks import Example, Task
from mezo.trainers.task import AdamTaskTrainer

QUESTIONS = Task(
    name="questions",
    version=1,
    source="this test",
    columns=("question",),
    kind="generation",
    metric="f1",
    objective="tokens",
    prompt="Question: {question}\nAnswer:",
    completion=" {answer}\n",
    max_new_tokens=4,
    stop=("\n",),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("objective")
    model_folder(place / "tiny")
    reviews(place / "reviews.jsonl")
    return place


def losses(path):
    return [step.record.loss for step in trajectory.read(path / "run.mezo").steps]


@pytest.mark.parametrize("perturbation", ["in_place", "low_rank"])
def test_a_run_on_accuracy_logs_one_minus_the_accuracy_of_its_batches(
    folder, tmp_path, perturbation
):
    """Of four examples at both ends: eighths. The dev loss is the cross-entropy, as always."""
    options = {"mezo_eps": 0.3, "perturbation": perturbation, "learning_rate": 1e-9}
    found = trained(folder, tmp_path / "a", objective="accuracy", **options)
    assert all(loss in [k / 8 for k in range(9)] for loss in losses(tmp_path / "a"))
    plain = trained(folder, tmp_path / "b", **options)
    assert not all(loss in [k / 8 for k in range(9)] for loss in losses(tmp_path / "b"))
    curves = [[row["dev_loss"] for row in one["curve"]] for one in (found, plain)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_a_run_on_f1_trains_on_what_the_model_writes(tmp_path, monkeypatch):
    """1 - F1 of the prompts and answers of each batch, at both ends of a step."""
    seen = []

    def judged(model, form, prompts, answers, objective):
        seen.append((prompts, answers, objective, model.training))
        return 0.25 * (len(seen) % 2) if len(seen) > 2 else 0.0

    monkeypatch.setattr("mezo.trainers.task.text_loss", judged)
    tokenizer = byte_bpe()
    model = tiny_model("opt", len(tokenizer))
    examples = [Example({"question": f"{i}?"}, -1, answers=(f"a{i}", "b")) for i in range(4)]
    form = form_for(model, tokenizer, QUESTIONS)
    splits = dict.fromkeys(("train", "dev", "test"), examples)
    options = {"max_steps": 2, "mezo_eps": 1e-3, "per_device_train_batch_size": 2}
    args = settings(tmp_path, objective="f1", **options)
    task_trainer(model, form, splits, args).train()
    assert len(seen) == 2 + 2 * 2  # the first step looks at the loss twice
    asked = {tuple(form.encode(e)["prompt"]): list(e.answers) for e in examples}
    for prompts, answers, objective, training in seen:
        assert [asked[tuple(one)] for one in prompts] == answers
        assert (len(prompts), objective, training) == (2, "f1", False)
    assert losses(tmp_path) == [0.125, 0.125]
    args = settings(tmp_path / "adam", method="adam")
    assert type(task_trainer(model, form, splits, args)) is AdamTaskTrainer


@pytest.mark.parametrize(("objective", "expected"), [("f1", 5 / 12), ("exact_match", 2 / 3)])
def test_the_loss_of_texts_is_one_minus_the_mean_of_the_best_answers(
    monkeypatch, objective, expected
):
    """F1 of words: 1, 3/4 (3 of 5 words shared, by 2 x 3 / (5 + 3)) and 0."""
    texts = ["a great film", "no wit and never dull", "nothing"]
    answers = [["x", "great film"], ["wit never dull", "y"], ["something"]]

    def written(model, tokenizer, prompts, settings):
        assert (settings.max_new_tokens, settings.stop, settings.temperature) == (4, ("\n",), 0.0)
        return [SimpleNamespace(text=f" {text}\n") for text in texts]

    monkeypatch.setattr(metric_losses, "generate", written)
    form = form_for(tiny_model("opt"), byte_bpe(), QUESTIONS)
    found = metric_losses.text_loss(None, form, [[1]] * 3, answers, objective)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "f1"}, "objective 'f1' is not one of accuracy, macro_f1, cross_entropy"),
        ({"objective": "accuracy", "method": "adam"}, "accuracy has no gradient, which adam needs"),
        ({"objective": "accuracy", "learning_rate": None}, "accuracy needs a --learning_rate"),
    ],
)
def test_what_an_objective_cannot_be_is_refused_in_a_line(folder, tmp_path, options, message):
    model, args = ModelArguments(str(folder / "tiny")), settings(tmp_path, **options)
    with pytest.raises(InputError, match=message):
        run.train(model, data(folder), args)


def test_a_task_that_writes_has_no_accuracy():
    form = form_for(tiny_model("opt"), byte_bpe(), QUESTIONS)
    with pytest.raises(InputError, match="'accuracy' is not one of f1, exact_match, which task"):
        metric_losses.check_objective(form, "accuracy")
    metric_losses.check_objective(form, None)
