"""How a 16-bit weight takes an update that is smaller than its last place.

    nearest       rounds to nearest, which loses most updates (bfloat16 keeps 5 % of updates of
                  1e-6); it exists for comparison
    stochastic    rounds up or down at random, so that the mean is the update; it needs no memory
                  and is the default
    compensated   keeps what was cut off in a second number of the same dtype per weight
    master        applies updates to a float32 copy, 4 bytes per weight; meant for adapters

All four are functions of the moves alone, so that a run log replays them to the bit. Updates of
float32 and float64 weights are always rounded to nearest, as IEEE 754 does. docs/numerics.md has
the measurements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from mezo import noise
from mezo.noise import Move
from mezo.noise.definition import round_stochastically, rounding_bits

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rounding:
    """How updates of 16-bit weights are rounded; this base class rounds to nearest.

    Attributes:
        last: The rounding of an update's last move (noise.Move); earlier moves stay float32.
        buffer: The name of the buffer kept beside a weight, or None.
        each_step: Whether each step's moves must be applied separately, because every step ends
            with a rounding from which the next step starts.
    """

    last: int = noise.NEAREST
    buffer: str | None = None
    each_step: bool = False

    def begin(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the buffer before the first update; None if there is none."""
        return None

    def move_(self, tensor, key, moves, distribution: str, state: dict[str, Any]) -> None:
        """Apply `moves` to a 16-bit weight, and round once, after the last of them."""
        noise.apply_(tensor, key, moves, distribution=distribution)

    def read(self, piece: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """Return a piece of the weight in float32, or in float64 for a float64 weight."""
        return piece if piece.dtype == torch.float64 else piece.float()

    def writes(self, piece, kept, x: torch.Tensor, bits: Mapping[str, Any]) -> list[tuple]:
        """Return the (target, source) copies that store x; `bits` identify the random bits."""
        return [(piece, x.to(piece.dtype))]


class _Stochastic(Rounding):
    def writes(self, piece, kept, x, bits):
        drawn = rounding_bits(**bits, stream=noise.ROUND_UPDATE, device=x.device).view(x.shape)
        return [(piece, round_stochastically(x, drawn, piece.dtype))]


class _Compensated(Rounding):
    def begin(self, tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def move_(self, tensor, key, moves, distribution, state):
        cut = buffer_of(self, tensor, state).view(-1)
        for piece, start in noise.pieces(tensor.detach(), noise.DISTRIBUTIONS[distribution].group):
            rest = cut[start : start + piece.numel()].view(piece.shape)
            wide = self.read(piece, rest)
            noise.apply_(wide, key, moves, distribution=distribution, offset=start)
            for target, source in self.writes(piece, rest, wide, {}):
                target.copy_(source)

    def read(self, piece, kept):
        return piece.float() + kept.float()

    def writes(self, piece, kept, x, bits):
        rounded = x.to(piece.dtype)
        return [(piece, rounded), (kept, (x - rounded.float()).to(piece.dtype))]


class _Master(Rounding):
    def begin(self, tensor):
        return tensor.detach().float().contiguous()

    def move_(self, tensor, key, moves, distribution, state):
        master = buffer_of(self, tensor, state)
        noise.apply_(master, key, moves, distribution=distribution)
        tensor.copy_(master)

    def read(self, piece, kept):
        return kept

    def writes(self, piece, kept, x, bits):
        return [(piece, x.to(piece.dtype)), (kept, x)]


ROUNDINGS: dict[str, Rounding] = {
    "stochastic": _Stochastic(last=noise.ROUND_UPDATE),
    "compensated": _Compensated(buffer="compensation", each_step=True),
    "master": _Master(buffer="master"),
    "nearest": Rounding(),
}


def rounding_of(tensor: torch.Tensor, name: str) -> Rounding:
    """Return how updates of this tensor are rounded in a run with the option rounding=`name`."""
    return ROUNDINGS[name] if tensor.dtype in HALF else ROUNDINGS["nearest"]


def buffer_of(rounding: Rounding, tensor: torch.Tensor, state: dict[str, Any]) -> Any:
    """Return the buffer kept beside a weight, created on first use; None if there is none."""
    if rounding.buffer is None:
        return None
    if rounding.buffer not in state:
        state[rounding.buffer] = rounding.begin(tensor)
    state[rounding.buffer] = state[rounding.buffer].contiguous()  # a loaded one may not be
    return state[rounding.buffer]


@torch.no_grad()
def update_(
    tensor: torch.Tensor,
    key: tuple[int, int],
    moves: Sequence[Move] | np.ndarray,
    rounding: str,
    distribution: str,
    state: dict[str, torch.Tensor],
) -> None:
    """Apply `moves` to a weight, and round once, after the last of them, as `rounding` says.

    `state` is empty at first; it keeps the buffer of "compensated" and "master" between calls.
    """
    if len(moves):
        rounding_of(tensor, rounding).move_(tensor, key, moves, distribution, state)


def keep_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Restore the buffers' dtypes after `load_state_dict`, which casts them to the weights'."""
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for i, p in zip(numbers, params, strict=True):
        for name, saved in state_dict["state"].get(i, {}).items():
            if isinstance(saved, torch.Tensor):
                optimizer.state[p][name] = saved.to(p.device, copy=True)


def last_rounding(rounding: str) -> int:
    """Return the rounding of an update's last move; earlier moves stay in float32."""
    return ROUNDINGS[rounding].last
