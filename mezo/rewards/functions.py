"""Calling reward functions, in the way of TRL's GRPOTrainer, and checking what they return.

    f(prompts=, completions=, completion_ids=, **columns, trainer_state=, log_extra=, log_metric=)

    reward(sample) = sum over functions of weight * f(sample), of those that did not return None

completions are texts, or, where the prompts are conversations, conversations of one message:
[{"role": "assistant", "content": text}]. columns are the data set's other columns, a list each.
An `async def` runs beside the other async ones, in one event loop that lives as long as they do.
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

RewardFunc = Callable[..., Any]  # -> list[float | None], or a coroutine of it
Prompt = str | Sequence[Mapping[str, Any]]  # a text, or a conversation
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True)
class Scores:
    """What the functions said of a batch of completions."""

    per_function: dict[str, list[float | None]]
    total: list[float | None]  # weighted sum; None where every function left the sample out
    extra: dict[str, list[Any]] = field(default_factory=dict)  # of log_extra: column -> values
    metrics: dict[str, list[float]] = field(default_factory=dict)  # of log_metric

    @property
    def mean(self) -> float:
        """Of the samples that have a reward; nan if none has. Exact, so that its order is none."""
        scored = [value for value in self.total if value is not None]
        return math.fsum(scored) / len(scored) if scored else math.nan


class RewardFunctions:
    """One or several reward functions with weights, called as one.

    Raises InputError, when it is made, for what is no function or a wrong number of weights; when
    it is called, for a function that takes other arguments, or returns another number of rewards
    than completions, a reward that is nan or infinite, or one that is no number.
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
        """Score a batch: one reward a completion and function."""
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
    """Whether a prompt is a list of messages rather than a text."""
    return not isinstance(prompt, str)


def name_of(f: RewardFunc) -> str:
    """As TRL names it in the logs: the function's name, a callable object's class."""
    while isinstance(f, functools.partial):
        f = f.func
    return str(getattr(f, "__name__", type(f).__name__))


def checked(name: str, returned: Any, count: int) -> list[float | None]:
    """One float or None a completion. InputError that names the function."""
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
    """A number behind every name that occurs again: they are the columns of the logs."""
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
    """An event loop in a thread of its own: the caller may be in a loop already (a notebook)."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._runner: asyncio.Runner | None = None  # one for all calls: clients are bound to it

    def await_all(self, returned: list[Any]) -> list[Any]:
        """The values, those that are awaitable awaited together."""
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
