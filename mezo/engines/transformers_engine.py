"""transformers as an engine: the model is in this process, and torch runs it.

It is what a plain run uses, where the optimizer moves the model's weights itself and every question
is asked at `THETA`. With `attach` it is the reference that other engines are compared with.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mezo import noise
from mezo.engines.engine import Change, Engine, LogProbs, Point, Query, Run
from mezo.engines.pieces import Piece, Pieces
from mezo.errors import InputError
from mezo.models.modes import evaluating
from mezo.objectives.generation import Completion, Generation, generate
from mezo.objectives.tokens import stack


class TransformersEngine(Engine):
    """A causal language model of transformers, and its tokenizer."""

    name = "transformers"

    def __init__(self, model: torch.nn.Module, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.pieces: Pieces | None = None

    def begin(self, run: Run) -> None:
        named = {noise.canonical_name(name): p for name, p in self.model.named_parameters()}
        for name, shape in run.shapes.items():
            if name not in named or tuple(named[name].shape) != shape:
                raise InputError(f"engine transformers holds no parameter {name} of shape {shape}")
        own = [
            Piece(name, shape, (0,) * len(shape), named[name].detach())
            for name, shape in run.shapes.items()
        ]
        self.pieces = Pieces(own, run.seed, run.distribution)

    def logprobs(self, queries: Sequence[Query], points: Sequence[Point]) -> list[LogProbs]:
        return [self._at(point, queries) for point in points]

    @torch.no_grad()
    def _at(self, point: Point, queries: Sequence[Query]) -> LogProbs:
        self._go(point)
        rows = [query.ids for query in queries]
        device = next(self.model.parameters()).device
        ids = stack(rows, 0, "right").to(device)
        mask = stack([[1] * len(row) for row in rows], 0, "right").to(device)
        with evaluating(self.model):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = []
        for query, of_row in zip(queries, logits, strict=True):
            places, tokens = torch.tensor(query.asked, device=device).T
            read = of_row[places].float()
            chosen = read.gather(1, tokens[:, None])[:, 0] - read.logsumexp(-1)
            found.append(chosen.tolist())
        return found

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        points: Sequence[Point],
        generation: Generation,
        draw: int = 0,
    ) -> list[list[Completion]]:
        """As Engine.texts: the same noise at every point, to the bit (objectives/generation.py)."""
        found = []
        for point in points:
            self._go(point)
            found.append(generate(self.model, self.tokenizer, prompts, generation, draw=draw))
        return found

    def apply(self, update: Sequence[Change]) -> None:
        self._begun().apply(update)

    @torch.no_grad()
    def take(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        theta = {piece.name: piece.view for piece in self._begun().home()}
        self._begun().forget()
        for name, value in weights:
            theta[name].copy_(value)

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        for piece in self._begun().home():
            yield piece.name, piece.view.cpu()

    def _go(self, point: Point) -> None:
        if self.pieces is not None or point != Point():
            self._begun().go(point)

    def _begun(self) -> Pieces:
        if self.pieces is None:
            raise InputError("engine transformers: begin(run) comes before its weights move")
        return self.pieces
