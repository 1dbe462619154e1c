"""Low-rank directions: z = U V' / sqrt(rank) for an m x n matrix W, which is only read.

    x W'  becomes  x W' + (x V) (A + eps U)' / sqrt(rank)     in the forward pass
    A <- A - lr * projected_grad * U                          at each step
    W <- W + A V' / sqrt(rank),  A <- 0                       after the last step of an interval

U (m, rank) is drawn for each step and V (n, rank) every `interval` steps; updates accumulate in A
(m, rank), the only buffer. Noise therefore costs next to nothing, and one forward pass over the
batch and its copy can serve both signs (`Paired`). z has mean 0 and the identity as covariance, so
the estimate is as unbiased as with a full z. Tensors other than matrices use a full z.
docs/noise.md defines the bits.

LOZO (Chen et al., 2024, arXiv:2410.07698) keeps V for some steps; EGGROLL (arXiv:2511.16652) adds
the factors in the forward pass. An update uses the V with which its losses were measured.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch

from mezo import noise
from mezo.closures import Loss
from mezo.forms.drawn import Drawn, Product
from mezo.forms.factors import (
    key_of,
    parts_of,
    right_of,
    scale_of,
    summed,
    zeros_for,
)
from mezo.forms.one_pass import together
from mezo.forms.one_sign import OneSign
from mezo.forms.products import Factors, Products
from mezo.forms.reads import eager
from mezo.forms.rounding import HALF
from mezo.forms.scratch import Moved, Scratch
from mezo.noise import live


class LowRank(Scratch):
    """Low-rank perturbation: in its contexts, products use W + (A + sign eps U) V' / sqrt(rank).

    Such products are linear layers, `x @ W` and embedding lookups. For any other function the whole
    perturbed matrix is made for that one call, and every tensor that is not a matrix is perturbed
    as in `Scratch`.
    """

    factored = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._trained = {name: tensor for name, tensor, _ in self.rows}
        self.dtypes: set[torch.dtype] = set()  # dtypes in which products were computed
        self._made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # V / sqrt(rank) and eps U
        self._shifts: dict[tuple[int, int], torch.Tensor] = {}  # eps z of vectors

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        """Return a context for `sign`; with 0, products still include the accumulated updates."""
        with eager(), OneSign([self], [_Half(self, sign)], [sign], 0):
            yield

    @contextmanager
    def both(self, batch_size: int, others: Sequence[Self] = ()) -> Iterator[None]:
        """Return a context in which rows of the first half see theta + eps z, others theta - eps z.

        The forward pass takes 2 batch_size rows, and as many more for each of `others`, which are
        directions of the same step. Raises Unpaired if a parameter is read and a row cannot be
        assigned to a half.
        """
        directions, signs = (self, *others), (+1, -1)
        groups = [_Half(one, sign) for one in directions for sign in signs]
        with eager(), Products(directions, groups, signs, len(groups) * batch_size):
            yield

    def most(self) -> int:
        """Return how many directions a pass may take: each has small factors of its own."""
        return noise.MAX_PROBE

    def in_one_pass(self, closure: Loss) -> tuple[float, float] | None:
        return together(closure, self)

    def with_eps(self, times: float) -> "LowRank":
        """Return the same direction with `times` the eps, whose factors are its own."""
        settings = {**self.settings, "eps": times * self.eps}
        return LowRank(self.parts, settings, self.probe, states=self.states)

    def forget(self) -> None:
        """Draw the factors anew when they are next used; a captured pass draws its own."""
        self._made.clear()
        self._shifts.clear()

    def factors(self, name: str, tensor: torch.Tensor, signs: Sequence[int]) -> Factors:
        """Return V / sqrt(rank) and, for each sign, A + sign eps U; both are drawn only once."""
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

    def all_factors(self, signs: Sequence[int]) -> dict[str, Factors]:
        """Return `factors` of all matrices, drawn in one launch; none where each is drawn alone."""
        if (drawn := self._together()) is None:
            return {}
        right, left = drawn.of_interval(self.step), drawn.lefts(self.states, signs)
        return {name: (right[name], left[name]) for name in left}

    def products(self, sign: int) -> dict[int, Product]:
        """Return the same for products at one sign, by the matrix's id."""
        drawn = self._together()
        return {} if drawn is None else drawn.products(self.step, self.states, sign)

    def vectors(self, sign: int) -> dict[int, torch.Tensor]:
        """Return `vector` of all vectors, by the vector's id; none where each is drawn alone."""
        drawn = self._together()
        return {} if drawn is None else drawn.shifted(sign)

    def _together(self) -> Drawn | None:
        """Return what draws for all tensors at once, where they stay in place during a pass."""
        if self.bundles is None or live.current() is not None:
            return None
        if self.bundles.drawn is None:
            self.bundles.drawn = Drawn(self.rows, self.settings)
        self.bundles.drawn.draw_(self.move(self.eps))
        return self.bundles.drawn

    def vector(self, tensor: torch.Tensor, key: tuple[int, int], sign: int) -> torch.Tensor:
        """Return theta + sign eps z, with the bits of a move; z is drawn once for both signs."""
        if key not in self._shifts:
            self._shifts[key] = self._drawn(key, torch.zeros_like(tensor, requires_grad=False))
        return tensor.detach().add(self._shifts[key], alpha=sign)

    def _drawn(self, key: tuple[int, int], zeros: torch.Tensor) -> torch.Tensor:
        moves = [self.move(self.eps)]
        noise.apply_(zeros, key, moves, distribution=self.distribution)
        return zeros


class _Half(Moved):
    """One sign, for functions that are not products: they are given the perturbed weights."""

    def __init__(self, of: LowRank, sign: int):
        super().__init__(of, of.moves(sign))
        self.of, self.sign = of, sign
        self._made: set[int] | None = None  # the ids of vectors that were made ready for this pass

    def forget(self) -> None:
        super().forget()
        self._made = None

    def settle(self) -> None:
        """After the pass: note which of the vectors that were made ready it has read."""
        self.read.update([self.rows[i][0] for i in (self._made or set()) - self._ready.keys()])

    def moved(self, name: str, tensor: torch.Tensor, key) -> torch.Tensor:
        if key is None or tensor.dim() > 2 or (tensor.dim() < 2 and tensor.dtype in HALF):
            return super().moved(name, tensor, key)
        self.read.add(name)
        if tensor.dtype in HALF:
            live.refuse("a 16-bit matrix that is read by something else than a product")
        if tensor.dim() < 2:
            if self._made is None and live.current() is None:  # a graph draws its own
                self._ready |= (made_ready := self.of.vectors(self.sign))
                self._made = {*made_ready}
            made = self._ready.pop(id(tensor), None)
            return self.of.vector(tensor, key, self.sign) if made is None else made
        out = torch.empty_like(tensor, requires_grad=False)
        right, (left,) = self.of.factors(name, tensor, (self.sign,))
        bits = {"key": key, "step": self.of.step, "probe": self.of.probe}
        bits["stream"] = noise.ROUND_PERTURBED
        for part in parts_of(tensor):
            out[part].copy_(summed(tensor.detach(), part, left, right, bits))
        return out

    def slice(self, name: str, tensor: torch.Tensor, key, index: int) -> torch.Tensor:
        if key is None or tensor.dim() != 2:
            return super().slice(name, tensor, key, index)
        return self.moved(name, tensor, key)[index]
