"""mezo.objectives.metrics: accuracy and F1 of a batch as the loss, alone and beside others."""

from dataclasses import replace

import pytest
import torch
from models import tiny_model
from tiny_tokenizers import byte_bpe
from torch.nn import functional as F

from mezo import MeZO, tasks
from mezo.errors import InputError
from mezo.objectives import form_for
from mezo.objectives.metric_losses import metric_closure, metric_loss

SCORES = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 2.0]])  # says 0, 1, 0, 1
LABELS = torch.tensor([0, 1, 1, 1])
CASES = [
    ("accuracy", 1 / 4),
    ("macro_f1", 1 - (2 / 3 + 4 / 5) / 2),  # tp, fp, fn: 1, 1, 0 and 2, 0, 1
    ("cross_entropy", float(F.cross_entropy(SCORES, LABELS))),
    ({"accuracy": 2.0, "cross_entropy": 0.0}, 1 / 2),
    ({"accuracy": 1.0, "macro_f1": 3.0}, 1 / 4 + 3 * (1 - (2 / 3 + 4 / 5) / 2)),
]


@pytest.mark.parametrize(("objective", "expected"), CASES)
def test_the_loss_is_what_is_written(objective, expected):
    assert metric_loss(SCORES, LABELS, objective) == pytest.approx(expected, rel=1e-12)


def test_each_of_several_right_candidates_counts_but_for_cross_entropy():
    """The first example's best is its label, the third's is right beside its label."""
    right = torch.tensor([[True, False], [False, True], [True, True], [False, True]])
    assert metric_loss(SCORES, LABELS, "accuracy", right) == 0.0
    assert metric_loss(SCORES, LABELS, "macro_f1", right) == 0.0
    entropy = metric_loss(SCORES, LABELS, "cross_entropy", right)
    assert entropy == metric_loss(SCORES, LABELS, "cross_entropy")


def batch_of():
    tokenizer = byte_bpe()
    model = tiny_model("opt", len(tokenizer))
    task = tasks.custom_task("{text} It was", (" terrible", " great"))
    form = form_for(model, tokenizer, task)
    texts = ["no wit", "a charming journey", "dull", "the film of the year", "awful"]
    examples = [tasks.Example({"text": text}, i % 2, "") for i, text in enumerate(texts)]
    return model, form, form.collate([form.encode(example) for example in examples])


def test_cross_entropy_is_the_forms_own_loss():
    model, form, batch = batch_of()
    own = metric_closure(form, model, batch, "cross_entropy")()
    assert own == pytest.approx(form.loss(model, batch).item(), rel=1e-6)


def test_both_losses_come_from_one_pass_along_low_rank_directions():
    """And are those of two passes, at an eps that changes predictions."""
    found = []
    for paired in (True, False):
        model, form, batch = batch_of()
        closure = metric_closure(form, model, batch, {"accuracy": 1.0, "cross_entropy": 1.0})
        optimizer = MeZO(model.named_parameters(), lr=0.0, eps=0.1, seed=2, perturbation="low_rank")
        with torch.no_grad():
            estimate = optimizer.estimate(closure if paired else closure.alone)
        assert (optimizer.memory.paired is True) == paired
        found.append((estimate.projected_grad, estimate.loss))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_scores_of_an_empty_example_are_taken_from_both_halves():
    """Offsets of a calibrated form, large enough to decide every prediction."""
    model, form, batch = batch_of()
    form = replace(form, offsets=torch.tensor([100.0, 0.0]))  # all say 1: two of five are right
    closure = metric_closure(form, model, batch, "accuracy")
    optimizer = MeZO(model.named_parameters(), lr=0.0, seed=2, perturbation="low_rank")
    with torch.no_grad():
        assert optimizer.estimate(closure).losses == pytest.approx((3 / 5, 3 / 5), rel=1e-12)
    assert optimizer.memory.paired is True  # two passes would not take them from a pair's scores


@pytest.mark.parametrize(("objective", "words"), [("f2", "got 'f2'"), ({}, "objective is empty")])
def test_an_unknown_objective_is_refused(objective, words):
    model, form, batch = batch_of()
    with pytest.raises(InputError, match=words):
        metric_closure(form, model, batch, objective)
