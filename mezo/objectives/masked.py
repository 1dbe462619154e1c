"""Masked language models: candidates as the word at the mask."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mezo.errors import InputError
from mezo.models.modes import Batch, unwrap
from mezo.objectives.form import Feature, Form
from mezo.objectives.tokens import tokenize
from mezo.tasks.task import MASK, Example, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BEFORE = "I "  # a word and a space: tokenizers that mark the beginning of a text mark it there


@dataclass(frozen=True, eq=False)
class Masked(Form):
    """Logits of the verbalizers at the mask, and at no other position."""

    words: tuple[int, ...] = ()  # token of each verbalizer

    @classmethod
    def of(cls, **shared) -> "Masked":
        """Make the form, with the tokens of the task's verbalizers. Raise InputError without a mask
        token, or if two verbalizers are one token."""
        form = cls(**shared)
        if form.tokenizer.mask_token is None:
            raise InputError(f"{type(form.tokenizer).__name__} has no mask token")
        words = tuple(form.verbalizer(word) for word in form.task.verbalizers)
        if len(set(words)) < len(words):
            raise InputError(f"verbalizers {', '.join(form.task.verbalizers)} share a token")
        return replace(form, words=words)

    def texts(self, example: Example) -> list[str]:
        return [self._fill(example.fields, self.tokenizer.mask_token)[0]]

    def _fill(self, fields: dict[str, str], word: str) -> tuple[str, int]:
        """Return the text with a word in place of the mask, and where the word starts."""
        before, behind = self.task.mask_prompt.split("{" + MASK + "}")
        front = fill(before, fields).lstrip()
        return front + word + fill(behind, fields), len(front)

    def verbalizer(self, word: str) -> int:
        """Return the token of a word at the mask, as it would stand in running text.

        Where no text of the template stands before the mask, as in TREC's "{mask}: {text}", the
        word is taken as if it followed a space: byte-level BPE stores words in this way
        (`ĠExpression`), and the published code takes space and word everywhere.

        Raise InputError for a word that is not one token or is unknown.
        """
        text, start = self._fill(dict.fromkeys(self.task.columns, ""), word)
        if start == 0:
            text, start = _BEFORE + text, len(_BEFORE)
        (tokens,) = tokenize(self.tokenizer, [text], [start], [start + len(word)])
        ids = tokens.ids[tokens.first : tokens.last]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            pieces = " ".join(map(str, self.tokenizer.convert_ids_to_tokens(ids)))
            raise InputError(f"verbalizer {word!r} must be one token, the tokenizer has {pieces}")
        return ids[0]

    def encode(self, example: Example, demonstrations: Sequence[Example] | None = None) -> Feature:
        """Encode as Form.encode does. Returns input_ids, mask (its position), label, length."""
        if demonstrations:
            raise InputError("demonstrations in the context are for causal models and encoders")
        self._fixed(example)
        text, start = self._fill(example.fields, self.tokenizer.mask_token)
        end = start + len(self.tokenizer.mask_token)
        (tokens,) = tokenize(self.tokenizer, [text], [start], [end])
        tokens = self._fit(tokens, example)
        feature = {"input_ids": tokens.ids, "mask": tokens.last - 1, "label": example.label}
        return feature | {"length": len(tokens.ids)}

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Return labels (B,), input_ids and attention_mask (B, T), and mask (B,)."""
        return {
            "labels": torch.tensor([feature["label"] for feature in features]),
            **self._pad([feature["input_ids"] for feature in features], "right"),
            "mask": torch.tensor([feature["mask"] for feature in features]),
        }

    def in_context(self, model: torch.nn.Module, demonstrations: Sequence[Example]) -> Form:
        raise InputError("demonstrations in the context are for causal models and encoders")

    def _scores(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return logits_at(model, batch["mask"], inputs)[:, list(self.words)].float()


def logits_at(
    model: torch.nn.Module, positions: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return logits (batch, vocabulary) at one position per row.

    A hook hands the head the hidden states of these positions only, so that no other logits are
    computed. It sits on the model's child that holds the output embeddings, because a head's first
    argument is the hidden states (BERT's `cls`, RoBERTa's `lm_head`, ...).
    """
    length = inputs["input_ids"].shape[1]

    def chosen(states: torch.Tensor) -> torch.Tensor:
        virtual = states.shape[1] - length  # tokens that peft put in front
        return states[torch.arange(len(states), device=states.device), positions + virtual]

    def keep(head: torch.nn.Module, args: tuple) -> tuple:
        return (chosen(args[0])[:, None], *args[1:])

    head = _head(unwrap(model))
    compiled = hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
    if head is None or compiled:  # compiled code ignores hooks that come and go
        return chosen(model(**inputs).logits)
    handle = head.register_forward_pre_hook(keep)
    try:
        return model(**inputs).logits[:, 0]
    finally:
        handle.remove()


def _head(model: "PreTrainedModel") -> torch.nn.Module | None:
    embeddings = model.get_output_embeddings()
    children = [c for c in model.children() if any(m is embeddings for m in c.modules())]
    return children[0] if children else None
