"""Low-rank directions: z = U V' / sqrt(rank) for a matrix W of m x n, which is only read.

    x W'  becomes  x W' + (x V) (A + eps U)' / sqrt(rank)     in the forward pass
    A <- A - lr * projected_grad * U                          at each step
    W <- W + A V' / sqrt(rank),  A <- 0                       with the last step of an interval

U (m, rank) is drawn anew each step, V (n, rank) each `interval` steps; updates are summed up in A
(m, rank), the one thing kept. So noise costs next to nothing, and one forward pass over the batch
and its copy can serve both signs (`Paired`). z has mean 0 and the identity as covariance: the
estimate is as unbiased as along a full z, which all but matrices keep. docs/noise.md has the bits.

LOZO (Chen et al., 2024, arXiv:2410.07698) keeps V for some steps, EGGROLL (arXiv:2511.16652) adds
the factors in the forward pass. An update goes along the V that its losses were measured with.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mezo import noise
from mezo.closures import Loss
from mezo.forms.factors import (
    key_of,
    parts_of,
    right_of,
    scale_of,
    summed,
    zeros_for,
)
from mezo.forms.products import Factors, Products, Unpaired
from mezo.forms.reads import eager
from mezo.forms.rounding import HALF
from mezo.forms.scratch import Moved, Scratch

_FAR = 16  # times eps: where both ways to the losses are compared


class LowRank(Scratch):
    """Within `at(sign)` or `both(...)`, products with W are those of W + (A + sign eps U) V'.

    They are linear layers, `x @ W`, and lookups in an embedding. Other functions get the whole
    matrix, made for the one call; every other parameter is as in scratch perturbation.
    """

    factored = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._trained = {name: tensor for name, tensor, _ in self.rows}
        self.dtypes: set[torch.dtype] = set()  # in which products were computed
        self._made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # V / sqrt(rank) and eps U
        self._shifts: dict[tuple[int, int], torch.Tensor] = {}  # eps z of vectors

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        """At 0, too, products are made with what is summed up of the updates."""
        with eager(), self._products(0, sign):
            yield

    @contextmanager
    def both(self, batch_size: int) -> Iterator[None]:
        """Of 2 batch_size rows, the first half sees theta + eps z, the second theta - eps z.

        Raises Unpaired where a parameter is read and it cannot be told which rows are which.
        """
        with eager(), self._products(2 * batch_size, +1, -1):
            yield

    def losses(self, closure: Callable[[], float]) -> tuple[float, float]:
        """loss_plus and loss_minus, from one forward pass where the closure can and it is right."""
        both = together(closure, self)
        return super().losses(closure) if both is None else both

    def _products(self, batch: int, *signs: int) -> Products:
        return Products(self, [_Half(self, sign) for sign in signs], signs, batch)

    def factors(self, name: str, tensor: torch.Tensor, signs: Sequence[int]) -> Factors:
        """V / sqrt(rank), and A + sign eps U of each sign. The draws are made once."""
        if name not in self._made:
            right = right_of(tensor, name, self.settings, self.step) * scale_of(self.settings)
            u = self._drawn(
                key_of(name, "U", self.settings), zeros_for(tensor, len(tensor), self.settings)
            )
            self._made[name] = right, u
        right, u = self._made[name]
        a = self.states.get(self._trained[name], {}).get("low_rank")
        left = [sign * u if a is None else a.add(u, alpha=sign) for sign in signs]
        return right, torch.stack(left)

    def vector(self, tensor: torch.Tensor, key: tuple[int, int], sign: int) -> torch.Tensor:
        """theta + sign eps z, of 32 or 64 bits: what a move makes, drawn once for both signs."""
        if key not in self._shifts:
            self._shifts[key] = self._drawn(key, torch.zeros_like(tensor, requires_grad=False))
        return tensor.detach().add(self._shifts[key], alpha=sign)

    def _drawn(self, key: tuple[int, int], zeros: torch.Tensor) -> torch.Tensor:
        moves = [self.move(self.eps)]
        noise.apply_(zeros, key, moves, distribution=self.distribution)
        return zeros


class _Half(Moved):
    """One sign, for all that is no product: torch's functions get the weights as they would be."""

    def __init__(self, of: LowRank, sign: int):
        super().__init__(of, of.moves(sign))
        self.of, self.sign = of, sign

    def moved(self, name: str, tensor: torch.Tensor, key) -> torch.Tensor:
        if key is None:  # made of parameters that are perturbed already
            return tensor
        if tensor.dim() > 2 or (tensor.dim() < 2 and tensor.dtype in HALF):
            return super().moved(name, tensor, key)
        self.read.add(name)
        if tensor.dim() < 2:
            return self.of.vector(tensor, key, self.sign)
        out = torch.empty_like(tensor, requires_grad=False)
        right, (left,) = self.of.factors(name, tensor, (self.sign,))
        bits = {"key": key, "step": self.of.step, "probe": self.of.probe}
        bits["stream"] = noise.ROUND_PERTURBED
        for part in parts_of(tensor):
            out[part].copy_(summed(tensor.detach(), part, left, right, bits))
        return out

    def slice(self, name: str, tensor: torch.Tensor, key, index: int) -> torch.Tensor:
        if tensor.dim() != 2:
            return super().slice(name, tensor, key, index)
        return self.moved(name, tensor, key)[index]


def together(closure: Callable[[], float], perturbed: LowRank) -> tuple[float, float] | None:
    """loss_plus and loss_minus from one forward pass; None where it takes two.

    Before one pass is relied on, both ways are compared. Where they disagree, or a row cannot be
    assigned to a half, a warning says so, and every step takes two passes from then on.
    """
    if not isinstance(closure, Loss) or closure.paired is None:
        return None
    memory = perturbed.memory
    tried = memory.paired
    if tried is False:
        return None
    try:
        if not tried and not _agree(closure, perturbed):
            return None
        plus, minus = closure.halves(perturbed.both)
    except (Unpaired, RuntimeError) as error:  # the latter: twice the batch may be too much
        if tried and not isinstance(error, Unpaired):
            raise
        logging.getLogger("mezo").warning("two forward passes a step instead of one: %s", error)
        memory.paired = False
        return None
    memory.paired = True
    return plus, minus


def _agree(closure: Loss, perturbed: LowRank) -> bool:
    """Unpaired if one pass has other losses than two; False if they are not finite.

    At 16 eps the losses differ by so much that a parameter read with the wrong sign shows.
    """
    settings = {**perturbed.settings, "eps": _FAR * perturbed.eps}
    far = LowRank(perturbed.parts, settings, perturbed.probe, states=perturbed.states)
    found = list(closure.halves(far.both))
    expected = []
    for sign in (+1, -1, 0):
        with far.at(sign):
            expected.append(closure())
    if not all(map(math.isfinite, found + expected)):
        return False
    share = 0.05 if far.dtypes & set(HALF) else 0.01
    slack = share * (max(expected) - min(expected)) + 1e-5 * max(map(abs, expected))
    if any(abs(one - other) > slack for one, other in zip(found, expected, strict=False)):
        raise Unpaired(f"its losses are {found}, those of two are {expected[:2]}")
    return True
