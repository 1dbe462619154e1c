"""Scratch perturbation: the forward pass sees theta + eps z, while theta stays as it is.

Every operation of the forward pass that reads a parameter is given theta + eps z, which is made for
that one operation and freed after it. This form is meant for 16-bit weights, which would lose their
values if they were moved there and back (docs/numerics.md).
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from mezo import noise
from mezo.errors import InputError
from mezo.forms.bundles import perturbed_in_place
from mezo.forms.direction import Direction, Part, Row
from mezo.forms.reads import LOOKUP, Placed, Reads, eager
from mezo.layers import PLAIN, within
from mezo.noise import Move, live
from mezo.noise.live import Numbers
from mezo.noise.sharded import is_sharded, local

_NESTED = (tuple, list, dict)


class Scratch(Direction):
    """Within `at(sign)`, torch's functions read theta + sign eps z in place of theta.

    This works for any model, including tied weights, weights read outside of their module's
    forward, experts and adapters. It needs memory for the parameters that one operation reads, or
    for the looked-up rows of an embedding. Perturbed 16-bit weights are rounded stochastically;
    otherwise a bfloat16 weight near 1 would never move by 1e-3. Reads that bypass torch's functions
    are not perturbed; `check` detects them.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.scales = {
            row.name: part.scale
            for part in self.parts
            if part.scale is not PLAIN
            for row in part.rows
        }
        self.read: set[str] = set()  # names of the parameters read so far
        self.placed: Placed | None = None

    def beside(self, probe: int) -> Self:
        """Return another direction of the same step."""
        how = {"sides": self.sides, "memory": self.memory, "states": self.states}
        made = type(self)(self.parts, self.settings, probe, **how)
        made.bundles, made.placed = self.bundles, self.placed
        return made

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        if not sign:
            yield
            return
        copies = None if self.bundles is None else self.bundles.aside()
        if copies is not None:
            # Whatever reads the parameters reads theta + eps z.
            self.read.update(row.name for row in self.rows)
            table = partial(_walked, self.moves(sign))
            with perturbed_in_place(copies, table, self.distribution):
                yield
            return
        with eager(), Moved(self, self.moves(sign)) as moved:
            yield
            if self.bundles is not None and not self.bundles.learned:
                self.bundles.learn(list(moved.order.values()), self.scales)

    def moves(self, sign: int) -> list[Move]:
        """Return the moves from theta to the values that are read in its place."""
        return [self.move(sign * self.eps, noise.ROUND_PERTURBED)]

    @torch.no_grad()
    def check(self, closure) -> None:
        """Raise InputError if the loss depends on a parameter that torch's functions did not read.

        If there are unread parameters, this takes two forward passes, one of them with NaN in those
        parameters. The weights are restored afterwards.
        """
        names = {name for name, _, _ in self.rows} - self.read
        if self.placed is not None:  # all processes must make the same forward passes
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
            names_unread = ", ".join(name for name, _ in unread)
            raise InputError(
                f"the model reads {names_unread} past torch's functions (a compiled or scripted "
                "module, or a view made earlier): perturb a float32 model in place, "
                'perturbation="in_place"'
            )


def _walked(moves: Sequence[Move], part: Part) -> np.ndarray:
    return noise.table(part.scale.walk(moves))


