"""Scratch perturbation: the forward pass sees theta + eps z, and theta is untouched, to the bit.

Whatever reads a parameter during the forward pass gets theta + eps z, made for that one operation
and freed after it. It is the form for 16-bit weights, which moving there and back would destroy
(docs/numerics.md).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mezo import noise
from mezo.errors import InputError
from mezo.forms.direction import Direction
from mezo.forms.reads import LOOKUP, Placed, Reads, eager
from mezo.layers import PLAIN, within
from mezo.noise import Move
from mezo.noise.sharded import is_sharded, local


class Scratch(Direction):
    """Within `at(sign)`, torch's functions are given theta + sign eps z for a trained parameter.

    It holds for any model: tied weights, weights read outside of their module's forward, experts,
    adapters. Memory: what one operation reads; of an embedding, the rows looked up. The perturbed
    weights are rounded stochastically, or a weight near 1 in bfloat16 would never move by 1e-3.
    Not seen is what does not pass through torch's functions; `check` finds it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.scales = {
            row.name: part.scale
            for part in self.parts
            if part.scale is not PLAIN
            for row in part.rows
        }
        self.read: set[str] = set()  # names of the parameters that were asked for
        self.placed: Placed | None = None

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        if not sign:
            yield
            return
        with eager(), Moved(self, self.moves(sign)):
            yield

    def moves(self, sign: int) -> list[Move]:
        """From theta to what is read in its place."""
        return [self.move(sign * self.eps, noise.ROUND_PERTURBED)]

    @torch.no_grad()
    def check(self, closure) -> None:
        """InputError if the loss depends on a parameter that no function of torch was seen to read.

        One more forward pass with NaN in those parameters; none if all were read.
        """
        names = {name for name, _, _ in self.rows} - self.read
        if self.placed is not None:  # a forward pass takes all processes
            names = self.placed.of_all(names)
        unread = [(name, p) for name, p, _ in self.rows if name in names]
        if not unread:
            return
        with self.at(-1):
            before = float(closure())
        saved = [p.clone() for _, p in unread]
        try:
            for _, p in unread:
                p.fill_(torch.nan)
            with self.at(-1):
                after = float(closure())
        finally:
            for (_, p), values in zip(unread, saved, strict=True):
                p.copy_(values)
        if math.isfinite(before) and not abs(after - before) <= 1e-3 * abs(before):
            told = ", ".join(name for name, _ in unread)
            raise InputError(
                f"the model reads {told} past torch's functions (a compiled or scripted module, a "
                'view made earlier): perturb a float32 model in place, perturbation="in_place"'
            )


class Moved(Reads):
    """Torch's functions get theta + eps z where they are given theta."""

    def __init__(self, perturbed: Scratch, moves: Sequence[Move]):
        super().__init__(perturbed)
        self.moves, self.distribution, self.scales = moves, perturbed.distribution, perturbed.scales
        self._tables: dict[float, Any] = {}  # by scale

    def call(self, function, args: tuple, kwargs: dict):
        first = self.rows.get(id(args[0])) if args else None
        element = function is torch.Tensor.__getitem__ and _is_index(args[1])
        if element and first and not is_sharded(first[1]):
            return self.slice(*first, int(args[1]))
        if function is LOOKUP:
            return self.lookup(*args, **kwargs)
        return function(*self.perturbed(args), **self.perturbed(kwargs))

    def perturbed(self, given):
        """`given` with theta + eps z in the place of every trained parameter in it."""
        if id(given) in self.rows:
            out = self.moved(*self.rows[id(given)])
            return out if is_sharded(given) else local(out)
        if type(given) is dict:
            return {key: self.perturbed(value) for key, value in given.items()}
        if type(given) in (tuple, list):
            return type(given)(map(self.perturbed, given))
        return given

    def moved(self, name: str, tensor: torch.Tensor, key) -> torch.Tensor:
        out, before = torch.empty_like(tensor, requires_grad=False), tensor.detach()
        which = {"source": before}
        if self.placed is not None and before.is_cpu:  # FSDP cannot free what numpy has seen
            out.copy_(which.pop("source"))
        self._shift(out, name, tensor, key, before, **which)
        return out

    def slice(self, name: str, tensor: torch.Tensor, key, index: int) -> torch.Tensor:
        """tensor[index]: of all experts' weights, those of one."""
        before = tensor.detach()[index]
        out = before.clone()
        self._shift(out, name, tensor, key, before, offset=index % len(tensor) * out.numel())
        return out

    def lookup(self, input, weight, padding_idx=None, max_norm=None, *args, **kwargs):
        """Of an embedding, the rows looked up, unless they are more than it has."""
        name, tensor, key = self.embedding(weight, max_norm)
        if input.numel() > len(tensor) or is_sharded(tensor):
            return LOOKUP(input, self.perturbed(weight), padding_idx, None, *args, **kwargs)
        out = LOOKUP(input, tensor.detach(), padding_idx, None, *args, **kwargs)
        flat = out.view(-1, out.shape[-1])
        self._shift(flat, name, tensor, key, flat, rows=input.reshape(-1))
        return out

    def _shift(self, out, name: str, tensor: torch.Tensor, key, before, **which) -> None:
        """Perturb `out`, a part of the parameter whose numbers are `before`, where its mask is."""
        self.read.add(name)
        own = self.scales.get(name, PLAIN)
        if own.scale not in self._tables:
            self._tables[own.scale] = noise.table(own.walk(self.moves))
        if own.threshold is not None and before is out:
            before = out.clone()
        how = {"distribution": self.distribution, **which}
        noise.apply_(out, key, self._tables[own.scale], **how)
        if own.threshold is not None:
            out.copy_(torch.where(within(before, own.threshold), out, before))


def _is_index(given) -> bool:
    """An int, or a tensor that stands for one."""
    whole = isinstance(given, torch.Tensor) and given.dim() == 0 and given.dtype == torch.int64
    return whole or type(given) is int
