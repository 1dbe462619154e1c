"""Low rank: the updates accumulated for a matrix W, and how they are written to W.

    A <- A - lr * projected_grad * U                          at each step
    W <- decay W + A V' / sqrt(rank),  A <- 0                 after the last step of an interval

A (m, rank) accumulates the updates of an interval. U (m, rank) is drawn for each step and V
(n, rank) for each interval. low_rank.py has the forward pass.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mezo import noise
from mezo.forms import rounding
from mezo.forms.rounding import HALF, last_rounding
from mezo.noise import Move
from mezo.noise import sharded as shards
from mezo.noise.definition import round_stochastically, rounding_bits
from mezo.record import Memory

State = dict[str, Any]  # a tensor's state: "low_rank" is A, "decay" the pending factor of W
States = Mapping[torch.Tensor, State]  # the optimizer's state
_SPARE = WeakTensorKeyDictionary()  # by matrix: A of the last interval, which is written

Settings = Mapping[str, Any]  # the options in a parameter group or in a log's header


def is_factored(tensor: torch.Tensor, settings: Settings) -> bool:
    """Return whether z has low rank for this tensor: it does for the matrices of a low-rank run."""
    return settings["perturbation"] == "low_rank" and tensor.dim() == 2


@torch.no_grad()
def update_(
    tensor: torch.Tensor,
    name: str,
    moves: Sequence[Move] | np.ndarray,
    settings: Settings,
    state: State,
) -> None:
    """Apply the moves of steps to a weight; for a factored matrix, accumulate them in `state`.

    Weight decay is accumulated there, too: it scales W when W is written, but does not scale A.
    """
    if not is_factored(tensor, settings):
        key, how = noise.tensor_key(settings["seed"], name), settings["distribution"]
        return rounding.update_(tensor, key, moves, settings["rounding"], how, state)
    if not len(moves):
        return
    a, key = factor(tensor, name, settings, state)
    moves = noise.table(moves).copy()
    decay_(state, moves["scale"].tolist())
    moves["scale"] = 1.0
    noise.apply_(a, key, moves, distribution=settings["distribution"])


def decay_(state: State, scales: Iterable[float]) -> None:
    """Note the decay of W by each of `scales`."""
    decay = state.get("decay", 1.0)
    for scale in scales:  # one by one, so that run and replay round alike
        decay *= scale
    if decay != 1:
        state["decay"] = decay


def factor(tensor: torch.Tensor, name: str, settings: Settings, state: State) -> tuple:
    """Return A, which is zero at first, and the key of U."""
    if "low_rank" not in state:
        state["low_rank"] = _reused(tensor, zeros_for(tensor, len(tensor), settings))
    return state["low_rank"], key_of(name, "U", settings)


def _reused(tensor: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return a zero A at the address of the last interval's, which captured graphs read."""
    spare = _SPARE.pop(tensor, None)
    if spare is None or (spare.shape, spare.dtype) != (zeros.shape, zeros.dtype):
        return zeros
    return spare.zero_() if spare.device == zeros.device else zeros


def restart_(tensor: torch.Tensor, step: int, settings: Settings, state: State) -> None:
    """Drop the momentum of U after an interval's last step: it has no meaning for the next V."""
    if is_factored(tensor, settings) and (step + 1) % settings["interval"] == 0:
        state.pop("momentum_buffer", None)


