"""What `MeZO.step` takes: a function of no arguments whose value is the loss of one batch.

optimizer.step(lambda: model(**batch).loss)
optimizer.step(Mean(lambda: model(**batch).loss, examples))   # batches of unequal sizes
optimizer.step(Paired(alone, halves))                         # low rank: one pass, both losses
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mezo.errors import InputError
from mezo.interrupts import released

Closure = Callable[[], float | torch.Tensor]  # the loss of one forward pass
# Takes the number of a batch's rows: `LowRank.both`, `FullRank.both`, or `one_pass.Copies`.
Both = Callable[[int], AbstractContextManager[None]]
_ROWS = 2**10  # rows of products (tokens) up to which several directions share a pass
_FEW = 2**8  # the same for both signs of an adapter, on a CPU


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
    `alone`. A run's first step calls each of them some times more, to compare.

    With num_samples n, one pass can take several directions. `halves` is then asked for the losses
    of `copies(both)` copies of the batch, one for each sign of each direction, in this order:

        def halves(both):
            with both(batch_size=16):
                losses = per_example(model, repeated(batch, copies(both)))
            return [part.mean() for part in losses.split(16)]

        optimizer.step(Paired(alone, halves, directions=4))

    Args:
        alone: Returns the loss.
        halves: Returns the losses of the copies from one forward pass.
        full_rank: Whether directions of full rank take one pass, too. By default those of
            perturbation "scratch" do on a GPU; True asks for it anywhere and in place, too.
        directions: How many directions `halves` takes in one pass at most. Each takes the memory of
            two copies of the batch's activations. `Stacking.of` says what pays.
    """

    alone: Callable[[], float | torch.Tensor]
    halves: Callable[[Both], Sequence[float | torch.Tensor]]
    full_rank: bool | None = None
    directions: int = 1

    def __call__(self) -> float | torch.Tensor:
        return self.alone()


def double(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch and its copy behind it: every tensor twice along its first dimension."""
    return repeated(batch, 2)


def repeated(batch: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return copies of the batch one behind the other, along each tensor's first dimension."""
    return {
        key: torch.cat([x] * times) if isinstance(x, torch.Tensor) and x.dim() else x
        for key, x in batch.items()
    }


def copies(both: Both) -> int:
    """Return how many copies of the batch a pass in the context of `both` takes; mostly 2."""
    return getattr(both, "copies", 2)


class Stacking(NamedTuple):
    """What of a step should share a pass: the arguments of `Paired` that a batch's size decides."""

    full_rank: bool | None = None
    directions: int = 1

    @classmethod
    def of(cls, model: torch.nn.Module, tokens: int) -> "Stacking":
        """Return what pays for a batch of so many tokens, which are rows of a model's products.

        A few rows leave a processor waiting for the weights, so that more of them cost little. With
        thousands of rows, nothing is saved. Both signs of peft's adapters share a pass on a GPU,
        and on a CPU if the rows are few: their matrices are small, and the frozen ones are read
        once.
        """
        directions = max(1, _ROWS // (2 * max(1, tokens)))
        if getattr(model, "peft_config", None) is None:
            return cls(None, directions)
        on_gpu = next(model.parameters()).device.type == "cuda"
        return cls(True if on_gpu or 2 * tokens <= _FEW else None, directions)

    def and_of(self, other: "Stacking") -> "Stacking":
        """Return what pays for either of two batches of a step."""
        both = True if self.full_rank and other.full_rank else None
        return Stacking(both, min(self.directions, other.directions))


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
        self.known: dict[int, tuple[float, float]] = {}  # by probe: losses of both sides
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

    def halves(self, both: Both) -> list[tuple[float, float]]:
        """Return the losses of both sides of each direction in a pass, of a Paired closure.

        Raises InputError if there are more or fewer than two for each direction.
        """
        assert self.paired is not None
        with self.draws.repeated() if self.draws else nullcontext(), released():
            losses = [number(loss) for loss in self.paired.halves(both)]
        if len(losses) != copies(both):
            raise InputError(
                f"the closure's halves returned {len(losses)} losses for {copies(both)} copies of "
                "the batch: return one for each"
            )
        return list(zip(losses[::2], losses[1::2], strict=True))


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
