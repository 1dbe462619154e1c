"""Metrics against values that follow from the official scripts' definitions, by hand."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezo.errors import InputError
from mezo.tasks.metrics import accuracy, exact_match, macro_f1, normalize_answer, token_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Panthers' defense.", "panthers defense"),
        ("an apple a day", "apple day"),
        ("U.S.A.", "usa"),  # punctuation goes before words are split
        ("the-end", "theend"),  # and before articles are sought
        ("theatre another", "theatre another"),  # an article is a whole word
        ("$1,000", "1000"),
        ("", ""),
        ("The", ""),
        ("«Éa»", "«éa»"),  # ASCII punctuation alone
    ],
)
def test_normalisation_is_squads(text, normal):
    """evaluate-v1.1.py: lower case, punctuation, articles, white space, in this order."""
    assert normalize_answer(text) == normal


def test_exact_match_is_with_any_answer():
    assert exact_match("The 1900.", ["x", "1900"]) == 1.0
    assert exact_match("in 1900", ["1900"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answers", "value"),
    [
        ("7 January 1900", ["1900"], Fraction(1, 2)),  # precision 1/3, recall 1
        ("7 January 1900", ["1900", "on 7 January 1900"], Fraction(6, 7)),  # 1 and 3/4: the best
        ("the cat", ["cat"], Fraction(1)),
        ("dog", ["cat"], Fraction(0)),
        ("no no no", ["no"], Fraction(1, 2)),  # one "no" is common: 1/3 and 1
        ("no no", ["no no no"], Fraction(4, 5)),  # two are: 1 and 2/3
        ("", ["the"], Fraction(0)),  # both empty, and 0, as in v1.1's script
        ("no answer given", ["no answer"], Fraction(0)),  # the reference: whole or not at all
        ("No answer.", ["no answer"], Fraction(1)),
    ],
)
def test_token_f1_by_hand(prediction, answers, value):
    assert token_f1(prediction, answers) == pytest.approx(float(value), abs=1e-15)


def test_one_string_for_the_answers_is_refused():
    """Its letters would be the answers."""
    for metric in (exact_match, token_f1):
        with pytest.raises(InputError, match="got 'cat'"):
            metric("cat", "cat")
        with pytest.raises(InputError, match=r"got \[\]"):
            metric("cat", [])


WORDS = st.lists(st.sampled_from(["cat", "dog", "a", "1900"]), max_size=5).map(" ".join)


@given(WORDS, WORDS)
def test_f1_is_symmetric_at_most_one_and_one_only_for_the_same_words(one, other):
    score = token_f1(one, [other])
    assert score == pytest.approx(token_f1(other, [one]), abs=1e-15)
    same = sorted(normalize_answer(one).split()) == sorted(normalize_answer(other).split())
    assert (score == 1.0) == (same and normalize_answer(one) != "")
    assert 0.0 <= score <= 1.0


def test_accuracy_and_macro_f1_by_hand():
    """Labels 0: tp 1, fp 1, fn 0 -> 2/3; 1: tp 1, fn 1 -> 2/3; 2 is missed: 0."""
    labels, predictions = [0, 1, 1, 2], [0, 1, 0, 1]
    assert accuracy(predictions, labels) == 0.5
    label_1 = Fraction(2 * 1, 2 + 2)  # tp 1, predicted twice, there twice
    expected = (Fraction(2, 3) + label_1 + 0) / 3
    assert macro_f1(predictions, labels) == pytest.approx(float(expected), abs=1e-15)
    assert macro_f1([1, 1], [1, 1]) == 1.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_over_labels_of_precision_and_recalls_harmonic_mean(pairs):
    """Naive twin, from precision and recall."""
    scores = []
    for label in {value for pair in pairs for value in pair}:
        hits = sum(p == t == label for p, t in pairs)
        said, there = sum(p == label for p, _ in pairs), sum(t == label for _, t in pairs)
        precision, recall = hits / said if said else 0.0, hits / there if there else 0.0
        total = precision + recall
        scores.append(2 * precision * recall / total if total else 0.0)
    predictions, labels = zip(*pairs, strict=True)
    assert macro_f1(predictions, labels) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_lists_of_unlike_length_are_refused():
    with pytest.raises(InputError, match="got 1 for 2 labels"):
        accuracy([0], [0, 1])
    with pytest.raises(InputError, match="got 0 for 0 labels"):
        macro_f1([], [])


def test_an_unanswerable_question_is_right_as_a_whole_whatever_else_is_accepted():
    """The first answer says so; a second one does not make part of it right."""
    assert token_f1("b", ["no answer", "b"]) == 0.0
    assert token_f1("no answer", ["no answer", "b"]) == 1.0
