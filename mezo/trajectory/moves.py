"""What a run did to its weights, as moves that need neither data nor losses."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .. import noise
from ..errors import InputError
from ..perturbation import walk
from ..rounding import update_
from ..rules import sgd
from .format import Step

MAX_WALKS = 2**25  # 3 moves each, of 28 bytes


def moves_of(header: dict[str, Any], steps: Sequence[Step], group: int) -> np.ndarray:
    """All that `steps` do to a weight of parameter group number `group`: one table of moves.

    In place, the walks are repeated too: theta + eps z - 2 eps z + eps z is not quite theta.
    Raises InputError if they are too many for a replay.
    """
    tables: list[np.ndarray] = []
    moves: list[noise.Move] = []  # that are in no table yet: it holds them in a fifth of the memory
    walked = header["perturbation"] == "in_place"
    walks = sum(sum(step.record.cycles) for step in steps) if walked else 0
    if walks > MAX_WALKS:
        raise InputError(f"the log has {walks} walks: a replay holds at most {MAX_WALKS} in memory")
    for step in steps:
        if len(moves) > 2**16:
            tables, moves = [*tables, noise.table(moves)], []
        seen, grads = step.record, dict(enumerate(step.record.projected_grads))
        if walked:
            for probe, cycles in enumerate(seen.cycles):
                moves += walk(seen.step, probe, step.eps) * cycles
        if all(map(math.isfinite, grads.values())):
            settings = {"lr": step.lrs[group], "weight_decay": step.weight_decays[group]}
            moves += sgd(seen.step, grads, settings | {"rounding": header["rounding"]})
    return np.concatenate([*tables, noise.table(moves)])


def make_(
    tensor: torch.Tensor,
    name: str,
    header: dict[str, Any],
    moves: np.ndarray,
    state: dict[str, torch.Tensor],
) -> None:
    """Make `moves` on the tensor of that name: in one pass over it, unless a buffer comes between.

    `state` holds the buffers of a compensated or master rounding, as in the optimizer.
    """
    key, parts = noise.tensor_key(header["seed"], name), [moves]
    if header["rounding"] == "compensated":  # splits its number in two at the end of every step
        parts = np.split(moves, np.flatnonzero(np.diff(moves["step"].astype(np.int64))) + 1)
    for part in parts:
        update_(tensor, key, part, header["rounding"], header["distribution"], state)
