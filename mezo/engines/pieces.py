"""The parts of trained tensors that one process of an engine holds, and the moves made to them.

A piece is a box of a tensor: all of it, some rows (column-parallel layers, a third of a fused
matrix), or some columns (row-parallel layers). z is a function of an element's index in the whole
tensor, so that a piece's noise is a part of the whole tensor's, to the bit.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from mezo import noise
from mezo.engines.engine import Change, Point
from mezo.noise.sharded import apply_to_box_


class Piece(NamedTuple):
    """A box of a trained tensor, as a view of the engine's own memory."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: tuple[int, ...]  # where the box begins in it
    view: torch.Tensor

    @property
    def box(self) -> tuple[slice, ...]:
        """The place of the box in the whole tensor."""
        return tuple(
            slice(at, at + size) for at, size in zip(self.start, self.view.shape, strict=True)
        )


class Pieces:
    """The pieces of one process. Copies are kept of the tensors that a point looks at."""

    def __init__(self, pieces: Iterable[Piece], seed: int, distribution: str):
        self.distribution = distribution
        self._of: dict[str, list[tuple[Piece, tuple[int, int]]]] = {}
        for piece in pieces:
            key = noise.tensor_key(seed, piece.name)
            self._of.setdefault(piece.name, []).append((piece, key))
        self._kept: dict[str, list[torch.Tensor]] = {}  # theta, while the model may be elsewhere
        self._away: set[str] = set()  # tensors whose views are not theta

    @torch.no_grad()
    def go(self, point: Point) -> None:
        """Bring the engine's weights to a point."""
        for names, moves in point.walk:
            for name in names:
                self._walk(name, moves)
        seen: dict[str, list] = {}
        for names, moves in point.look:
            for name in names:
                seen.setdefault(name, []).append(moves)
        for name in self._away - seen.keys():
            self._restore(name)
        for name, tables in seen.items():
            self._look(name, tables)

    def apply(self, update: Sequence[Change]) -> None:
        """Make changes that the weights keep, and come home."""
        self.go(Point(tuple(update)))

    def forget(self) -> None:
        """Come home, and free the copies; the next look makes them again."""
        self.go(Point())
        self._kept.clear()

    def home(self) -> Iterable[Piece]:
        """Return the pieces at theta."""
        self.go(Point())
        return [piece for own in self._of.values() for piece, _ in own]

    def _walk(self, name: str, moves) -> None:
        own = self._of.get(name, ())
        kept = self._kept.get(name) or [piece.view for piece, _ in own]
        for (piece, key), theta in zip(own, kept, strict=True):
            self._move(piece, key, theta, moves)
        if own and name in self._kept:
            self._away.add(name)  # the view is still what it was before the walk

    def _look(self, name: str, tables: list) -> None:
        own = self._of.get(name, ())
        if name not in self._kept:
            self._kept[name] = [piece.view.clone() for piece, _ in own]
        self._away.add(name)
        moves = np.concatenate(tables)
        for (piece, key), theta in zip(own, self._kept[name], strict=True):
            if piece.view.shape[1:] == piece.shape[1:]:  # of whole rows: read there, written here
                self._move(piece, key, piece.view, moves, source=theta)
            else:
                piece.view.copy_(theta)
                self._move(piece, key, piece.view, moves)

    def _restore(self, name: str) -> None:
        for (piece, _), theta in zip(self._of.get(name, ()), self._kept[name], strict=True):
            piece.view.copy_(theta)
        self._away.discard(name)

    def _move(self, piece: Piece, key, where: torch.Tensor, moves, **how) -> None:
        how |= {"key": key, "moves": moves, "distribution": self.distribution}
        move = partial(noise.apply_, **how)
        apply_to_box_(where, piece.shape, piece.start, move)
