"""Sentence encoders: candidates as descriptions, compared with the text by their embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from mezo.closures import Both, copies, repeated
from mezo.errors import InputError
from mezo.models.modes import Batch, evaluating, to_device
from mezo.objectives.form import Feature, Form
from mezo.tasks.task import Example, fill

SCALE = 20.0  # of the cosine, as in the losses of sentence-transformers


@dataclass(frozen=True, eq=False)
class Encoder(Form):
    """20 cos(text, description). Embeddings are means over tokens, normalised.

    The descriptions are rows of every batch, after the texts: the same weights encode both, and
    both change the loss.
    """

    described: tuple[tuple[int, ...], ...] = ()  # tokens of each description
    anchors: torch.Tensor | None = None  # (candidates, width): used instead of the descriptions

    @classmethod
    def of(cls, **shared) -> "Encoder":
        """Make the form, with the tokens of the task's descriptions."""
        form = cls(**shared)
        rows = [form._ids(d, Example({}, 0, "a description")) for d in form.task.descriptions]
        return replace(form, described=tuple(map(tuple, rows)))

    def texts(self, example: Example) -> list[str]:
        return [fill(self.task.text, example.fields).lstrip()]

    def encode(self, example: Example, demonstrations: Sequence[Example] | None = None) -> Feature:
        """As Form.encode; a text that is too long is cut on the right. Returns input_ids, label,
        length.

        Demonstrations need the model: see `in_context`.
        """
        if demonstrations:
            raise InputError("an encoder takes demonstrations by form.in_context(model, ...)")
        self._fixed(example)
        ids = self._ids(self.texts(example)[0], example)
        return {"input_ids": ids, "label": example.label, "length": len(ids)}

    def _ids(self, text: str, example: Example) -> list[int]:
        limit = {"truncation": True, "max_length": self.max_length} if self.truncate else {}
        ids = self.tokenizer(text, verbose=False, **limit)["input_ids"]
        self._refuse(len(ids), example)
        return list(ids)

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Return labels (B,), input_ids and attention_mask (B + candidates, T)."""
        rows = [feature["input_ids"] for feature in features]
        rows += self.described if self.anchors is None else ()
        labels = torch.tensor([feature["label"] for feature in features])
        return {"labels": labels, **self._pad(rows, "right")}

    def in_context(self, model: torch.nn.Module, demonstrations: Sequence[Example]) -> Form:
        """Return the forward-only analogue: a candidate is its description and its demonstrations.

        Each anchor is the average of the description's embedding and the mean embedding of the
        label's demonstrations, if it has any. Anchors are computed with the present weights:
        use them for evaluation, not for training.
        """
        with evaluating(model):
            plain = replace(self, anchors=None)
            anchors = embed(model, to_device(plain.collate([]), model))
            for label, anchor in enumerate(anchors):
                shown = [plain.encode(e)["input_ids"] for e in demonstrations if e.label == label]
                if shown:  # the sum has the direction of the average
                    batch = to_device(self._pad(shown, "right"), model)
                    anchor += embed(model, batch).mean(0)
        return replace(self, anchors=F.normalize(anchors, dim=-1))

    def _scores(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return self._compare(embed(model, batch), len(batch["labels"]))

    def pair_scores(self, model: torch.nn.Module, batch: Batch, both: Both) -> Sequence:
        times = copies(both)
        with both(len(batch["input_ids"])):
            parts = embed(model, repeated(batch, times)).chunk(times)
        return [self._compare(part, len(batch["labels"])) for part in parts]

    def _compare(self, embeddings: torch.Tensor, texts: int) -> torch.Tensor:
        anchors = embeddings[texts:] if self.anchors is None else self.anchors
        return SCALE * embeddings[:texts] @ anchors.T


def embed(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return unit vectors (rows, width) in float32: means of the last hidden
    states without padding."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    mask = batch["attention_mask"][..., None].float()
    states = model(**inputs).last_hidden_state[:, -mask.shape[1] :]  # behind peft's own tokens
    return F.normalize((states.float() * mask).sum(1) / mask.sum(1), dim=-1)
