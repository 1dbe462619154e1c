"""What becomes of an update that is smaller than a 16-bit weight's last place.

    nearest       mostly nothing: bfloat16 keeps 5 % of updates of 1e-6. For comparison
    stochastic    up or down, so that the mean is the update. No memory: the default
    compensated   what was cut off is kept, in a second number of the same dtype a weight
    master        a float32 copy takes the updates: 4 bytes a weight. For adapters

All four are functions of the moves alone, so a run log replays them to the bit. Nothing of it
matters to float32 and float64 weights: theirs are rounded to nearest, as IEEE 754 does.
docs/numerics.md has the measurements.
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
    """How the update of a 16-bit weight is rounded to it. The methods are called for such alone.

    Attributes:
        last: the rounding of an update's last move (noise.Move); the moves before it stay float32.
        buffer: the name of what is kept beside a weight; None: nothing.
        each_step: a step's moves are made apart from the next one's, as every step ends with a
            rounding that the next one begins from.
    """

    last: int = noise.NEAREST
    buffer: str | None = None
    each_step: bool = False

    def begin(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The buffer before the first update."""
        return None

    def move_(self, tensor, key, moves, distribution: str, state: dict[str, Any]) -> None:
        """Apply `moves`, rounded once, after the last of them."""
        noise.apply_(tensor, key, moves, distribution=distribution)

    def read(self, piece: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """A piece of the weight in float32; of a float64 weight, in float64."""
        return piece if piece.dtype == torch.float64 else piece.float()

    def writes(self, piece, kept, x: torch.Tensor, bits: Mapping[str, Any]) -> list[tuple]:
        """(target, source) pairs that store x; `bits` say which random bits are the piece's."""
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
        for piece, start in noise.pieces(tensor.detach(), noise.GROUP[distribution]):
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
    """How updates of this tensor are rounded, in a run whose option is `name`."""
    return ROUNDINGS[name] if tensor.dtype in HALF else ROUNDINGS["nearest"]


def buffer_of(rounding: Rounding, tensor: torch.Tensor, state: dict[str, Any]) -> Any:
    """The tensor that is kept beside a weight, made at first; None where nothing is."""
    if rounding.buffer is None:
        return None
    if rounding.buffer not in state:
        state[rounding.buffer] = rounding.begin(tensor)
    state[rounding.buffer] = state[rounding.buffer].contiguous()  # one from a file may not be
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
    """Apply `moves` to a weight, rounded once, after the last of them, as `rounding` says.

    `state` keeps the buffer of "compensated" and "master" from call to call; empty at first.
    """
    if len(moves):
        rounding_of(tensor, rounding).move_(tensor, key, moves, distribution, state)


def keep_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """After `load_state_dict`: torch has cast every buffer to the dtype of its weight."""
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for i, p in zip(numbers, params, strict=True):
        for name, saved in state_dict["state"].get(i, {}).items():
            if isinstance(saved, torch.Tensor):
                optimizer.state[p][name] = saved.to(p.device, copy=True)


def last_rounding(rounding: str) -> int:
    """The rounding of an update's last move; those before it are kept in float32."""
    return ROUNDINGS[rounding].last
