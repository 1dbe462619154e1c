"""Full rank in one forward pass: the first half of the rows sees theta + eps z, the second - eps z.

A matrix is read once. theta + eps z and theta - eps z are made from one draw in a buffer of twice
its size, one batched product takes both, and the buffer is free again. A step thus draws z twice,
for the pass and for the update, instead of three times, and launches half the kernels. Rounded
weights have the bits of `Scratch`; the losses differ from those of two passes in the order in which
the products are summed.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from mezo import noise
from mezo.closures import Loss
from mezo.forms.one_pass import together
from mezo.forms.products import Products, computed_in
from mezo.forms.reads import LOOKUP, eager
from mezo.forms.scratch import Moved, Scratch
from mezo.layers import PLAIN
from mezo.noise.live import Numbers
from mezo.noise.sharded import is_sharded


class FullRank(Scratch):
    """`Scratch` that has both losses from one pass, where a closure is `Paired` and it pays.

    It pays on a GPU, where two small passes wait for their launches. A closure with
    `full_rank=True` asks for it anywhere.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dtypes: set[torch.dtype] = set()  # dtypes in which products were computed

    @contextmanager
    def both(self, batch_size: int) -> Iterator[None]:
        """Return a context in which rows of the first half see theta + eps z, others theta - eps z.

        The forward pass takes 2 batch_size rows. Raises Unpaired if a parameter is read and a row
        cannot be assigned to a half.
        """
        halves = [Side(self, self.moves(sign)) for sign in (+1, -1)]
        with eager(), Stacked(self, halves, (+1, -1), 2 * batch_size):
            yield

    def losses(self, closure: Callable[[], float]) -> tuple[float, float]:
        """Return loss_plus and loss_minus, from one forward pass if the closure allows it."""
        if not self._pays(closure):
            return super().losses(closure)
        began = self.memory.paired
        pair = together(closure, self)
        if self.memory.paired and not began:
            logging.getLogger("mezo").info("full rank: both losses come from one forward pass")
        return super().losses(closure) if pair is None else pair

    def _pays(self, closure: Callable[[], float]) -> bool:
        if not isinstance(closure, Loss) or closure.paired is None or self.placed is not None:
            return False
        asked = closure.paired.full_rank
        return self.rows[0].tensor.device.type == "cuda" if asked is None else asked

    def with_eps(self, times: float) -> "FullRank":
        """Return the same direction with `times` the eps."""
        settings = {**self.settings, "eps": times * self.eps}
        return FullRank(self.parts, settings, self.probe, sides=self.sides, states=self.states)


class Side(Moved):
    """One sign, for functions that are not products."""

    def moved(self, name: str, tensor: torch.Tensor, key) -> torch.Tensor:
        if key is None:  # computed from parameters that are already perturbed
            return tensor
        return super().moved(name, tensor, key)


class Stacked(Products):
    """A mode in which products take both perturbed matrices at once; halves do everything else."""

    perturbed: FullRank  # type: ignore[assignment]
    halves: list[Side]  # type: ignore[assignment]

    def sequence(self, device: torch.device) -> tuple[Hashable, Numbers] | None:
        found = [half.sequence(device) for half in self.halves]
        if None in found:
            return None
        (plus, numbers), (minus, _) = found  # type: ignore[misc]
        return ("stacked", self.batch, plus, minus), numbers

    def forget(self) -> None:
        for half in self.halves:
            half.forget()

    def _multiply(self, x, weight, bias, transposed: bool) -> torch.Tensor:
        """Return x W' + b (transposed) or x W + b; each half of the rows has its own W and b."""
        x = self._with_rows(x, x.dim())
        name, tensor, key = self.rows[id(weight)]
        both = self._both(name, tensor, key)
        dtype = computed_in(x)
        self.perturbed.dtypes.add(dtype)
        w = (both.mT if transposed else both).to(dtype)
        flat = x.reshape(2, -1, w.shape[1]).to(dtype)
        if bias is None:
            out = torch.bmm(flat, w)
        else:
            b = torch.stack([half.perturbed(bias) for half in self.halves])[:, None].to(dtype)
            out = torch.baddbmm(b, flat, w)
        return out.view(*x.shape[:-1], w.shape[2])

    def _both(self, name: str, tensor: torch.Tensor, key) -> torch.Tensor:
        """Return theta + eps z and theta - eps z, as one tensor of twice theta's size."""
        if key is None:  # computed from parameters that are already perturbed
            return torch.stack([half.rows[id(tensor)][1] for half in self.halves])
        self.read.add(name)
        plus, minus = self.halves
        out = tensor.new_empty((2, *tensor.shape), requires_grad=False)
        if self.perturbed.scales.get(name, PLAIN).threshold is not None:
            return torch.stack([half.moved(name, tensor, key) for half in self.halves])
        how = {"distribution": self.perturbed.distribution, "source": tensor.detach()}
        noise.apply_both_(out, key, plus.table(name), minus.table(name), **how)
        return out

    def _is_matrix(self, x, weight, bias, transposed: bool) -> bool:
        found = super()._is_matrix(x, weight, bias, transposed)
        return found and not is_sharded(self.rows[id(weight)][1])

    def _lookup(self, input, weight, padding_idx=None, max_norm=None, *args, **kwargs):
        self.embedding(weight, max_norm)
        ids = self._with_rows(input, input.dim() + 1)
        found = [
            half.call(LOOKUP, (part, weight, padding_idx, None, *args), kwargs)
            for half, part in zip(self.halves, ids.chunk(2), strict=True)
        ]
        return torch.cat(found)