class Moved(Reads):
    """A mode in which torch's functions that are given theta receive theta + eps z."""

    def __init__(self, perturbed: Scratch, moves: Sequence[Move]):
        super().__init__(perturbed)
        self.moves, self.distribution, self.scales = moves, perturbed.distribution, perturbed.scales
        self._tables: dict[float, Any] = {}  # by scale
        self.order: dict[str, Row] = {}  # what was read whole, until it is learned
        self._ready: dict[int, torch.Tensor] = {}  # what was perturbed and is not yet read, by id

    def forget(self) -> None:
        self._ready.clear()

    def settle(self) -> None:
        """After a pass of `Products`: note what it has read of that which was made ready."""

    def taken(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """Return `perturbed(x)` where it was made ready or is x, and None otherwise."""
        return self._ready.pop(id(x), None) if id(x) in self.rows else x

    def sequence(self, device: torch.device) -> tuple[Hashable, Numbers] | None:
        tensors = [tensor for _, tensor, _ in self.rows.values()]
        if self.placed is not None:
            return None
        if any(x.device != device or is_sharded(x) for x in tensors):
            return None
        (step, probe), *others = {(move.step, move.probe) for move in self.moves}
        if others:
            return None
        what = tuple((move.scale, move.coefficient, move.rounding) for move in self.moves)
        where = tuple([x.data_ptr() for x in tensors]), tuple(self.scales.items())
        return ("scratch", what, self.distribution, *where), live.numbers_of(step, [probe], step)

    def call(self, function, args: tuple, kwargs: dict):
        if function is LOOKUP:
            return self.lookup(*args, **kwargs)
        if function is torch.Tensor.__getitem__ and _is_index(args[1]):
            row = self.rows.get(id(args[0]))
            if row and not is_sharded(row[1]):
                return self.slice(*row, int(args[1]))
        kwargs = self.perturbed(kwargs) if kwargs else kwargs
        return function(*self._each(args), **kwargs)

    def perturbed(self, given):
        """Return `given` with theta + eps z in place of every trained parameter in it."""
        if id(given) in self.rows:
            out = self.moved(*self.rows[id(given)])
            return out if self.placed is None or is_sharded(given) else local(out)
        kind = type(given)
        if kind is dict:
            return dict(zip(given, self._each(given.values()), strict=True))
        return kind(self._each(given)) if kind in _NESTED else given

    def _each(self, given: Iterable) -> list:
        """Return `perturbed` of each; most are no parameters, and a call for each takes long."""
        rows, ready, found = self.rows, self._ready, []
        for x in given:
            if (i := id(x)) in ready:
                x = ready.pop(i)
            elif i in rows or type(x) in _NESTED:
                x = self.perturbed(x)
            found.append(x)
        return found

    def moved(self, name: str, tensor: torch.Tensor, key) -> torch.Tensor:
        """Return theta + eps z, in a tensor of its own.

        Without a key it was computed from parameters that are already perturbed.
        """
        if key is None:
            return tensor
        if self.bundles is not None and live.current() is None:  # a graph has a launch for each
            if (out := self._ready.pop(id(tensor), None)) is not None:
                return out
            if (rows := self.bundles.of.get(name)) is not None:
                return self._bundled(rows, name, tensor)
            if not self.bundles.learned:
                self.order.setdefault(name, Row(name, tensor, key))
        out, before = torch.empty_like(tensor, requires_grad=False), tensor.detach()
        which = {"source": before}
        if (
            self.placed is not None and before.is_cpu
        ):  # FSDP cannot free memory that numpy refers to
            out.copy_(which.pop("source"))
        self._shift(out, name, tensor, key, before, **which)
        return out

    def _bundled(self, rows: noise.Rows, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return theta + eps z of the parameter; the others of its bundle are ready from now."""
        outs = noise.moved_all(rows, self.table(name), distribution=self.distribution)
        self.read.update([row.name for row in rows])
        self._ready = {id(row.tensor): out for row, out in zip(rows, outs, strict=True)}
        return self._ready.pop(id(tensor))

    def slice(self, name: str, tensor: torch.Tensor, key, index: int) -> torch.Tensor:
        """Return tensor[index], perturbed: one expert's weights out of all experts'."""
        before = tensor.detach()[index]
        if key is None:
            return before
        out = before.clone()
        self._shift(out, name, tensor, key, before, offset=index % len(tensor) * out.numel())
        return out

    def lookup(self, input, weight, padding_idx=None, max_norm=None, *args, **kwargs):
        """Perturb only the looked-up rows of an embedding, unless they outnumber its own rows."""
        name, tensor, key = self.embedding(weight, max_norm)
        if key is None or input.numel() > len(tensor) or is_sharded(tensor):
            return LOOKUP(input, self.perturbed(weight), padding_idx, None, *args, **kwargs)
        out = LOOKUP(input, tensor.detach(), padding_idx, None, *args, **kwargs)
        flat = out.view(-1, out.shape[-1])
        self._shift(flat, name, tensor, key, flat, rows=input.reshape(-1))
        return out

    def table(self, name: str) -> np.ndarray:
        """Return the moves of the parameter of that name, as `noise.apply_` takes them."""
        scale = self.scales.get(name, PLAIN)
        if scale.scale not in self._tables:
            self._tables[scale.scale] = noise.table(scale.walk(self.moves))
        return self._tables[scale.scale]

    def _shift(self, out, name: str, tensor: torch.Tensor, key, before, **which) -> None:
        """Perturb `out`, a part of the parameter with the values `before`, within its mask."""
        self.read.add(name)
        scale = self.scales.get(name, PLAIN)
        if scale.threshold is not None and before is out:
            before = out.clone()
        how = {"distribution": self.distribution, **which}
        noise.apply_(out, key, self.table(name), **how)
        if scale.threshold is not None:
            out.copy_(torch.where(within(before, scale.threshold), out, before))


def _is_index(given) -> bool:
    """Return whether it is an int, or an int64 tensor without dimensions, which acts as one."""
    whole = isinstance(given, torch.Tensor) and given.dim() == 0 and given.dtype == torch.int64
    return whole or type(given) is int
