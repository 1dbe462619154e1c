"""The published code's choices: other demonstrations for each question, and --as_published."""

import json

import pytest
import real_shapes
import torch
from folders import model_folder, reviews
from models import tiny_model
from task_runs import data, settings

from mezo import tasks
from mezo.errors import InputError
from mezo.evaluation.evaluate import evaluate
from mezo.models.arguments import ModelArguments
from mezo.objectives import form_for
from mezo.runs import published
from mezo.runs import task as run
from mezo.runs.data_arguments import DataArguments
from mezo.tasks import Example

SST2 = tasks.get("sst2")


def examples(number):
    words = ("dull", "brilliant", "long", "wonderful", "boring", "simply")
    return [Example({"sentence": words[i % 6] + " movie" * i}, i % 2) for i in range(number)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("published")
    model_folder(place / "tiny")
    reviews(place / "reviews.jsonl")
    return place


def test_each_question_has_the_demonstrations_that_the_paper_draws_for_it(folder, monkeypatch):
    """Those of demonstration_sets, in the order of the test examples; the flag alone changes it."""
    seen = []
    monkeypatch.setattr(run, "evaluate_form", lambda *_, each, **__: seen.append(each) or _Found())
    own = data(folder, test_file=data(folder).dev_file, demonstrations=2)
    for changes in ({}, {"demonstrations_per_example": True}, {"as_published": True}):
        run.evaluate(ModelArguments(str(folder / "tiny")), DataArguments(**(vars(own) | changes)))
    train = tasks.load_examples(run.task_of(own), "train", files=own.train_file)
    expected = list(tasks.demonstration_sets(train, 2, len(train)))
    assert seen == [None, expected, expected]
    assert len({tuple(e.origin for e in shown) for shown in expected}) > len(expected) // 2


class _Found:
    metrics, loss, n, dropped = {}, 0.0, 1, 0


def test_scores_with_own_demonstrations_are_those_of_each_example_alone():
    tokenizer = real_shapes.opt()
    model = tiny_model("opt", len(tokenizer), context=400)
    form, asked = form_for(model, tokenizer, SST2), examples(3)
    each = [examples(6)[i : i + 2] for i in range(3)]
    together = evaluate(model, form, asked, each=each)
    alone = [evaluate(model, form, [e], demonstrations=s) for e, s in zip(asked, each, strict=True)]
    assert together.predictions == tuple(one.predictions[0] for one in alone)
    assert together.loss == pytest.approx(sum(one.loss for one in alone) / 3, rel=1e-5)
    assert together.loss != pytest.approx(evaluate(model, form, asked).loss, rel=1e-5)


def test_opt_reads_its_texts_behind_s_as_the_published_code_has_it():
    """The published code sets bos_token_id to 0, <s>; the tokenizer of OPT puts </s> in front."""
    tokenizer = real_shapes.opt()
    assert tokenizer("dull").input_ids[0] == tokenizer.convert_tokens_to_ids("</s>")
    rest = tokenizer("dull").input_ids[1:]
    published.set_first_token(tokenizer, tiny_model("opt", len(tokenizer)))
    assert tokenizer("dull").input_ids == [tokenizer.convert_tokens_to_ids("<s>"), *rest]
    other = real_shapes.llama3()
    before = other("dull").input_ids
    published.set_first_token(other, tiny_model("llama", len(other)))
    assert other("dull").input_ids == before
    with pytest.raises(InputError, match="the tokenizer has no token <s>"):
        published.set_first_token(real_shapes.gpt2(), tiny_model("opt", 300))


def test_demonstrations_are_cut_by_tokens_and_ours_are_dropped_whole():
    """The last tokens of the text stay, and a part of the first demonstration with them."""
    tokenizer = real_shapes.opt()
    model = tiny_model("opt", len(tokenizer), context=400)
    whole = form_for(model, tokenizer, SST2).in_context(model, examples(4))
    row = whole.encode(examples(2)[1])["rows"][0]
    limit = len(row) - 5
    short = form_for(model, tokenizer, SST2, limit).in_context(model, examples(4))
    assert short.encode(examples(2)[1])["dropped"] == 1
    cut = published.cut_by_tokens(short).encode(examples(2)[1])
    assert cut["dropped"] == 0
    assert cut["rows"][0] == (row[0], *row[-(limit - 2) :])


def test_calibration_stands_behind_no_demonstrations_and_ours_does(folder):
    tokenizer = real_shapes.opt()
    model = tiny_model("opt", len(tokenizer), context=400)
    made = {}
    for flag in (False, True):
        options = DataArguments("sst2", calibrate=True, calibration="sfc", as_published=flag)
        made[flag] = run.form_of(model, tokenizer, SST2, ModelArguments(), options, examples(2))
    plain = form_for(model, tokenizer, SST2).calibrate(model, "sfc")
    assert torch.equal(made[True].offsets, plain.offsets)
    assert not torch.equal(made[False].offsets, plain.offsets)
    assert made[True].demonstrations == made[False].demonstrations == tuple(examples(2))


def test_the_best_weights_are_those_of_the_least_dev_loss(folder, tmp_path):
    """The Trainer's default, which the published code for OPT leaves as it is."""
    options = {"load_best_model_at_end": True}
    found = run.train(
        ModelArguments(str(folder / "tiny")),
        data(folder, as_published=True),
        settings(tmp_path, **options),
    )
    losses = {row["step"]: row["dev_loss"] for row in found["curve"]}
    assert found["kept_step"] == min(losses, key=losses.__getitem__)
    assert json.loads((tmp_path / "result.json").read_text())["config"]["as_published"] is True
    args = settings(tmp_path, metric_for_best_model="accuracy")
    tokenizer = real_shapes.opt()
    form = form_for(tiny_model("opt", len(tokenizer)), tokenizer, SST2)
    assert published.best_by_loss(args, form).metric_for_best_model == "accuracy"
    assert published.best_by_loss(settings(tmp_path), form).metric_for_best_model == "loss"
