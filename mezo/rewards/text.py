"""Reward functions for generated answers: SQuAD's metrics, from 0 to 1, against `answers`.

The data set has a column `answers`: a list of accepted texts a prompt. The loss is minus the mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mezo.tasks import metrics


def content(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion, be it a text or a conversation."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message["content"]) for message in completion)


def exact_match(completions, answers: Sequence[Sequence[str]], **kwargs) -> list[float]:
    """1.0 where the normalised completion is one of its answers."""
    pairs = zip(completions, answers, strict=True)
    return [metrics.exact_match(content(text).strip(), right) for text, right in pairs]


def token_f1(completions, answers: Sequence[Sequence[str]], **kwargs) -> list[float]:
    """F1 of the words in common, the best over the answers."""
    pairs = zip(completions, answers, strict=True)
    return [metrics.token_f1(content(text).strip(), right) for text, right in pairs]
