"""What becomes of an update that is smaller than a 16-bit weight's last place.

    nearest       mostly nothing: bfloat16 keeps 5 % of updates of 1e-6. For comparison
    stochastic    up or down, so that the mean is the update. No memory: the default
    compensated   what was cut off is kept, in a second number of the same dtype a weight
    master        a float32 copy takes the updates: 4 bytes a weight. For adapters

All four are functions of the moves alone, so a run log replays them to the bit. Nothing of it
matters to float32 and float64 weights: theirs are rounded to nearest, as IEEE 754 does.
docs/numerics.md has the measurements.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from mezo import noise
from mezo.errors import Held
from mezo.noise import Move

ROUNDINGS = ("stochastic", "compensated", "master", "nearest")
HALF = (torch.bfloat16, torch.float16)


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
    if not len(moves):
        return
    if tensor.dtype not in HALF or rounding in ("nearest", "stochastic"):  # the moves say which
        noise.apply_(tensor, key, moves, distribution=distribution)
    elif rounding == "master":
        master = state.get("master", tensor)
        state["master"] = master = master.detach().float()
        try:
            noise.apply_(master, key, moves, distribution=distribution)
        finally:  # Ctrl-C between the two would leave a weight behind its master
            tensor.copy_(master)
    else:
        if "compensation" not in state:
            state["compensation"] = torch.zeros_like(tensor, requires_grad=False)
        parts = [
            list(noise.pieces(one, noise.GROUP[distribution]))
            for one in (tensor.detach(), state["compensation"])
        ]
        interrupt = Held()
        interrupt.commit(
            [(*kept, cut) for kept, (cut, _) in zip(*parts, strict=True)],
            lambda kept, start, cut: _split(kept, cut, key, moves, distribution, start),
        )
        interrupt.release()


def _split(kept, cut, key, moves, distribution: str, start: int) -> list[tuple]:
    """The sum of both after `moves`, in two again."""
    wide = kept.float() + cut.float()
    noise.apply_(wide, key, moves, distribution=distribution, offset=start)
    rounded = wide.to(kept.dtype)
    return [(kept, rounded), (cut, wide - rounded.float())]


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
    return noise.ROUND_UPDATE if rounding == "stochastic" else noise.NEAREST
