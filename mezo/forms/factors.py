"""Low rank: what is kept of a matrix W, and how it is written to W.

    A <- A - lr * projected_grad * U                          at each step
    W <- decay W + A V' / sqrt(rank),  A <- 0                 with the last step of an interval

A (m, rank) sums up the updates of an interval; U (m, rank) is drawn anew each step, V (n, rank)
each interval. low_rank.py has the forward pass.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mezo import noise
from mezo.forms import rounding
from mezo.forms.rounding import HALF, last_rounding
from mezo.noise import Move
from mezo.noise import sharded as shards
from mezo.noise.definition import round_stochastically, rounding_bits
from mezo.record import Memory

State = dict[str, Any]  # of a tensor: "low_rank" is A, "decay" what W is to be scaled by
States = Mapping[torch.Tensor, State]  # the optimizer's
Settings = Mapping[str, Any]  # a parameter group's, or those in a log's header


def is_factored(tensor: torch.Tensor, settings: Settings) -> bool:
    """Whether z has low rank: for a matrix, in a run that says so."""
    return settings["perturbation"] == "low_rank" and tensor.dim() == 2


@torch.no_grad()
def update_(
    tensor: torch.Tensor,
    name: str,
    moves: Sequence[Move] | np.ndarray,
    settings: Settings,
    state: State,
) -> None:
    """Make the moves of steps on the weight of that name; for a matrix, add them up in `state`.

    Decay waits there too: W is scaled when it is written, A is not.
    """
    if not is_factored(tensor, settings):
        key, how = noise.tensor_key(settings["seed"], name), settings["distribution"]
        return rounding.update_(tensor, key, moves, settings["rounding"], how, state)
    if not len(moves):
        return
    a, key = factor(tensor, name, settings, state)
    moves, decay = noise.table(moves).copy(), state.get("decay", 1.0)
    for scale in moves["scale"].tolist():  # one by one, in a replay as in the run
        decay *= scale
    moves["scale"] = 1.0
    noise.apply_(a, key, moves, distribution=settings["distribution"])
    if decay != 1:
        state["decay"] = decay


def factor(tensor: torch.Tensor, name: str, settings: Settings, state: State) -> tuple:
    """A, of zeros at first, and the key of U."""
    if "low_rank" not in state:
        state["low_rank"] = zeros_for(tensor, len(tensor), settings)
    return state["low_rank"], key_of(name, "U", settings)


def restart_(tensor: torch.Tensor, step: int, settings: Settings, state: State) -> None:
    """After the last step of an interval: what is kept of U means nothing along another V."""
    if is_factored(tensor, settings) and (step + 1) % settings["interval"] == 0:
        state.pop("momentum_buffer", None)


@torch.no_grad()
def write_(tensor: torch.Tensor, name: str, step: int, settings: Settings, state: State) -> None:
    """W <- decay W + A V' / sqrt(rank), A <- 0, after step number `step`."""
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
    for kept in ("low_rank", "decay"):
        state.pop(kept, None)


def write_now_(
    trained: Iterable[tuple], settings: Settings, states: States, memory: Memory
) -> None:
    """Write within an interval; the memory tells the run log before which step."""
    if any("low_rank" in state for state in states.values()):
        memory.written = settings["step"]
        write_all_(trained, settings, states)


def write_due_(trained: Iterable[tuple], settings: Settings, states: States) -> None:
    """Write after the last step of an interval."""
    if settings["perturbation"] == "low_rank" and settings["step"] % settings["interval"] == 0:
        write_all_(trained, settings, states)


def write_all_(trained: Iterable[tuple], settings: Settings, states: States) -> None:
    """Write every matrix of `MeZO.trained()`."""
    for name, p, _ in trained:
        state = states.get(p, {})
        write_(p, name, settings["step"] - 1, settings, state)
        restart_(p, settings["step"] - 1, settings, state)


def parts_of(tensor: torch.Tensor) -> list[slice]:
    """Rows, as many at a time as make a small temporary."""
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
    """Rows `part` of decay * tensor + left @ right', the same bits everywhere.

    left (m, rank) and right (n, rank) are float32, or float64 for a float64 matrix. Each product
    and each sum is rounded to that, in the order of the columns, which no BLAS promises; then a
    16-bit matrix, to nearest or with the `bits` of a key, step, probe and stream. `offset` is the
    index of the tensor's first element in the whole matrix.
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
    return noise.tensor_key(settings["seed"], f"{name}\0{factor}")  # no parameter has such a name


def zeros_for(tensor: torch.Tensor, rows: int, settings: Settings) -> torch.Tensor:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.zeros(rows, settings["rank"], dtype=dtype, device=tensor.device)


def right_of(tensor: torch.Tensor, name: str, settings: Settings, step: int) -> torch.Tensor:
    """V (n, rank) of the interval that the step is in."""
    v, first = zeros_for(tensor, tensor.shape[1], settings), step - step % settings["interval"]
    key, how = key_of(name, "V", settings), settings["distribution"]
    noise.apply_(v, key, [Move(first, 0, 1.0, 1.0)], distribution=how)
    return v


def scale_of(settings: Settings) -> float:
    return 1 / math.sqrt(settings["rank"])  # both rounded as IEEE 754 says
