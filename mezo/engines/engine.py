"""What MeZO asks of an inference engine: losses and texts at a point, an update, the weights.

    losses = engine.losses(batch, [Point(look=plus), Point(look=minus)])
    engine.apply(update)

An engine holds the weights and runs the model. It never sees a gradient, a rule or a run log: all
that a step does to weights arrives as moves (`noise.Move`), and the engine draws z for the tensors
that it holds. Directions, projected gradients, rules and the log stay with `MeZO`, so that the log
of an engine's run is an ordinary run log, which `mezo replay` rebuilds in plain transformers.

To write another engine, subclass `Engine` and write five methods; `pieces.Pieces` makes the moves
for any engine whose weights are torch tensors. tests/engines/fake.py is a complete example.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mezo.errors import InputError
from mezo.objectives.generation import Completion, Generation
from mezo.rewards import RewardFunctions, Sampled
from mezo.rewards.functions import Prompt

Names = tuple[str, ...]


class Change(NamedTuple):
    """Moves that are made to some of the trained tensors, in order."""

    names: Names
    moves: np.ndarray  # noise.table


@dataclass(frozen=True)
class Point:
    """A point at which an engine is asked for losses or texts.

    Attributes:
        walk: Changes that the weights take first, and keep: updates, and the walk of in-place
            directions. They are made once, in this order.
        look: Changes from there to the point. They are undone, to the bit, before anything else
            is asked; 16-bit weights are rounded stochastically on the way.
    """

    walk: tuple[Change, ...] = ()
    look: tuple[Change, ...] = ()


THETA = Point()  # the weights as they are


@dataclass(frozen=True)
class Query:
    """A text and the tokens in it whose log-probabilities are wanted.

    `asked` holds pairs (place, token): the wanted number is log p(token | ids[: place + 1]), and
    place is the index of the last token that is read for it. One row may ask for several tokens at
    one place, such as candidates of one token each.
    """

    ids: tuple[int, ...]
    asked: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.ids or not self.asked:
            raise InputError("a query needs at least one token to read and one to score")
        if not all(0 <= place < len(self.ids) for place, _ in self.asked):
            raise InputError(f"a query asks beyond its {len(self.ids)} tokens")


LogProbs = list[list[float]]  # by query, then in the order of `asked`


@dataclass(frozen=True)
class Batch:
    """Queries, and the loss that is made of their log-probabilities."""

    queries: tuple[Query, ...]
    loss: Callable[[LogProbs], float]


@dataclass(frozen=True)
class Run:
    """What an engine is told before the first step.

    Attributes:
        shapes: Name and shape of every trained tensor, with transformers' names.
        seed: The seed of all directions.
        distribution: The distribution of z.
    """

    shapes: Mapping[str, tuple[int, ...]]
    seed: int
    distribution: str


class Engine(ABC):
    """Weights and a model that runs with them. Every method may be called in any order after
    `begin`."""

    name: str
    tokenizer: Any

    @abstractmethod
    def begin(self, run: Run) -> None:
        """Prepare a run. Raises InputError, before any weight moves, for a tensor of the run that
        this engine does not hold, or holds in another form."""

    @abstractmethod
    def logprobs(self, queries: Sequence[Query], points: Sequence[Point]) -> list[LogProbs]:
        """Return the log-probabilities of all queries, for each point, in float32 or better."""

    @abstractmethod
    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        points: Sequence[Point],
        generation: Generation,
        draw: int = 0,
    ) -> list[list[Completion]]:
        """Return one completion per prompt, for each point.

        Sampling depends on (generation.seed, draw, row) and not on the point, so that two points
        differ by their weights alone; how far that holds is the engine's to say.
        """

    @abstractmethod
    def apply(self, update: Sequence[Change]) -> None:
        """Make changes that the weights keep."""

    @abstractmethod
    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Yield the name and value of every trained tensor, whole, on the CPU."""

    def take(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Set trained tensors to these values, as when a run goes on. Optional."""
        raise InputError(f"engine {self.name} takes no weights: load the model that the run is at")

    def losses(self, batch: Batch, points: Sequence[Point]) -> list[float]:
        """Return the loss of a batch at each point."""
        return [batch.loss(found) for found in self.logprobs(batch.queries, points)]

    def rewards(
        self,
        prompts: Sequence[Prompt],
        points: Sequence[Point],
        generation: Generation,
        judge: RewardFunctions,
        *,
        tokens: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        draw: int = 0,
        trainer_state: Any = None,
    ) -> list[Sampled]:
        """Return texts and their rewards for each point. `tokens` are the prompts' own."""
        written = self.texts(tokens, points, generation, draw)
        return [
            Sampled(list(prompts), made, judge(prompts, made, columns, trainer_state=trainer_state))
            for made in written
        ]

    def close(self) -> None:  # noqa: B027  # most engines hold nothing that Python does not free
        """Free what the engine holds; it cannot be used afterwards."""


def token_batch(rows: Iterable[tuple[Sequence[int], int]]) -> Batch:
    """Return a batch whose loss is the mean of -log p over tokens.

    Each row is (ids, first): the tokens ids[first:] are scored, and first is at least 1.
    """
    queries = []
    for ids, first in rows:
        if not 1 <= first < len(ids):
            raise InputError(f"first must be in [1, {len(ids) - 1}] for {len(ids)} tokens")
        asked = tuple((at - 1, int(ids[at])) for at in range(first, len(ids)))
        queries.append(Query(tuple(ids[:-1]), asked))
    return Batch(tuple(queries), mean_of_tokens)


def mean_of_tokens(found: LogProbs) -> float:
    """Return minus the mean of all log-probabilities."""
    return -math.fsum(x for row in found for x in row) / sum(map(len, found))
