"""What `MeZO.step` takes: a function of no arguments whose value is the loss of one batch.

optimizer.step(lambda: model(**batch).loss)
optimizer.step(Mean(lambda: model(**batch).loss, examples))   # batches of unequal sizes
optimizer.step(Paired(alone, halves))                         # low rank: one pass, both losses
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mezo.errors import InputError
from mezo.interrupts import released

Closure = Callable[[], float | torch.Tensor]  # the loss of one forward pass
Both = Callable[[int], AbstractContextManager[None]]  # LowRank.both, FullRank.both


@dataclass(frozen=True)
class Mean:
    """A closure whose loss is the mean over so many examples (or tokens): its weight in a mean.

        optimizer.step(Mean(lambda: model(**batch).loss, len(batch["labels"])))

    For batches of unequal sizes: of several processes, or of several estimates of one direction.
    """

    closure: Closure
    examples: float

    def __call__(self) -> float | torch.Tensor:
        return self.closure()


@dataclass(frozen=True)
class Paired:
    """A closure that can have both losses from one forward pass, over the batch and its copy.

        def halves(both):
            with both(batch_size=16):
                losses = per_example(model, double(batch))  # (32,)
            return losses[:16].mean(), losses[16:].mean()  # of theta + eps z, of theta - eps z

        optimizer.step(Paired(lambda: per_example(model, batch).mean(), halves))

    `both` is `LowRank.both` or `FullRank.both`. Where the model cannot be stacked, the closure is
    `alone`. A run's first step calls each of them some times more, to compare. `full_rank` says
    whether directions of full rank (scratch) take one pass, too; by default they do on a GPU.
    """

    alone: Callable[[], float | torch.Tensor]
    halves: Callable[[Both], tuple[float | torch.Tensor, float | torch.Tensor]]
    full_rank: bool | None = None

    def __call__(self) -> float | torch.Tensor:
        return self.alone()


def double(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch and its copy behind it: every tensor twice along its first dimension."""
    return {
        key: torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.dim() else x
        for key, x in batch.items()
    }


class Loss:
    """A closure as estimators call it: it returns a float, and Ctrl-C may end it.

    One is made for each batch: L(theta), which some estimators need, is measured once for all
    directions that are asked about it.
    """

    def __init__(
        self,
        closure: Closure,
        around: Callable[[Closure], Closure] | None = None,
        common: bool = False,
    ):
        """`common`: all calls see the same draws of the default generators (`Draws`).

        Raises InputError for what cannot be called.
        """
        if not callable(closure):
            raise InputError(
                f"step takes a function that computes the loss, not a {type(closure).__name__}: "
                "optimizer.step(lambda: model(**batch).loss)"
            )
        self.examples = closure.examples if isinstance(closure, Mean) else 1.0
        self.closure = closure.closure if isinstance(closure, Mean) else closure
        self.paired = self.closure if isinstance(self.closure, Paired) else None
        if around is not None:
            self.closure, self.paired = around(self.closure), None
        self.home: float | None = None  # L(theta), once it is known
        self.draws = Draws() if common else None

    def __call__(self) -> float:
        if self.draws is not None:
            return number(self.raw())
        with released():
            found = self.closure()
            one = isinstance(found, torch.Tensor) and found.numel() == 1
            # a number from the device: the only two syncs of a step
            return float(found) if one else number(found)

    def raw(self) -> Any:
        """What the closure returns."""
        with self.draws.repeated() if self.draws else nullcontext(), released():
            return self.closure()

    def halves(self, both: Both) -> tuple[float, float]:
        """The losses of both sides from one forward pass, of a Paired closure."""
        assert self.paired is not None
        with self.draws.repeated() if self.draws else nullcontext(), released():
            plus, minus = self.paired.halves(both)
            return number(plus), number(minus)


class Draws:
    """The default random generators of torch (the CPU's, the devices'), numpy and Python.

    A generator that the closure makes for itself is not among them.
    """

    def __init__(self) -> None:
        self._start: list[Any] | None = None

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """What is done within draws what it drew the first time.

        Afterwards the generators are where the first time left them: they have moved on by one
        pass, however many there were.
        """
        if self._start is None:
            self._start = _states()
            yield
            return
        with _kept():
            _set_states(self._start)
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Afterwards the generators are as they were before."""
        self._start = _states()
        with _kept():
            yield

    def drew(self) -> bool:
        """Within `kept`: has any of the generators been drawn from?"""
        return any(map(_differ, self._start or (), _states()))


@contextmanager
def _kept() -> Iterator[None]:
    before = _states()
    try:
        yield
    finally:
        _set_states(before)


def _states() -> list[Any]:
    """Of Python, numpy and torch; the devices' come last, if a device was used."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    if torch.backends.mps.is_available():
        devices = [torch.mps.get_rng_state()]
    return [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), *devices]


def _set_states(states: list[Any]) -> None:
    own, of_numpy, of_torch, *devices = states
    random.setstate(own)
    np.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    if devices and torch.backends.mps.is_available():
        torch.mps.set_rng_state(devices[0])
    elif devices:
        torch.cuda.set_rng_state_all(devices)


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return not torch.equal(one, other)
    if isinstance(one, dict):  # numpy's
        same = (one["state"]["key"] == other["state"]["key"]).all()
        rest = {**one, "state": one["state"]["pos"]} != {**other, "state": other["state"]["pos"]}
        return bool(rest or not same)
    return one != other


def number(loss: Any) -> float:
    """What a closure returned, as a float. InputError for what is not one number."""
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1:
            raise InputError(
                f"the closure returned a tensor of shape {tuple(loss.shape)}: return one number, "
                "such as loss.mean()"
            )
        if loss.is_complex() or loss.is_meta:
            what = "a complex number" if loss.is_complex() else "a tensor on the meta device"
            raise InputError(f"the closure returned {what}: return the loss, one number")
    elif loss is None:
        raise InputError("the closure returned None: return the loss")
    elif isinstance(loss, tuple | list | Mapping):
        raise InputError(
            f"the closure returned a {type(loss).__name__}: return the loss alone, one number"
        )
    try:
        if isinstance(loss, str | bytes):
            raise TypeError
        return float(loss)
    except TypeError:  # complex, say
        raise InputError(
            f"the closure returned a {type(loss).__name__}: return the loss, one number"
        ) from None
