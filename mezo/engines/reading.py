"""An engine reads what an evaluation asks: `evaluate(..., reader=EngineReader(engine))`."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from mezo.engines.engine import THETA, Engine, Query
from mezo.errors import InputError
from mezo.objectives import Feature
from mezo.objectives.causal import Causal
from mezo.objectives.progress import SILENT, Progress


class EngineReader:
    """Scores of candidates and written answers, from an engine's weights as they are."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def score(
        self,
        form: Any,
        features: Sequence[Feature],
        batch_size: int = 32,
        progress: Progress = SILENT,
    ) -> torch.Tensor:
        """Return scores (features, candidates), -inf for a candidate that an example lacks.

        Raises InputError for a form that is not of a causal model, or is calibrated example by
        example.
        """
        if not isinstance(form, Causal) or form.neutral is not None:
            raise InputError(
                f"engine {self.engine.name} scores candidates of causal models, with a calibration "
                "that is the same for all examples or none"
            )
        widest = max(len(feature["targets"]) for feature in features)
        found = torch.full((len(features), widest), -math.inf)
        for start in progress.over(range(0, len(features), batch_size), "evaluation batch"):
            chosen = features[start : start + batch_size]
            for i, scores in enumerate(self._scores(form, chosen), start):
                found[i, : len(scores)] = torch.tensor(scores)
        return found if form.offsets is None else found - form.offsets.cpu()

    def _scores(self, form: Causal, features: Sequence[Feature]) -> list[list[float]]:
        queries = []
        for feature in features:
            asked: list[list[tuple[int, int]]] = [[] for _ in feature["rows"]]
            for row, target in zip(feature["row"], feature["targets"], strict=True):
                first = len(feature["rows"][row]) - len(target)
                asked[row] += [(first + j, int(token)) for j, token in enumerate(target)]
            rows = zip(feature["rows"], asked, strict=True)
            queries += [Query(tuple(ids), tuple(own)) for ids, own in rows]
        answers = iter(self.engine.logprobs(queries, [THETA])[0])
        found = []
        for feature in features:
            read = [iter(next(answers)) for _ in feature["rows"]]
            scores = []
            for row, target in zip(feature["row"], feature["targets"], strict=True):
                total = math.fsum(next(read[row]) for _ in target)
                scores.append(total / len(target) if form.normalised else total)
            found.append(scores)
        return found

    def write(
        self,
        form: Any,
        features: Sequence[Feature],
        batch_size: int = 32,
        progress: Progress = SILENT,
    ) -> list[str]:
        """Return what the engine writes after each prompt, greedily, up to the task's stop."""
        prompts = [feature["prompt"] for feature in features]
        (made,) = self.engine.texts(prompts, [THETA], form.generation)
        return [completion.text.strip() for completion in made]