@torch.no_grad()
def write_(tensor: torch.Tensor, name: str, step: int, settings: Settings, state: State) -> None:
    """Set W <- decay W + A V' / sqrt(rank) and A <- 0, after step number `step`."""
    if "low_rank" not in state:
        return
    bits = {"key": noise.tensor_key(settings["seed"], name), "step": step, "probe": 0}
    bits["stream"] = last_rounding(settings["rounding"])
    left, right = state["low_rank"] * scale_of(settings), right_of(tensor, name, settings, step)
    decay = state.get("decay", 1.0)

    def write(rows: torch.Tensor, offset: int) -> None:
        mine = left[offset // tensor.shape[1] :]
        for part in parts_of(rows):
            rows[part].copy_(summed(rows, part, mine, right, bits, decay, offset))

    shards.apply_(tensor, write)
    _SPARE[tensor] = state.pop("low_rank")
    state.pop("decay", None)


def as_written(
    tensor: torch.Tensor, name: str, step: int, settings: Settings, state: State
) -> torch.Tensor:
    """Return what `write_` would make of a weight, as a copy, or the weight if nothing is due."""
    if "low_rank" not in state:
        return tensor
    copy = tensor.detach().to(state["low_rank"].device, copy=True)
    write_(copy, name, step, settings, dict(state))
    return copy


def write_now_(
    trained: Iterable[tuple], settings: Settings, states: States, memory: Memory
) -> None:
    """Write within an interval; `memory` notes before which step, for the run log."""
    if any("low_rank" in state for state in states.values()):
        memory.written = settings["step"]
        write_all_(trained, settings, states)


def write_due_(trained: Iterable[tuple], settings: Settings, states: States) -> None:
    """Write every matrix if the step just made was the last of an interval."""
    if settings["perturbation"] == "low_rank" and settings["step"] % settings["interval"] == 0:
        write_all_(trained, settings, states)


def write_all_(trained: Iterable[tuple], settings: Settings, states: States) -> None:
    """Write the accumulated updates of every matrix in `trained` (see `MeZO.trained`)."""
    for name, p, _ in trained:
        state = states.get(p, {})
        write_(p, name, settings["step"] - 1, settings, state)
        restart_(p, settings["step"] - 1, settings, state)


def parts_of(tensor: torch.Tensor) -> list[slice]:
    """Split a matrix into slices of rows, so that temporaries stay small."""
    elements = 2**16 if tensor.device.type == "cpu" else 2**20
    rows = max(1, elements // max(1, tensor.shape[1]))
    return [slice(i, min(i + rows, len(tensor))) for i in range(0, len(tensor), rows)]


def summed(
    tensor: torch.Tensor,
    part: slice,
    left: torch.Tensor,
    right: torch.Tensor,
    bits: Mapping[str, Any],
    decay: float = 1.0,
    offset: int = 0,
) -> torch.Tensor:
    """Return rows `part` of decay * tensor + left @ right', with the same bits everywhere.

    left (m, rank) and right (n, rank) are float32, or float64 for a float64 matrix. Each product
    and each sum is rounded to that type, column after column, an order that no BLAS promises. For
    a 16-bit matrix the result is then rounded stochastically with `bits` (key, step, probe and
    stream), or to nearest when it is stored. `offset` is the index of the tensor's first element in
    the whole matrix.
    """
    x = tensor[part].to(left.dtype) * decay
    for k in range(left.shape[1]):
        x = x + left[part, k, None] * right[:, k]
    if tensor.dtype not in HALF or bits["stream"] == noise.NEAREST:
        return x
    start, stop = (offset + row * tensor.shape[1] for row in (part.start, part.stop))
    drawn = rounding_bits(start=start, stop=stop, device=tensor.device, **bits)
    return round_stochastically(x, drawn.view(x.shape), tensor.dtype)


def key_of(name: str, factor: str, settings: Settings) -> tuple[int, int]:
    return noise.tensor_key(settings["seed"], f"{name}\0{factor}")  # \0 is in no parameter's name


def zeros_for(tensor: torch.Tensor, rows: int, settings: Settings) -> torch.Tensor:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.zeros(rows, settings["rank"], dtype=dtype, device=tensor.device)


def right_of(tensor: torch.Tensor, name: str, settings: Settings, step: int) -> torch.Tensor:
    """Return V (n, rank) of the interval that contains the step."""
    v, first = zeros_for(tensor, tensor.shape[1], settings), step - step % settings["interval"]
    key, how = key_of(name, "V", settings), settings["distribution"]
    noise.apply_(v, key, [Move(first, 0, 1.0, 1.0)], distribution=how)
    return v


def scale_of(settings: Settings) -> float:
    return 1 / math.sqrt(settings["rank"])  # IEEE 754 rounds both operations
