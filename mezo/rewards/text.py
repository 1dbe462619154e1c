"""Reward functions for generated answers: SQuAD's metrics, from 0 to 1.

The data set needs a column `answers` with a list of accepted texts for each prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mezo.tasks import metrics


def content(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a completion, which may be a text or a conversation."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message["content"]) for message in completion)


def exact_match(completions, answers: Sequence[Sequence[str]], **kwargs) -> list[float]:
    """Return 1.0 for each completion that equals one of its answers after normalisation."""
    pairs = zip(completions, answers, strict=True)
    return [metrics.exact_match(content(text).strip(), right) for text, right in pairs]


def token_f1(completions, answers: Sequence[Sequence[str]], **kwargs) -> list[float]:
    """Return, for each completion, the F1 of common words with the best of its answers."""
    pairs = zip(completions, answers, strict=True)
    return [metrics.token_f1(content(text).strip(), right) for text, right in pairs]
