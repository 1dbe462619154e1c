"""Call reward functions as TRL's GRPOTrainer does, and check what they return.

    f(prompts=, completions=, completion_ids=, **columns, trainer_state=, log_extra=, log_metric=)

    reward(sample) = sum over functions of weight * f(sample), without those that return None

Completions are texts or, if the prompts are conversations, conversations of one message:
[{"role": "assistant", "content": text}]. The columns are the data set's other columns, a list each.
All `async def` functions run concurrently in one event loop, which lives as long as they do.
"""

import asyncio
import functools
import inspect
import math
import numbers
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mezo.errors import InputError
from mezo.objectives.generation import Completion

RewardFunc = Callable[..., Any]  # returns list[float | None], or a coroutine that does
Prompt = str | Sequence[Mapping[str, Any]]  # a text, or a conversation
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch of completions."""

    per_function: dict[str, list[float | None]]
    total: list[float | None]  # weighted sums; None if every function left the sample out
    extra: dict[str, list[Any]] = field(default_factory=dict)  # from log_extra: column -> values
    metrics: dict[str, list[float]] = field(default_factory=dict)  # from log_metric

    @property
    def mean(self) -> float:
        """The mean over samples with a reward, or nan; it is exact, whatever their order."""
        scored = [value for value in self.total if value is not None]
        return math.fsum(scored) / len(scored) if scored else math.nan


class RewardFunctions:
    """One or several reward functions with weights, called as one.

    Creating it raises InputError for an object that is not a function and for a wrong number of
    weights. Calling it raises InputError if a function takes other arguments, returns a wrong
    number of rewards, or returns a reward that is not a finite number or None.
    """

    def __init__(
        self,
        functions: RewardFunc | Sequence[RewardFunc],
        weights: Sequence[float] | None = None,
    ):
        given = [functions] if callable(functions) or isinstance(functions, str) else functions
        self.functions = list(given)
        if not self.functions:
            raise InputError("reward_funcs is empty: give at least one function")
        for f in self.functions:
            _check_function(f)
        self.names = _distinct([name_of(f) for f in self.functions])
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(self.weights) != len(self.functions):
            raise InputError(
                f"{len(self.weights)} reward weights for {len(self.functions)} reward functions"
            )
        self._loop = _Loop()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        trainer_state: Any = None,
    ) -> Scores:
        """Score a batch, with one reward per completion and function."""
        if not prompts:
            raise InputError("there are no prompts to score")
        extra: dict[str, list[Any]] = defaultdict(list)
        metrics: dict[str, list[float]] = defaultdict(list)
        texts = [completion.text for completion in completions]
        talk = [[{"role": "assistant", "content": text}] for text in texts]
        given: dict[str, Any] = dict(_columns(columns or {}, len(prompts)))
        given |= {
            "prompts": list(prompts),
            "completions": talk if is_conversation(prompts[0]) else texts,
            "completion_ids": [list(completion.ids) for completion in completions],
            "trainer_state": trainer_state,
            "log_extra": lambda column, values: extra[column].extend(values),
            "log_metric": lambda name, value: metrics[name].append(float(value)),
        }
        returned = [self._call(i, given) for i in range(len(self.functions))]
        returned = self._loop.await_all(returned)
        per_function = {
            name: checked(name, values, len(prompts))
            for name, values in zip(self.names, returned, strict=True)
        }
        rows = list(zip(*per_function.values(), strict=True))
        return Scores(per_function, [self._weighted(row) for row in rows], extra, metrics)

    def _call(self, i: int, given: dict[str, Any]) -> Any:
        f = self.functions[i]
        try:
            inspect.signature(f).bind(**given)
        except TypeError as error:
            raise InputError(
                f"reward function {self.names[i]}: {error}; it is called with "
                f"{', '.join(given)}: let it take **kwargs, and no column that the data lacks"
            ) from None
        except ValueError:
            pass  # of a function without a signature, written in C
        return f(**given)

    def _weighted(self, row: Sequence[float | None]) -> float | None:
        pairs = zip(self.weights, row, strict=True)
        parts = [weight * value for weight, value in pairs if value is not None]
        return math.fsum(parts) if parts else None


def is_conversation(prompt: Prompt) -> bool:
    """Return whether a prompt is a list of messages rather than a text."""
    return not isinstance(prompt, str)


def name_of(f: RewardFunc) -> str:
    """Return TRL's name for it in logs: the function's name, or a callable object's class."""
    while isinstance(f, functools.partial):
        f = f.func
    return str(getattr(f, "__name__", type(f).__name__))


def checked(name: str, returned: Any, count: int) -> list[float | None]:
    """Return one float or None per completion. Raises InputError that names the function."""
    try:
        values = list(returned)
    except TypeError:
        kind = type(returned).__name__
        raise InputError(
            f"reward function {name} returned a {kind}: it must return a list, one reward a "
            "completion"
        ) from None
    if len(values) != count:
        raise InputError(
            f"reward function {name} returned {len(values)} rewards for {count} completions"
        )
    return [None if value is None else _number(name, i, value) for i, value in enumerate(values)]


def _number(name: str, i: int, value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, numbers.Real | np.bool_):
        kind = type(value).__name__
        raise InputError(
            f"reward function {name} returned {value!r}, a {kind}, for completion {i}: "
            "a reward is a number, or None for a sample to leave out"
        )
    if not math.isfinite(float(value)):
        raise InputError(
            f"reward function {name} returned {value} for completion {i}: return None for a "
            "sample to leave out"
        )
    return float(value)


def _check_function(f: Any) -> None:
    if isinstance(f, str):
        raise InputError(f"{f!r} is no reward function: rewards.resolve makes one of it")
    if isinstance(f, torch.nn.Module):
        raise InputError(
            f"the reward model {type(f).__name__} is no reward function: write one that tokenises "
            "prompts and completions and returns the model's scores"
        )
    if not callable(f):
        raise InputError(f"a reward function must be callable, got {f!r}")


def _distinct(names: list[str]) -> list[str]:
    """Append a number to repeated names, which become columns of the logs."""
    return [
        name if names.index(name) == i else f"{name}_{names[:i].count(name) + 1}"
        for i, name in enumerate(names)
    ]


def _columns(columns: Mapping[str, Sequence[Any]], count: int) -> Mapping[str, Sequence[Any]]:
    for name, values in columns.items():
        if name in _GIVEN:
            raise InputError(f"the column {name!r} has the name of an argument: rename it")
        if len(values) != count:
            raise InputError(f"the column {name!r} has {len(values)} values for {count} prompts")
    return columns


class _Loop:
    """An event loop in its own thread, since the caller may already run one (in a notebook)."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._runner: asyncio.Runner | None = (
            None  # one for all calls, as clients are bound to their loop
        )

    def await_all(self, returned: list[Any]) -> list[Any]:
        """Return the values, after awaiting all awaitable ones together."""
        pending = {i: x for i, x in enumerate(returned) if inspect.isawaitable(x)}
        if not pending:
            return returned
        if self._thread is None:
            self._thread, self._runner = ThreadPoolExecutor(1, "mezo-rewards"), asyncio.Runner()
            closing = weakref.finalize(self, self._thread.submit, self._runner.close)
            closing.atexit = False  # threads take no more work then
        assert self._runner is not None
        done = self._thread.submit(self._runner.run, _gather(list(pending.values()))).result()
        found = dict(zip(pending, done, strict=True))
        return [found.get(i, x) for i, x in enumerate(returned)]


async def _gather(pending: list[Awaitable]) -> list[Any]:
    return list(await asyncio.gather(*pending))
