"""From text to padded tokens, and from a piece of the text to its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mezo.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """A tokenised text and the span [first, last) of the tokens that were asked for."""

    ids: list[int]
    leading: int  # special tokens in front
    first: int
    last: int

    def cut(self, excess: int) -> "Tokens":
        ids = self.ids[: self.leading] + self.ids[self.leading + excess :]
        return replace(self, ids=ids, first=self.first - excess, last=self.last - excess)


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], starts: list[int], ends: list[int]
) -> list[Tokens]:
    """Tokenise each text once and find the tokens of its characters [start, end).

    A token that covers part of the span belongs to it. Tokenising prompt and candidate separately
    would give other tokens, and a wrong span, wherever the two meet. Raise InputError if the span
    has no token.
    """
    asked = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    encoded = tokenizer(texts, **asked, verbose=False)  # our own message says what is too long
    rows = []
    for i, (text, start, end) in enumerate(zip(texts, starts, ends, strict=True)):
        special, places = encoded["special_tokens_mask"][i], encoded["offset_mapping"][i]
        span = [t for t, (a, b) in enumerate(places) if a < end and b > start and b > a]
        if not span:
            raise InputError(f"the tokenizer makes no token of {text[start:end]!r}")
        leading = next((t for t, flag in enumerate(special) if not flag), 0)
        rows.append(Tokens(list(encoded["input_ids"][i]), leading, span[0], span[-1] + 1))
    return rows


def stack(rows: Sequence[Sequence[int]], filler: int, side: str) -> torch.Tensor:
    """Return rows of unequal length as one tensor (rows, longest), padded on the side given."""
    longest = max(len(row) for row in rows)
    padding = [[filler] * (longest - len(row)) for row in rows]
    if side == "left":
        return torch.tensor([p + list(row) for p, row in zip(padding, rows, strict=True)])
    return torch.tensor([list(row) + p for p, row in zip(padding, rows, strict=True)])
