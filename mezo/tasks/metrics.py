"""Metrics as the data sets' official scripts define them, on predictions and right answers.

    accuracy, macro_f1          of label indices
    exact_match, token_f1       of a text against all accepted answers: SQuAD v1.1's definition

All are fractions of 1. The metrics of texts are of one example; a data set's is their mean. DROP's
official script aligns the spans of an answer one to one. The paper's experiments did not, and the
hub's data set, where all spans of all answers are one list, does not allow it: token_f1 is taken.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mezo.errors import InputError

METRICS = ("accuracy", "macro_f1", "f1", "exact_match")  # what a Task may name; f1 is token_f1
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_UNANSWERABLE = ("CANNOTANSWER", "no answer")  # answers that are right as a whole or not at all


def normalize_answer(text: str) -> str:
    """Return the text in lower case without punctuation and articles, single-spaced (SQuAD v1.1).

    >>> normalize_answer("The  Panthers' defense.")
    'panthers defense'
    """
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the normalised prediction is one of the normalised answers, else 0.0."""
    _some(answers)
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the best harmonic mean, over the answers, of the precision and recall of words.

    Words are counted as often as they occur in both texts. Without a common word the result is 0,
    also for two empty texts, as in the official script. As in the paper's experiments, an answer
    such as "no answer", if it is the first, is right as a whole or not at all.
    """
    _some(answers)
    if answers[0] in _UNANSWERABLE:
        return exact_match(prediction, answers[:1])
    return max(_overlap(_words(prediction), _words(answer)) for answer in answers)


def _some(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise InputError(f"answers must be a sequence of one or more strings, got {answers!r}")


def _words(text: str) -> list[str]:
    return normalize_answer(text).split()


def _overlap(predicted: list[str], right: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(right)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall)


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Return the fraction of equal pairs."""
    predicted, right = _pairs(predictions, labels)
    return float((predicted == right).mean())


def macro_f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """The mean of the labels' F1, each 2 tp / (2 tp + fp + fn), over all labels that occur.

    A label that is never predicted has F1 0; one that occurs in neither does not count. Equal to
    scikit-learn's f1_score(labels, predictions, average="macro"), which SuperGLUE takes for CB.
    """
    predicted, right = _pairs(predictions, labels)
    scores = []
    for label in np.union1d(predicted, right):
        hits = ((predicted == label) & (right == label)).sum()
        scores.append(2 * hits / ((predicted == label).sum() + (right == label).sum()))
    return float(np.mean(scores))


def _pairs(predictions: Sequence[int], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    if len(predictions) != len(labels) or not len(labels):
        raise InputError(
            f"one prediction per example: got {len(predictions)} for {len(labels)} labels"
        )
    return np.asarray(predictions), np.asarray(labels)
