"""Small parameters that a forward pass reads one after another, perturbed in one launch.

A model has hundreds of biases, norms and small matrices, and to perturb each of them when it is
read takes more time in Python than in the processor. The first pass notes the order in which
parameters are read; from then on, whoever reads one small parameter gets the next ones ready too.
Each has a z of its own, so that the bits are those of one after another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, ClassVar

import torch

from mezo import noise
from mezo.errors import InputError
from mezo.forms.direction import Part, Row, replaced_by_pass
from mezo.layers import PLAIN, TensorScale

_SMALL = 2**16  # elements of a parameter; a larger one keeps the processor busy by itself
_MOST = 2**18  # elements of a bundle: 1 MB of float32


class Bundles:
    """The bundles of a model. They are empty until a pass has shown the order of its reads.

    `parts` are all that the model trains; if they are small, the z of a step is kept for them.
    """

    FEW: ClassVar[int] = noise.Kept.MOST  # elements of all parameters, of which copies are made

    def __init__(self, parts: Sequence[Part] = ()):
        self.kept = noise.Kept.of([row for part in parts for row in part.rows])
        for part in parts:
            part.rows.kept = self.kept
        self.of: dict[str, noise.Rows] = {}  # by parameter: those of one dtype, device and scale
        self.learned = False
        self.watched: bool | None = None  # whether passes watch by a subclass; None: not yet known
        self.drawn: Any = None  # drawn.Drawn, of low-rank directions
        self._parts = parts
        self._copies: dict[int, tuple[list[int] | None, Any]] = {}  # by part: noise.aside
        self._few = sum(row.tensor.numel() for part in parts for row in part.rows) <= self.FEW
        self._few &= not any(part.scale.threshold is not None for part in parts)
        self._few &= all(_is_plain(row.tensor) for part in parts for row in part.rows)

    def aside(self) -> list[tuple[Part, Any]] | None:
        """Return where the copies of all parameters go, or None if they are too many."""
        if not self._few:
            return None
        for i, part in enumerate(self._parts):
            known, _ = self._copies.get(i, (None, None))
            if known is None or known != [row.tensor.data_ptr() for row in part.rows]:
                copies = noise.aside(part.rows)
                if copies is None:
                    self._few = False
                    return None
                self._copies[i] = part.rows.addresses, copies
        return [(part, self._copies[i][1]) for i, part in enumerate(self._parts)]

    def learn(self, read: Sequence[Row], scales: Mapping[str, TensorScale]) -> None:
        """Make bundles of what a pass has read, in the order in which it did."""
        kinds: dict[tuple, list[Row]] = {}
        for row in read:
            scale = scales.get(row.name, PLAIN)
            if _is_small(row.tensor) and scale.threshold is None:
                kind = row.tensor.dtype, row.tensor.device, scale
                kinds.setdefault(kind, []).append(row)
        for rows in kinds.values():
            total, ends = 0, []
            for row in rows:
                total += row.tensor.numel()
                ends.append(total // _MOST)
            for _, pairs in groupby(zip(ends, rows, strict=True), key=lambda pair: pair[0]):
                own = [row for _, row in pairs]
                bundle = noise.Rows(own)
                bundle.kept = self.kept
                self.of |= {row.name: bundle for row in own if len(own) > 1}
        self.learned = True


@contextmanager
def perturbed_in_place(
    copies: Sequence[tuple[Part, Any]], moves_of: Callable[[Part], Any], distribution: str
) -> Iterator[None]:
    """Within the context theta + eps z lies where theta did; theta is put back from its copies.

    Raises InputError if the context writes to a parameter or replaces one.
    """
    versions = [[row.tensor._version for row in part.rows] for part, _ in copies]
    for _, copy in copies:
        copy.save()
    try:
        for part, copy in copies:
            copy.perturb_(moves_of(part), distribution)
        torch.clear_autocast_cache()  # it would hold casts of the weights as they were
        yield
    finally:
        for _, copy in copies:
            copy.restore_()
        torch.clear_autocast_cache()
        for (part, copy), before in zip(copies, versions, strict=True):
            _look(part, copy.tensors, before)


def _look(part: Part, memory: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
    if [row.tensor.data_ptr() for row in part.rows] != part.rows.addresses:
        for (name, tensor, _), own in zip(part.rows, memory, strict=True):
            if tensor.data_ptr() != own.data_ptr():
                tensor.data = own
                raise replaced_by_pass(name)
    if [row.tensor._version for row in part.rows] != versions:
        for (name, tensor, _), before in zip(part.rows, versions, strict=True):
            if tensor._version != before:
                raise InputError(
                    f"the forward pass writes to the trained parameter {name}: freeze it"
                )


def _is_plain(x: torch.Tensor) -> bool:
    ordinary = type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"
    return ordinary and x.is_contiguous() and x.numel() > 0


def _is_small(x: torch.Tensor) -> bool:
    return _is_plain(x) and x.numel() <= _SMALL
