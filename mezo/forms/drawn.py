"""What low-rank directions draw and add up, for all tensors in one launch instead of one by one.

U and the z of vectors are drawn once for a step and V once for an interval; the sums A of all
matrices are moved together. The bits are those of `factors.update_` and of `noise.apply_` for each.
U, z and A + sign U lie in memory that stays where it is, so that the views of them are made once.
"""

from collections.abc import Mapping, Sequence
from operator import is_not
from typing import Any, NamedTuple

import numpy as np
import torch

from mezo import noise
from mezo.forms.direction import Row
from mezo.forms.factors import States, decay_, factor, key_of, right_of, scale_of, zeros_for
from mezo.forms.rounding import HALF
from mezo.noise import Move

Named = dict[str, torch.Tensor]


class Product(NamedTuple):
    """What x W' + (x V) L' takes, all in the dtype of W."""

    name: str
    device: str  # the type
    shape: tuple[int, int]  # of W', (n, m)
    right: torch.Tensor  # V / sqrt(rank), (n, rank)
    left: torch.Tensor  # L', (rank, m): of the sign that was asked for last
    matrix: torch.Tensor  # W', (n, m)


class Drawn:
    """The factors of a model's matrices, and the z of its vectors that have no 16 bits."""

    def __init__(self, rows: Sequence[Row], settings: Mapping[str, Any]):
        self.settings = settings
        self.matrices = [row for row in rows if row.tensor.dim() == 2]
        self.vectors = [r for r in rows if r.tensor.dim() < 2 and r.tensor.dtype not in HALF]
        # They outlive the pass, which may be one in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            like = [zeros_for(row.tensor, len(row.tensor), settings) for row in self.matrices]
            self._u_memory, self._u = _joined(like)
            self._left_memory, self._left = _joined(like)
            self._z_memory, self._z = _joined([r.tensor.detach() for r in self.vectors])
        keys = [key_of(row.name, "U", settings) for row in self.matrices]
        drawn = zip([*self.matrices, *self.vectors], [*self._u, *self._z], strict=True)
        self._rows = noise.Rows(
            Row(row.name, x, keys[i] if i < len(keys) else row.key)
            for i, (row, x) in enumerate(drawn)
        )
        self._holds: Move | None = None  # whose U and z were drawn last
        self.first: int | None = None  # the step that began the interval of V
        self.right: Named = {}
        self._known: tuple = ()  # for which `_products` were made
        self._products: dict[int, Product] = {}
        self._casts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._parts: dict[int, tuple] = {}  # by the id of the rows that `add_` was given

    def draw_(self, move: Move) -> None:
        """Draw U and z of a direction, times the move's coefficient, unless they are there."""
        if self._holds == move:
            return
        self._holds = None
        for memory in (*self._u_memory, *self._z_memory):
            memory.zero_()
        noise.apply_all_(self._rows, [move], distribution=self.settings["distribution"])
        self._holds = move

    def of_interval(self, step: int) -> Named:
        """Return V / sqrt(rank) of the interval that contains the step, by name."""
        first = step - step % self.settings["interval"]
        if self.first != first:
            scale, drawn = scale_of(self.settings), {}
            for name, tensor, _ in self.matrices:
                drawn[name] = right_of(tensor, name, self.settings, step) * scale
            self.right, self.first = drawn, first
        return self.right

    def lefts(self, states: States, signs: Sequence[int]) -> Named:
        """Return A + sign U for each sign, (signs, m, rank), by name."""
        kept = [states.get(row.tensor, {}).get("low_rank") for row in self.matrices]
        triples = zip(self.matrices, kept, self._u, strict=True)
        return {row.name: torch.stack(_added(a, u, signs)) for row, a, u in triples}

    def products(self, step: int, states: States, sign: int) -> dict[int, Product]:
        """Return what products with each matrix take, by the matrix's id; a next call changes it.

        A matrix that is empty is left out.
        """
        for u, left in zip(self._u_memory, self._left_memory, strict=True):
            torch.mul(u, sign, out=left)
        kept = [states.get(row.tensor, {}).get("low_rank") for row in self.matrices]
        pairs = [(left, a) for left, a in zip(self._left, kept, strict=True) if a is not None]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
        self._look(step)
        if self._casts:
            torch._foreach_copy_([own for own, _ in self._casts], [left for _, left in self._casts])
        return self._products

    def _look(self, step: int) -> None:
        """Make views anew where the weights lie elsewhere, or V is another one."""
        rights = self.of_interval(step)
        known = self.first, [row.tensor.data_ptr() for row in self.matrices]
        if self._known == known:
            return
        self._products, self._casts = {}, []
        for (name, tensor, _), left in zip(self.matrices, self._left, strict=True):
            dtype, right, own = tensor.dtype, rights[name], left
            if dtype != left.dtype:
                right, own = right.to(dtype), left.to(dtype)
                self._casts.append((own, left))
            if tensor.numel():
                w, device = tensor.detach().t(), tensor.device.type
                self._products[id(tensor)] = Product(name, device, (*w.shape,), right, own.t(), w)
        self._known = known

    def shifted(self, sign: int) -> dict[int, torch.Tensor]:
        """Return theta + sign z of all vectors, by the vector's id."""
        if not self.vectors:
            return {}
        thetas = [row.tensor.detach() for row in self.vectors]
        found = torch._foreach_add(thetas, self._z, alpha=sign)
        return {id(row.tensor): x for row, x in zip(self.vectors, found, strict=True)}

    def add_(self, rows: noise.Rows, moves: np.ndarray, states: States) -> None:
        """Apply the moves of steps to these tensors: to the sums A of the matrices among them.

        Weight decay is noted beside A. `rows` are a part of the model's, the same at every call.
        """
        if id(rows) not in self._parts:
            matrices = [row for row in rows if row.tensor.dim() == 2]
            others = noise.Rows(row for row in rows if row.tensor.dim() != 2)
            self._parts[id(rows)] = rows, others, matrices, noise.Rows()
        _, others, matrices, sums = self._parts[id(rows)]
        kept = [states.get(row.tensor, {}).get("low_rank") for row in matrices]
        if len(sums) != len(kept) or any(map(is_not, [row.tensor for row in sums], kept)):
            made = [
                factor(tensor, name, self.settings, states[tensor]) for name, tensor, _ in matrices
            ]
            pairs = zip(matrices, made, strict=True)
            sums = noise.Rows(Row(row.name, a, key) for row, (a, key) in pairs)
            self._parts[id(rows)] = rows, others, matrices, sums
        distribution, scales = self.settings["distribution"], moves["scale"].tolist()
        noise.apply_all_(others, moves, distribution=distribution)
        moves = moves.copy()
        moves["scale"] = 1.0
        noise.apply_all_(sums, moves, distribution=distribution)
        if any(scale != 1 for scale in scales):
            for row in matrices:
                decay_(states[row.tensor], scales)


def _joined(like: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return zeros, one tensor for each dtype and device, and views of them in the given shapes."""
    kinds: dict[Any, list[torch.Tensor]] = {}
    for x in like:
        kinds.setdefault((x.dtype, x.device), []).append(x)
    memory, views = [], {}
    for (dtype, device), of in kinds.items():
        line = (64 if device.type == "cpu" else 512) // dtype.itemsize  # as torch aligns tensors
        sizes = [-(-x.numel() // line) * line for x in of]
        memory.append(torch.zeros(sum(sizes), dtype=dtype, device=device))
        for x, part in zip(of, memory[-1].split(sizes), strict=True):
            views[id(x)] = part[: x.numel()].view(x.shape)
    return memory, [views[id(x)] for x in like]


def _added(a: torch.Tensor | None, u: torch.Tensor, signs: Sequence[int]) -> list[torch.Tensor]:
    return [sign * u if a is None else a.add(u, alpha=sign) for sign in signs]
