"""What low-rank directions draw and add up, for all tensors in one launch instead of one by one.

U and the z of vectors are drawn once for a step and V once for an interval; the sums A of all
matrices are moved together. The bits are those of `factors.update_` and of `noise.apply_` for each.
"""

from collections.abc import Mapping, Sequence
from operator import is_not
from typing import Any

import numpy as np
import torch

from mezo import noise
from mezo.forms.direction import Row
from mezo.forms.factors import States, decay_, factor, key_of, right_of, scale_of, zeros_for
from mezo.forms.rounding import HALF
from mezo.noise import Move

Named = dict[str, torch.Tensor]


class Drawn:
    """The factors of a model's matrices, and the z of its vectors that have no 16 bits.

    It holds V, and a zero in the shape of all that a step draws.
    """

    def __init__(self, rows: Sequence[Row], settings: Mapping[str, Any]):
        self.settings = settings
        self.matrices = [row for row in rows if row.tensor.dim() == 2]
        vectors = [r for r in rows if r.tensor.dim() < 2 and r.tensor.dtype not in HALF]
        zeros = [
            Row(r.name, zeros_for(r.tensor, len(r.tensor), settings), key_of(r.name, "U", settings))
            for r in self.matrices
        ]
        zeros += [r._replace(tensor=torch.zeros_like(r.tensor).detach()) for r in vectors]
        self.vectors, self.zeros = vectors, noise.Rows(zeros)
        self.first: int | None = None  # the step that began the interval of V
        self.right: Named = {}
        self._parts: dict[int, tuple] = {}  # by the id of the rows that `add_` was given

    def of_step(self, move: Move) -> Named:
        """Return U and z of a direction, times the move's coefficient, by name."""
        how = {"distribution": self.settings["distribution"]}
        made = noise.moved_all(self.zeros, noise.table([move]), **how)
        return {row.name: x for row, x in zip(self.zeros, made, strict=True)}

    def of_interval(self, step: int) -> Named:
        """Return V / sqrt(rank) of the interval that contains the step, by name."""
        first = step - step % self.settings["interval"]
        if self.first != first:
            scale, drawn = scale_of(self.settings), {}
            for name, tensor, _ in self.matrices:
                drawn[name] = right_of(tensor, name, self.settings, step) * scale
            self.right, self.first = drawn, first
        return self.right

    def lefts(self, u: Named, states: States, signs: Sequence[int]) -> Named:
        """Return A + sign U for each sign, (signs, m, rank), by name."""
        kept: list[Any] = [states.get(row.tensor, {}).get("low_rank") for row in self.matrices]
        names = [row.name for row in self.matrices]
        if any(a is None for a in kept):
            each = [_added(a, u[name], signs) for a, name in zip(kept, names, strict=True)]
        else:
            us = [u[name] for name in names]
            by_sign = [torch._foreach_add(kept, us, alpha=sign) for sign in signs]
            each = [list(one) for one in zip(*by_sign, strict=True)]
        found = [one[0].unsqueeze(0) if len(one) == 1 else torch.stack(one) for one in each]
        return dict(zip(names, found, strict=True))

    def shifted(self, z: Named, sign: int) -> Named:
        """Return theta + sign z of all vectors, by name."""
        thetas = [row.tensor.detach() for row in self.vectors]
        if not thetas:
            return {}
        found = torch._foreach_add(thetas, [z[row.name] for row in self.vectors], alpha=sign)
        return {row.name: x for row, x in zip(self.vectors, found, strict=True)}

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


def _added(a: torch.Tensor | None, u: torch.Tensor, signs: Sequence[int]) -> list[torch.Tensor]:
    return [sign * u if a is None else a.add(u, alpha=sign) for sign in signs]
