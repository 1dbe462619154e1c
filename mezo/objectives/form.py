"""What all forms have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from mezo.closures import Both, Paired, Stacking, copies, repeated
from mezo.errors import InputError
from mezo.models.modes import Batch, evaluating, to_device
from mezo.objectives.packing import padded
from mezo.objectives.tokens import Tokens
from mezo.tasks.task import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Feature = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Form(ABC):
    """How a task is put to one kind of model. It holds no model, so you may wrap yours as you like.

    `encode` makes an example's features once, and `collate` makes a padded batch on the CPU, with
    labels first. A Trainer takes them as dataset and data_collator.
    """

    task: Task
    tokenizer: "PreTrainedTokenizerBase"
    accepts: frozenset[str]  # argument names of the model's forward
    max_length: int
    truncate: bool = False  # cut what is too long instead of refusing it
    offsets: torch.Tensor | None = None  # (candidates,), subtracted from the scores

    @abstractmethod
    def texts(self, example: Example) -> list[str]:
        """Return what the model reads, before tokenisation."""

    @abstractmethod
    def encode(self, example: Example, demonstrations: Sequence[Example] | None = None) -> Feature:
        """Return the features of one example. Raise InputError for one too long,
        unless truncate."""

    @abstractmethod
    def collate(self, features: Sequence[Feature]) -> Batch:
        """Return a batch as long as its longest row."""

    @abstractmethod
    def in_context(self, model: torch.nn.Module, demonstrations: Sequence[Example]) -> "Form":
        """Return this form with demonstrations in front of every example."""

    @abstractmethod
    def _scores(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor: ...

    def scores(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return scores (examples, candidates) in float32."""
        scores = self._scores(model, batch)
        return scores if self.offsets is None else scores - self.offsets.to(scores.device)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy over candidates, averaged over the batch: a float32 scalar."""
        return F.cross_entropy(self.scores(model, batch), batch["labels"])

    def closure(self, model: torch.nn.Module, batch: Batch) -> Paired:
        """Return the loss as a closure for `MeZO.step`; low rank has both losses from
        one forward pass."""
        alone, halves = partial(self.loss, model, batch), partial(self.pair_loss, model, batch)
        return Paired(alone, halves, *self.stacking(model, batch))

    def stacking(self, model: torch.nn.Module, batch: Batch) -> Stacking:
        """Return what of a step should share a pass over copies of the batch."""
        return Stacking.of(model, batch["input_ids"].numel())

    def pair_loss(self, model: torch.nn.Module, batch: Batch, both: Both) -> list[torch.Tensor]:
        """Return the losses at theta + eps z and theta - eps z, of each direction in the pass, as
        `closures.Paired.halves` does."""
        found = self.pair_scores(model, batch, both)
        offsets = 0.0 if self.offsets is None else self.offsets.to(found[0].device)
        return [F.cross_entropy(scores - offsets, batch["labels"]) for scores in found]

    def pair_scores(self, model: torch.nn.Module, batch: Batch, both: Both) -> Sequence:
        times = copies(both)
        with both(len(batch["input_ids"])):
            return self._scores(model, self._repeated(batch, times)).chunk(times)

    def _repeated(self, batch: Batch, times: int) -> Batch:
        return repeated(batch, times)

    def calibrate(self, model: torch.nn.Module, kind: str = "content_free") -> "Form":
        """Return this form with the scores of an empty example, as they are now, subtracted.

        This removes the model's preference for a candidate whatever the text (Zhao et al., 2021).
        Only causal models know another `kind` than "content_free".
        """
        if kind != "content_free":
            raise InputError(f"calibration {kind!r} is for causal models alone")
        plain = replace(self, offsets=None)
        neutral = plain.encode(Example(dict.fromkeys(self.task.columns, ""), 0, "empty example"))
        with evaluating(model):
            scores = plain.scores(model, to_device(plain.collate([neutral]), model))
        return replace(self, offsets=scores[0])

    def _pad(self, rows: Sequence[Sequence[int]], side: str) -> Batch:
        """Return input_ids and attention_mask of shape (rows, longest)."""
        return padded(rows, self.tokenizer.pad_token_id or 0, side)  # masked, so any token will do

    def _fit(self, tokens: Tokens, example: Example) -> Tokens:
        """Refuse a text that is too long, or cut it on the left, after the leading
        special tokens."""
        excess = self._excess(tokens)
        if excess <= 0:
            return tokens
        self._refuse(self.max_length + excess, example)
        where = example.origin or "example"
        if tokens.leading + excess >= tokens.first:
            raise InputError(f"{where}: a limit of {self.max_length} tokens leaves no text")
        return tokens.cut(excess)

    def _excess(self, tokens: Tokens) -> int:
        """Return by how many tokens a text is too long; not positive if it fits."""
        return len(tokens.ids) - self.max_length

    def _refuse(self, length: int, example: Example) -> None:
        if length > self.max_length and not self.truncate:
            raise InputError(
                f"{example.origin or 'example'} has {length} tokens, the limit is "
                f"{self.max_length}; shorten it or pass truncate"
            )

    def _fixed(self, example: Example) -> None:
        """Raise InputError for an example's own candidates: this kind of model knows
        fixed words."""
        if example.candidates:
            where = example.origin or "example"
            raise InputError(f"{where} has candidates of its own: they need a causal model")
