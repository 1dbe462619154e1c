"""Evaluation: order, batches, the model's modes, zero-shot and in context."""

from dataclasses import replace

import pytest
import torch
from models import tiny_model
from tiny_tokenizers import byte_bpe, word_piece

from mezo import tasks
from mezo.errors import InputError
from mezo.evaluation.evaluate import evaluate, score
from mezo.objectives import form_for
from mezo.tasks import Example, Task, custom_task

WORDS = ["a", "charming", "journey", "no", "wit", "only", "labored", "gags", "the", "film"]
EXAMPLES = [
    Example({"sentence": " ".join(WORDS[i % 5 : i % 5 + 1 + 3 * i % 10])}, i % 2) for i in range(11)
]
LONG = custom_task("{sentence} It was", [" a terrible, awful movie", " great"])
# Padding changes the shape of the sums, hence roundings: of float32 in scores of about 10.
TOLERANCE = 10 * 64 * 2.0**-24


def made(name, task=LONG):
    tokenizer = {"opt": byte_bpe, "bert": word_piece, "encoder": word_piece}[name]()
    model = tiny_model(name)
    return model, form_for(model, tokenizer, task if name == "opt" else tasks.get("sst2"))


@pytest.mark.parametrize("name", ["opt", "bert", "encoder"])
def test_neither_batch_size_nor_order_matters(name):
    model, form = made(name)
    single = [evaluate(model, form, [example]) for example in EXAMPLES]
    for batch_size in (2, 3, 32):
        result = evaluate(model, form, EXAMPLES, batch_size=batch_size)
        assert result.predictions == tuple(one.predictions[0] for one in single)
        assert result.n == 11
        assert abs(result.loss - sum(one.loss for one in single) / 11) < TOLERANCE
        assert result.accuracy == pytest.approx(sum(one.accuracy for one in single) / 11)


def test_scores_come_in_the_order_of_the_features():
    model, form = made("opt")
    features = [form.encode(example) for example in EXAMPLES]
    together = score(model, form, features, batch_size=4)
    apart = torch.cat([score(model, form, [feature]) for feature in features])
    assert (together - apart).abs().max() < TOLERANCE
    assert len({feature["length"] for feature in features}) > 4  # so that sorting did something


def test_batches_are_of_like_length_the_longest_first():
    model, form = made("opt")
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    evaluate(model, form, EXAMPLES, batch_size=2)
    assert seen == sorted(seen, reverse=True)


def test_the_model_is_left_as_it_was_even_by_an_error():
    """Each module has its own mode, and dropout is off meanwhile."""
    model, form = made("opt")
    model.train()
    model.model.decoder.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert evaluate(model, form, EXAMPLES) == evaluate(model, form, EXAMPLES)
    with pytest.raises(KeyError):
        score(model, form, [{"length": 1}])
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_in_context_learning_is_evaluation_with_demonstrations():
    model, form = made("opt", tasks.get("sst2"))
    shown = evaluate(model, form, EXAMPLES, demonstrations=EXAMPLES[:2])
    assert shown.loss != evaluate(model, form, EXAMPLES).loss
    assert shown == evaluate(model, form.in_context(model, EXAMPLES[:2]), EXAMPLES)
    assert shown.dropped == 0
    crowded = evaluate(model, form, EXAMPLES[:1], demonstrations=EXAMPLES * 2)
    assert crowded.dropped > 0


def test_an_encoder_takes_demonstrations_too():
    model, form = made("encoder")
    shown = evaluate(model, form, EXAMPLES, demonstrations=EXAMPLES[:4])
    assert shown.loss != evaluate(model, form, EXAMPLES).loss


def test_a_broken_model_has_no_right_predictions():
    """argmax of NaN is an index: it would score like a constant guess."""
    model, form = made("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight.fill_(float("nan"))
    result = evaluate(model, form, EXAMPLES)
    assert result.accuracy == 0
    assert result.loss != result.loss
    assert set(result.predictions) == {-1}


CHOICE = Task(
    name="choice",
    version=1,
    source="this test",
    columns=("sentence",),
    kind="multiple_choice",
    metric="f1",
    prompt="{sentence} so",
)
OWN = [(" terrible", " it was"), (" a", " the great film", " never dull"), (" dull",)]


def test_examples_may_have_their_own_candidates_and_several_right_ones():
    """F1 is of what the candidate stands for; accuracy counts any that is right."""
    model, tokenizer = tiny_model("opt"), byte_bpe()
    form = form_for(model, tokenizer, CHOICE)
    rows = list(zip(EXAMPLES, OWN, strict=False))
    plain = [Example(e.fields, 0, candidates=own) for e, own in rows]
    found = evaluate(model, form, plain, batch_size=2)
    scores = score(model, form, [form.encode(example) for example in plain], batch_size=1)
    assert scores.shape == (3, 3)
    assert torch.equal(scores.isinf(), torch.tensor([[0, 0, 1], [0, 0, 0], [0, 1, 1]]).bool())
    assert found.predictions == tuple(scores.argmax(-1).tolist())
    assert found.loss == pytest.approx(-scores.double().log_softmax(-1)[:, 0].mean().item())
    names = ("the film", "a film of the year", "wit")
    told = [
        Example(e.fields, 0, candidates=own, choices=names[: len(own)], answers=("film", "wit"))
        for e, own in rows
    ]
    judged = evaluate(model, form, told)
    chosen = [names[k] for k in judged.predictions]
    f1 = {"the film": 1.0, "a film of the year": 2 / 4, "wit": 1.0}  # articles do not count
    assert judged.metrics["f1"] == pytest.approx(sum(f1[name] for name in chosen) / 3)
    assert judged.accuracy == sum(name == "wit" for name in chosen) / 3
    assert judged.value == judged.metrics["f1"]


def test_macro_f1_is_the_mean_over_labels():
    """Where one is always predicted it is f1 of that one, halved."""
    model, form = made("opt", replace(LONG, metric="macro_f1"))
    constant = replace(form, offsets=torch.tensor([0.0, 1e4]))
    result = evaluate(model, constant, EXAMPLES)
    assert set(result.predictions) == {0}
    share = sum(example.label == 0 for example in EXAMPLES) / len(EXAMPLES)
    assert result.value == pytest.approx(2 * share / (1 + share) / 2)
    assert result.accuracy == pytest.approx(share)


def test_nothing_to_evaluate_is_refused():
    model, form = made("opt")
    with pytest.raises(InputError, match="no examples to evaluate"):
        evaluate(model, form, [])
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        evaluate(model, form, EXAMPLES, batch_size=0)
