"""What `MeZO.step` takes: a function of no arguments whose value is the loss of one batch.

optimizer.step(lambda: model(**batch).loss)
optimizer.step(Mean(lambda: model(**batch).loss, examples))   # batches of unequal sizes
optimizer.step(Paired(alone, halves))                         # low rank: one pass, both losses
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from mezo.errors import InputError
from mezo.interrupts import released

Closure = Callable[[], float | torch.Tensor]  # the loss of one forward pass
Both = Callable[[int], AbstractContextManager[None]]  # LowRank.both


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

    `both` is `LowRank.both`. Where directions have full rank, or where the model cannot be stacked,
    the closure is `alone`. A run's first step calls each of them some times more, to compare.
    """

    alone: Callable[[], float | torch.Tensor]
    halves: Callable[[Both], tuple[float | torch.Tensor, float | torch.Tensor]]

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

    def __init__(self, closure: Closure, around: Callable[[Closure], Closure] | None = None):
        self.examples = closure.examples if isinstance(closure, Mean) else 1.0
        self.closure = closure.closure if isinstance(closure, Mean) else closure
        self.paired = self.closure if isinstance(self.closure, Paired) else None
        if around is not None:
            self.closure, self.paired = around(self.closure), None
        self.home: float | None = None  # L(theta), once it is known

    def __call__(self) -> float:
        with released():
            return number(self.closure())  # waits for the device: the only two syncs of a step

    def halves(self, both: Both) -> tuple[float, float]:
        """The losses of both sides from one forward pass, of a Paired closure."""
        assert self.paired is not None
        with released():
            plus, minus = self.paired.halves(both)
            return number(plus), number(minus)


def number(loss: Any) -> float:
    """What a closure returned, as a float. InputError for what is not one number."""
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1:
            raise InputError(
                f"the closure returned a tensor of shape {tuple(loss.shape)}: return one number, "
                "such as loss.mean()"
            )
    elif loss is None:
        raise InputError("the closure returned None: return the loss")
    elif isinstance(loss, tuple | list | Mapping):
        raise InputError(
            f"the closure returned a {type(loss).__name__}: return the loss alone, one number"
        )
    return float(loss)
