"""Causal language models: candidates as continuations of the prompt."""

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mezo.closures import Both, copies, repeated
from mezo.errors import InputError
from mezo.models.modes import Batch, evaluating, to_device, unwrap
from mezo.objectives.form import Feature, Form
from mezo.objectives.packing import IGNORED, apart, pack, packed_inputs, reach, repeat_rows, spread
from mezo.objectives.tokens import Tokens, tokenize
from mezo.tasks.task import Example, fields_of, fill

SEPARATOR = "\n\n"  # between demonstrations, as in the paper's experiments
NEUTRAL = "neutral_"  # before the names of tensors of the prompt that a calibrated form subtracts


@dataclass(frozen=True, eq=False)
class Causal(Form):
    """The score is the mean log-probability of a candidate's tokens after the prompt.

    The model reads everything before the candidate's last token. Candidates whose rows are equal,
    such as single tokens after one prompt, share a row. Others share the tokens that their rows
    begin with, where the model can (packing.py). Padding is on the left, so that the tokens that
    are scored are the last ones of each row.
    """

    objective: str = "candidates"  # or "tokens": -log p of the right candidate's tokens, their mean
    demonstrations: tuple[Example, ...] = ()
    share: int = 0  # longest row that may share its beginning with another; 0: none
    whole: bool = True  # demonstrations that do not fit are dropped; False: they are cut
    normalised: bool = True  # the mean over a candidate's tokens; False: their sum
    neutral: "Causal | None" = None  # its scores are subtracted, example by example

    def texts(self, example: Example) -> list[str]:
        return [p + c for p, c in self._parts(example, self.demonstrations)]

    def _parts(self, example: Example, demonstrations: Sequence[Example]) -> list[tuple[str, str]]:
        """Return prompt and continuation for each candidate."""
        prompt = self._prompt(example, demonstrations)
        return [(prompt, candidate) for candidate in self.task.candidates_of(example)]

    def _prompt(self, example: Example, demonstrations: Sequence[Example]) -> str:
        task, shown = self.task, ""
        for one in demonstrations:
            shown += (fill(task.prompt, one.fields).lstrip() + task.completion_of(one)).strip()
            shown += SEPARATOR
        return shown + fill(task.prompt, example.fields).lstrip()

    def _tokens(self, example: Example, demonstrations: Sequence[Example]) -> list[Tokens]:
        parts = self._parts(example, demonstrations)
        texts = [prompt + candidate for prompt, candidate in parts]
        starts = [len(prompt) for prompt, _ in parts]
        rows = tokenize(self.tokenizer, texts, starts, [len(text) for text in texts])
        return [
            replace(row, ids=row.ids[: row.last]) for row in rows
        ]  # no special token at the end

    def encode(self, example: Example, demonstrations: Sequence[Example] | None = None) -> Feature:
        """Encode as Form.encode does; demonstrations that do not fit are dropped, the first first.

        Returns rows (token ids), the index of each candidate's row and its target tokens, label,
        length, and `dropped`, the number of demonstrations left out.
        """
        shown = self.demonstrations if demonstrations is None else demonstrations
        dropped = self._dropped(example, shown)
        candidates = self._tokens(example, shown[dropped:])
        self._check_label(example, len(candidates))
        longest = max(candidates, key=self._excess)
        excess = len(longest.ids) - len(self._fit(longest, example).ids)
        rows: dict[tuple[int, ...], int] = {}
        row, targets = [], []
        for tokens in (tokens.cut(excess) for tokens in candidates):  # as much of each
            if tokens.first == 0:
                raise InputError(f"{example.origin or 'example'}: nothing precedes the candidate")
            row.append(rows.setdefault(tuple(tokens.ids[:-1]), len(rows)))
            targets.append(tokens.ids[tokens.first :])
        feature = {"rows": list(rows), "row": row, "targets": targets, "label": example.label}
        accepted = [example.is_right(k) for k in range(len(candidates))]
        if sum(accepted) > 1:
            feature["right"] = accepted
        if self.neutral is not None:
            feature["neutral"] = self.neutral.encode(example)
        return feature | {"length": len(longest.ids) - excess, "dropped": dropped}

    def _dropped(self, example: Example, shown: Sequence[Example]) -> int:
        """Return how many of the demonstrations do not fit."""

        def fits(dropped: int) -> bool:
            return max(map(self._excess, self._tokens(example, shown[dropped:]))) <= 0

        all_fit = not shown or not self.whole or fits(0)
        return 0 if all_fit else bisect_left(range(len(shown)), True, key=fits)

    def _check_label(self, example: Example, candidates: int) -> None:
        if not 0 <= example.label < candidates:
            where = example.origin or "example"
            raise InputError(
                f"{where}: label {example.label} is not one of {candidates} candidates"
            )

    def collate(self, features: Sequence[Feature]) -> Batch:
        """Return labels (B,) and what `pack` makes of rows with a common beginning, or
        else `spread`."""
        rows, row, targets = ([f[key] for f in features] for key in ("rows", "row", "targets"))
        longest = max(len(one) for own in rows for one in own)
        several = any(len(own) > 1 for own in rows)
        layout = pack if several and longest <= self.share else spread
        batch = {"labels": torch.tensor([feature["label"] for feature in features])}
        batch |= layout(rows, row, targets, self.tokenizer.pad_token_id or 0)
        if any("right" in feature for feature in features):
            batch["right"] = _right_of(features, batch["row"].shape[1])
        if self.neutral is not None:
            neutral = self.neutral.collate([feature["neutral"] for feature in features])
            batch |= {NEUTRAL + key: value for key, value in neutral.items()}
        return batch

    def in_context(self, model: torch.nn.Module, demonstrations: Sequence[Example]) -> Form:
        return replace(self, demonstrations=tuple(demonstrations))

    def calibrate(self, model: torch.nn.Module, kind: str = "content_free") -> Form:
        """Calibrate as Form.calibrate does, or by surface-form competition with kind="sfc".

        For "sfc" (Holtzman et al., 2021) the score is log p(candidate | prompt) - log p(candidate |
        the task's sfc_prompt), summed over tokens, so that a candidate that is likely after any
        text has no advantage. For an example's own candidates, the subtracted scores are computed
        with each batch, with the weights of that moment. The form's present demonstrations precede
        both prompts.
        """
        task = self.task
        if kind == "sfc":
            prompt = task.sfc_prompt
        elif kind == "content_free":
            prompt = fill(task.prompt, dict.fromkeys(task.columns, ""))
            prompt = prompt.replace("{", "{{").replace("}", "}}")
        else:
            raise InputError(f"kind of calibration must be content_free or sfc, got {kind!r}")
        plain = replace(self, offsets=None, neutral=None, normalised=kind != "sfc")
        neutral = replace(plain, task=replace(task, prompt=prompt))
        named = [name for text in (prompt, *task.candidates) for name in fields_of(text)]
        if named or task.kind == "multiple_choice":
            return replace(plain, neutral=neutral)
        empty = Example(dict.fromkeys(task.columns, ""), 0, f"the {kind} prompt of {task.name}")
        feature = neutral.encode(empty)
        with evaluating(model):
            scores = neutral.scores(model, to_device(neutral.collate([feature]), model))
        return replace(plain, offsets=scores[0])

    def _scores(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        scores = self._means(self._log_probs(model, batch), batch["targets"])
        if self.neutral is None:
            return scores
        return _less(scores, self.neutral.scores(model, _neutral(batch)))

    def pair_scores(self, model: torch.nn.Module, batch: Batch, both: Both) -> Sequence:
        batch = self._layout(model, batch)
        times = copies(both)
        with both(len(batch["input_ids"])):
            whole = self._repeated(batch, times)
            parts = self._means(self._log_probs(model, whole), whole["targets"]).chunk(times)
        if self.neutral is None:
            return parts
        neutral = self.neutral.pair_scores(model, _neutral(batch), both)
        return [_less(one, other) for one, other in zip(parts, neutral, strict=True)]

    def _means(self, log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the means (B, K) of (B, K, L), and -inf where an example has fewer candidates."""
        numbers = (targets != IGNORED).sum(-1)
        scores = log_probs.sum(-1)
        scores = scores / numbers.clamp(min=1) if self.normalised else scores
        return scores.masked_fill(numbers == 0, -torch.inf)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if self.objective == "candidates":
            return super().loss(model, batch)
        right = self._right(batch)
        return _mean_loss(self._log_probs(model, right), right["targets"])

    def pair_loss(self, model: torch.nn.Module, batch: Batch, both: Both) -> list[torch.Tensor]:
        if self.objective == "candidates":
            return super().pair_loss(model, batch, both)
        right, times = self._right(batch), copies(both)
        with both(len(right["input_ids"])):
            parts = self._log_probs(model, self._repeated(right, times)).chunk(times)
        return [_mean_loss(part, right["targets"]) for part in parts]

    def _repeated(self, batch: Batch, times: int) -> Batch:
        batch = {key: value for key, value in batch.items() if not key.startswith(NEUTRAL)}
        return repeat_rows(repeated(batch, times), batch, times)

    def _layout(self, model: torch.nn.Module, batch: Batch) -> Batch:
        """Return plain rows instead of packed ones if peft has put a prompt in front meanwhile."""
        if "branch" not in batch or not _prompted(model):
            return batch
        rest = {k: v for k, v in batch.items() if k not in ("branch", "rows", "place")}
        return rest | apart(batch)

    def _right(self, batch: Batch) -> Batch:
        """Return the right candidates alone, each with a row of its own."""
        examples = torch.arange(len(batch["labels"]), device=batch["labels"].device)
        rows = batch["row"][examples, batch["labels"]]
        if "branch" in batch:
            right = apart(batch, rows)
        else:
            right = {key: batch[key][rows] for key in ("input_ids", "attention_mask")}
        return right | {"row": examples, "targets": batch["targets"][examples, batch["labels"]]}

    def _log_probs(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return float32 log-probabilities of targets (..., L), read in row (...); 0
        for padding."""
        batch = self._layout(model, batch)
        row, targets, mask = (batch[key] for key in ("row", "targets", "attention_mask"))
        length = targets.shape[-1]
        read: dict[str, Any]
        if "branch" in batch:
            read = packed_inputs(batch, _computed_in(model, mask.device))
            row = torch.arange(len(row), device=row.device)[:, None]
            length = batch["branch"].shape[1]
            place = batch["place"] + length
        else:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)  # padding is on the left
            read = {"input_ids": batch["input_ids"], "attention_mask": mask}
            read["position_ids"] = positions
            place = torch.arange(length, device=mask.device)
        # an unused cache would take the memory of all keys and values
        read |= {"logits_to_keep": length, "use_cache": False}
        known = self.accepts | {"input_ids", "attention_mask"}
        output = model(**{key: value for key, value in read.items() if key in known})
        logits = output.logits[:, -length:]  # (rows, length, vocabulary)
        chosen = logits[row[..., None], place, targets.clamp(min=0)].float()
        log_probs = chosen - logits.float().logsumexp(-1)[row[..., None], place]
        return log_probs.masked_fill(targets == IGNORED, 0.0)

    def branches(self) -> bool:
        """Return whether an example's rows may differ; they do not if all candidates
        are one token."""
        if self.task.kind != "classification" or any(map(fields_of, self.task.candidates)):
            return True
        fields = dict.fromkeys(self.task.columns, "x")
        return len({tuple(t.ids[:-1]) for t in self._tokens(Example(fields), ())}) > 1

    def shared(self, model: torch.nn.Module) -> "Causal":
        """Return this form with shared prompts, as far as the model is seen to compute them
        correctly.

        On two short examples, the log-probabilities of packed rows are compared with those of plain
        rows, and with those of packed rows read as if they were plain.
        """
        if _prompted(model):
            return replace(self, share=0)
        bound = reach(unwrap(model).config) or self.max_length
        form = replace(self, share=self.max_length)
        try:
            ratio = form._misread(model)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            logging.getLogger("mezo").debug("one row a candidate: %s", error)
            return replace(self, share=0)
        tolerance = 0.2 if _computed_in(model, torch.device("cpu")).itemsize == 2 else 0.01
        return replace(self, share=min(bound, self.max_length) if ratio <= tolerance else 0)

    def _misread(self, model: torch.nn.Module) -> float:
        """Return how far off packed rows are, as a share of how far off they would be unmasked."""
        size = unwrap(model).config.get_text_config().vocab_size
        tokens: list[int] = [(17 + 31 * i) % size for i in range(10)]
        rows = [[tuple(tokens[:n] + tokens[n : n + 2]), (*tokens[:n], *tokens[7:])] for n in (3, 5)]
        targets = [[list(row[-2:]) for row in own] for own in rows]
        with evaluating(model):
            made = (layout(rows, [[0, 1]] * 2, targets, 0) for layout in (pack, spread))
            packed, plain = (to_device(batch, model) for batch in made)
            expected = self._log_probs(model, plain)
            found = self._log_probs(model, packed)
            naive = packed | {"branch": torch.full_like(packed["branch"], -1)}
            unmasked = self._log_probs(model, naive)
        real = plain["targets"] != IGNORED
        off, worst = ((x - expected)[real].norm() for x in (found, unmasked))
        return float(off / worst)


def _computed_in(model: torch.nn.Module, device: torch.device) -> torch.dtype:
    """Return the dtype of attention's queries: autocast's, or that of the first
    floating weights."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _prompted(model: torch.nn.Module) -> bool:
    """Return whether peft puts tokens of its own in front; it knows two-dimensional masks alone."""
    configs = getattr(model, "peft_config", {})
    return any(config.is_prompt_learning for config in configs.values())


def _right_of(features: Sequence[Feature], most: int) -> torch.Tensor:
    """Return which candidates are right, (B, K) booleans, where an example has several."""
    right = torch.zeros(len(features), most, dtype=torch.bool)
    for row, feature in zip(right, features, strict=True):
        accepted = feature.get("right")
        if accepted is None:
            row[feature["label"]] = True
        else:
            row[: len(accepted)] = torch.tensor(accepted)
    return right


def _neutral(batch: Batch) -> Batch:
    return {k.removeprefix(NEUTRAL): v for k, v in batch.items() if k.startswith(NEUTRAL)}


def _less(scores: torch.Tensor, neutral: torch.Tensor) -> torch.Tensor:
    """Return scores - neutral, and -inf where there is no candidate."""
    return (scores - neutral).masked_fill(scores == -torch.inf, -torch.inf)


def _mean_loss(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_probs.sum() / (targets != IGNORED).sum()
