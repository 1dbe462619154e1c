"""Tasks that generate: trained on the tokens of the right answer, evaluated on written text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mezo.errors import InputError
from mezo.objectives.causal import Causal
from mezo.objectives.form import Feature, Form
from mezo.objectives.generation import Generation
from mezo.objectives.tokens import Tokens, tokenize
from mezo.tasks.task import Example


@dataclass(frozen=True, eq=False)
class Generated(Causal):
    """Training forces the first answer, as in the paper; `evaluate` has the model write.

    loss    mean of -log p over the batch's tokens of the task's completion after the prompt
    scores  (examples, 1), minus that mean for each example: there is one candidate, the answer

    A prompt must leave room for max_new_tokens. With truncate it is cut on the left, as in the
    paper's experiments, so that question and answer stay.
    """

    @property
    def generation(self) -> Generation:
        """How the model writes an answer: greedily, up to the task's stop."""
        return Generation(max_new_tokens=self.task.max_new_tokens, stop=self.task.stop)

    def _parts(self, example: Example, demonstrations: Sequence[Example]) -> list[tuple[str, str]]:
        if not example.answers:
            raise InputError(f"{example.origin or 'example'} has no answers")
        completion = self.task.completion_of(example)
        return [(self._prompt(example, demonstrations), completion)]

    def encode(self, example: Example, demonstrations: Sequence[Example] | None = None) -> Feature:
        """Encode as Causal.encode does, and add `prompt`: the tokens after which it writes."""
        shown = self.demonstrations if demonstrations is None else demonstrations
        feature = super().encode(example, shown)
        prompt = self._prompt(example, shown[feature["dropped"] :]).rstrip(" ")
        (tokens,) = tokenize(self.tokenizer, [prompt], [len(prompt) - 1], [len(prompt)])
        tokens = replace(tokens, ids=tokens.ids[: tokens.last], first=tokens.last)
        return feature | {"prompt": self._fit(tokens, example).ids}

    def _excess(self, tokens: Tokens) -> int:
        written = len(tokens.ids) - tokens.first
        return super()._excess(tokens) + max(0, self.task.max_new_tokens - written)

    def _refuse(self, length: int, example: Example) -> None:
        if not self.truncate:
            raise InputError(
                f"{example.origin or 'example'} takes {length} tokens with the "
                f"{self.task.max_new_tokens} that may be written, the limit is {self.max_length}; "
                "shorten it or pass truncate"
            )

    def _check_label(self, example: Example, candidates: int) -> None:
        pass  # the right candidate is the answer

    def collate(self, features: Sequence[Feature]):
        return super().collate([feature | {"label": 0} for feature in features])

    def calibrate(self, model: torch.nn.Module, kind: str = "content_free") -> Form:
        """Raise InputError: there are no candidates."""
        raise InputError(f"task {self.task.name} generates text: it has no scores to calibrate")
