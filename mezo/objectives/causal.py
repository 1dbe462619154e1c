"""Causal language models: candidates as continuations of the prompt."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import InputError
from ..low_rank import Both
from ..tasks.task import Example, fill
from .form import Batch, Feature, Form
from .tokens import Tokens, stack, tokenize

IGNORED = -100  # target of padding, torch's own ignore_index
SEPARATOR = "\n\n"  # between demonstrations, as in the paper's experiments


@dataclass(frozen=True, eq=False)
class Causal(Form):
    """Mean log-probability a token of each candidate after the prompt.

    Rows are what is read before the candidate's last token; candidates whose rows are equal, as
    all single tokens after one prompt, share a row. Padding is on the left: the tokens that are
    scored are last in each row.
    """

    objective: str = "candidates"  # or "tokens": -log p of the right candidate's tokens, their mean
    demonstrations: tuple[Example, ...] = ()

    def texts(self, example: Example) -> list[str]:
        return [p + c for p, c in self._parts(example, self.demonstrations)]

    def _parts(self, example: Example, demonstrations: Sequence[Example]) -> list[tuple[str, str]]:
        task, shown = self.task, ""
        for demonstration in demonstrations:
            fields = demonstration.fields
            right = fill(task.candidates[demonstration.label], fields)
            shown += fill(task.prompt, fields).lstrip() + right + SEPARATOR
        prompt = shown + fill(task.prompt, example.fields).lstrip()
        return [(prompt, fill(candidate, example.fields)) for candidate in task.candidates]

    def _tokens(self, example: Example, demonstrations: Sequence[Example]) -> list[Tokens]:
        parts = self._parts(example, demonstrations)
        texts = [prompt + candidate for prompt, candidate in parts]
        starts = [len(prompt) for prompt, _ in parts]
        rows = tokenize(self.tokenizer, texts, starts, [len(text) for text in texts])
        return [replace(row, ids=row.ids[: row.last]) for row in rows]  # no special token behind

    def encode(self, example: Example, demonstrations: Sequence[Example] | None = None) -> Feature:
        """As Form.encode. Demonstrations that do not fit are dropped, the first ones first.

        Returns: rows (token ids), for each candidate the index of its row and its target tokens,
        label, length, and dropped, the number of demonstrations left out.
        """
        shown = self.demonstrations if demonstrations is None else demonstrations

        def fits(dropped: int) -> bool:
            candidates = self._tokens(example, shown[dropped:])
            return max(len(tokens.ids) for tokens in candidates) <= self.max_length

        all_fit = not shown or fits(0)
        dropped = 0 if all_fit else bisect_left(range(len(shown)), True, key=fits)
        candidates = self._tokens(example, shown[dropped:])
        longest = max(candidates, key=lambda tokens: len(tokens.ids))
        excess = len(longest.ids) - len(self._fit(longest, example).ids)
        rows: dict[tuple[int, ...], int] = {}
        row, targets = [], []
        for tokens in (tokens.cut(excess) for tokens in candidates):  # as much of each
            if tokens.first == 0:
                raise InputError(f"{example.origin or 'example'}: nothing precedes the candidate")
            row.append(rows.setdefault(tuple(tokens.ids[:-1]), len(rows)))
            targets.append(tokens.ids[tokens.first :])
        feature = {"rows": list(rows), "row": row, "targets": targets, "label": example.label}
        return feature | {"length": len(longest.ids) - excess, "dropped": dropped}

    def collate(self, features: Sequence[Feature]) -> Batch:
        """labels (B,), input_ids and attention_mask (rows, T), row (B, K), targets (B, K, L)."""
        first, row = 0, []
        for feature in features:
            row.append([first + index for index in feature["row"]])
            first += len(feature["rows"])
        targets = stack([t for f in features for t in f["targets"]], IGNORED, "left")
        return {
            "labels": torch.tensor([feature["label"] for feature in features]),
            **self._pad([ids for feature in features for ids in feature["rows"]], "left"),
            "row": torch.tensor(row),
            "targets": targets.view(len(features), -1, targets.shape[-1]),
        }

    def in_context(self, model: torch.nn.Module, demonstrations: Sequence[Example]) -> Form:
        return replace(self, demonstrations=tuple(demonstrations))

    def _scores(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        log_probs = self._log_probs(model, batch)
        return log_probs.sum(-1) / (batch["targets"] != IGNORED).sum(-1)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if self.objective == "candidates":
            return super().loss(model, batch)
        right = self._right(batch)
        return _mean_loss(self._log_probs(model, right), right["targets"])

    def pair_loss(
        self, model: torch.nn.Module, batch: Batch, both: Both
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.objective == "candidates":
            return super().pair_loss(model, batch, both)
        right = self._right(batch)
        with both(len(right["input_ids"])):
            plus, minus = self._log_probs(model, self._double(right)).chunk(2)
        return _mean_loss(plus, right["targets"]), _mean_loss(minus, right["targets"])

    def _double(self, batch: Batch) -> Batch:
        doubled = super()._double(batch)
        doubled["row"][len(batch["row"]) :] += len(batch["input_ids"])  # the copy's rows
        return doubled

    def _right(self, batch: Batch) -> Batch:
        """The right candidates alone, each with a row of its own."""
        examples = torch.arange(len(batch["labels"]), device=batch["labels"].device)
        rows = batch["row"][examples, batch["labels"]]
        right = {key: batch[key][rows] for key in ("input_ids", "attention_mask")}
        return right | {"row": examples, "targets": batch["targets"][examples, batch["labels"]]}

    def _log_probs(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Of targets (..., L), read in row (...) of the batch; 0 for padding. float32."""
        row, targets, mask = (batch[key] for key in ("row", "targets", "attention_mask"))
        length = targets.shape[-1]
        optional = {
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),  # padding is on the left
            "logits_to_keep": length,
            "use_cache": False,  # memory of all keys and values, for nothing
        }
        optional = {key: value for key, value in optional.items() if key in self.accepts}
        output = model(input_ids=batch["input_ids"], attention_mask=mask, **optional)
        logits = output.logits[:, -length:]  # (rows, L, vocabulary)
        place = torch.arange(length, device=logits.device)
        chosen = logits[row[..., None], place, targets.clamp(min=0)].float()
        log_probs = chosen - logits.float().logsumexp(-1)[row]
        return log_probs.masked_fill(targets == IGNORED, 0.0)


def _mean_loss(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_probs.sum() / (targets != IGNORED).sum()
