"""Full rank in one forward pass: the first half of the rows sees theta + eps z, the second - eps z.

A matrix is read once. theta + eps z and theta - eps z are made from one draw in a buffer of twice
its size, one batched product takes both, and the buffer is free again. A step thus draws z twice,
for the pass and for the update, instead of three times, and launches half the kernels. Rounded
weights have the bits of `Scratch`; the losses differ from those of two passes in the order in which
the products are summed.

Several directions of a step share a pass where the trained matrices are small, as an adapter's are:
what is frozen is then read once for all of them.
"""

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch

from mezo import noise
from mezo.closures import Loss
from mezo.forms.direction import Direction
from mezo.forms.one_pass import together
from mezo.forms.products import Products, computed_in
from mezo.forms.reads import LOOKUP, eager
from mezo.forms.scratch import Moved, Scratch
from mezo.layers import PLAIN
from mezo.noise.live import Numbers, numbers_of
from mezo.noise.sharded import is_sharded

_BUFFER = 2**22  # elements of all perturbed copies of a matrix, if it has more than two


class OnePass(Direction):
    """A direction of full rank that has both losses from one pass, if the closure asks for it."""

    def in_one_pass(self, closure: Loss) -> tuple[float, float] | None:
        if (aside := self.aside(closure)) is None:
            return None
        began, pair = self.memory.paired, together(closure, aside)
        if pair is not None and not began:
            logging.getLogger("mezo").info("full rank: both losses come from one forward pass")
        return pair

    def aside(self, closure: Loss) -> "FullRank | None":
        """Return what makes theta + eps z aside, where one pass pays; None if it does not."""
        asked = closure.paired is not None and closure.paired.full_rank
        is_home = len(self.ahead) in (0, len(self.walk))
        if not (asked and is_home and self.apply_all_ is None):  # and it is here
            return None
        how = {"sides": self.sides, "memory": self.memory, "states": self.states}
        made = FullRank(self.parts, self.settings, self.probe, **how)
        made.bundles, made.together = self.bundles, self.together
        return made


class FullRank(OnePass, Scratch):
    """`Scratch` that has both losses from one pass, where a closure is `Paired` and it pays.

    It pays on a GPU, where two small passes wait for their launches. A closure with
    `full_rank=True` asks for it anywhere.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dtypes: set[torch.dtype] = set()  # dtypes in which products were computed

    @contextmanager
    def both(self, batch_size: int, others: Sequence[Self] = ()) -> Iterator[None]:
        """Return a context in which rows of the first half see theta + eps z, others theta - eps z.

        The forward pass takes 2 batch_size rows, and as many more for each of `others`, which are
        directions of the same step. Raises Unpaired if a parameter is read and a row cannot be
        assigned to a half.
        """
        directions, signs = (self, *others), (+1, -1)
        groups = [Moved(one, one.moves(sign)) for one in directions for sign in signs]
        with eager(), Stacked(directions, groups, signs, len(groups) * batch_size):
            yield

    def most(self) -> int:
        """Return how many directions a pass may take: the buffers of one matrix stay small."""
        largest = max(tensor.numel() for _, tensor, _ in self.rows)
        return max(1, _BUFFER // (2 * largest))

    def aside(self, closure: Loss) -> "FullRank | None":
        asked = closure.paired and closure.paired.full_rank
        if asked is None:
            asked = self.rows[0].tensor.device.type == "cuda"
        return self if asked and self.placed is None else None

    def with_eps(self, times: float) -> "FullRank":
        """Return the same direction with `times` the eps."""
        settings = {**self.settings, "eps": times * self.eps}
        return FullRank(self.parts, settings, self.probe, sides=self.sides, states=self.states)


class Stacked(Products):
    """A mode in which products take all perturbed matrices at once; groups do everything else."""

    perturbed: FullRank  # type: ignore[assignment]
    groups: list[Moved]  # type: ignore[assignment]
    takes_derived = True

    def sequence(self, device: torch.device) -> tuple[Hashable, Numbers] | None:
        found = [group.sequence(device) for group in self.groups]
        if None in found:
            return None
        keys = [key for key, _ in found]  # type: ignore[misc]
        probes = [one.probe for one in self.directions]
        step, beyond = self.perturbed.step, tuple([probe - probes[0] for probe in probes])
        return ("stacked", self.batch, beyond, *keys), numbers_of(step, probes, step)

    def forget(self) -> None:
        for group in self.groups:
            group.forget()

    def _multiply(self, x, weight, bias, transposed: bool) -> torch.Tensor:
        """Return x W' + b (transposed) or x W + b; each half of the rows has its own W and b."""
        x = self._with_rows(x, x.dim())
        name, tensor, key = self.rows[id(weight)]
        both = self._both(name, tensor, key)
        dtype = computed_in(x)
        self.perturbed.dtypes.add(dtype)
        w = (both.mT if transposed else both).to(dtype)
        flat = x.reshape(len(self.groups), -1, w.shape[1]).to(dtype)
        if bias is None:
            out = torch.bmm(flat, w)
        else:
            b = torch.stack([group.perturbed(bias) for group in self.groups])
            out = torch.baddbmm(b[:, None].to(dtype), flat, w)
        return out.view(*x.shape[:-1], w.shape[2])

    def _both(self, name: str, tensor: torch.Tensor, key) -> torch.Tensor:
        """Return theta + eps z and theta - eps z of each direction, (groups, *theta.shape)."""
        if key is None:  # computed from parameters that are already perturbed
            return torch.stack([group.rows[id(tensor)][1] for group in self.groups])
        self.read.add(name)
        if self.perturbed.scales.get(name, PLAIN).threshold is not None:
            return torch.stack([group.moved(name, tensor, key) for group in self.groups])
        out = tensor.new_empty((len(self.groups), *tensor.shape), requires_grad=False)
        how = {"distribution": self.perturbed.distribution, "source": tensor.detach()}
        for i in range(0, len(out), 2):
            plus, minus = (group.table(name) for group in self.groups[i : i + 2])
            noise.apply_both_(out[i : i + 2], key, plus, minus, **how)
        return out

    def _is_matrix(self, x, weight, bias, transposed: bool) -> bool:
        found = super()._is_matrix(x, weight, bias, transposed)
        return found and not is_sharded(self.rows[id(weight)][1])

    def _lookup(self, input, weight, padding_idx=None, max_norm=None, *args, **kwargs):
        self.embedding(weight, max_norm)
        ids = self._with_rows(input, input.dim() + 1)
        found = [
            group.call(LOOKUP, (part, weight, padding_idx, None, *args), kwargs)
            for group, part in zip(self.groups, ids.chunk(len(self.groups)), strict=True)
        ]
        return torch.cat(found)
