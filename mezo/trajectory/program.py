"""What a run did to its weights, as moves that need neither data nor losses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mezo import noise, rules
from mezo.errors import InputError
from mezo.forms.factors import is_factored, restart_, write_
from mezo.forms.updates import Applied, Update
from mezo.forms.updates import make_ as step_
from mezo.layers import Own
from mezo.perturbation import sides, walk
from mezo.trajectory.format import Step

MAX_WALKS = 2**25  # 3 moves each, of 28 bytes
_WRITE, _UPDATE = 255, 254  # in the place of a rounding: matrices are written; a rule's own update


@dataclass(frozen=True)
class Program:
    """All that steps do to a weight of one parameter group."""

    table: np.ndarray  # of moves
    updates: list[Update]  # those that are no moves: the table has _UPDATE where each is made
    past: list[Applied]  # the projected gradients of the steps applied, and of those before
    number: int  # of steps applied since the run began


def program_of(
    header: dict[str, Any],
    steps: Sequence[Step],
    group: int,
    *,
    finish: bool = True,
    past: Sequence[Applied] = (),
    number: int = 0,
) -> Program:
    """What `steps` do to a weight of parameter group number `group`.

    In place, the walks are repeated too: theta + eps z - 2 eps z + eps z is not quite theta.
    Low-rank updates are written at the end of an interval, where the run wrote them within one, and
    with `finish` after the last step: else they stay in the state, as in the run. `past` and
    `number` are the first group's after the steps before.
    Raises InputError if they are too many for a replay.
    """
    tables: list[np.ndarray] = []
    moves: list[noise.Move] = []  # that are in no table yet: it holds them in a fifth of the memory
    walked = header["perturbation"] == "in_place"
    walks = sum(sum(step.record.cycles) for step in steps) if walked else 0
    if walks > MAX_WALKS:
        raise InputError(f"the log has {walks} walks: a replay holds at most {MAX_WALKS} in memory")
    interval = header["interval"] if header["perturbation"] == "low_rank" else 0
    rule, looks = rule_of(header), sides({"estimator": header.get("estimator", "two_point")})
    updates: list[Update] = []
    history = list(past)
    scaled = any("scale" in entry or "threshold" in entry for entry in header["tensors"])
    plain = rules.is_linear(rule) and not scaled
    for step in steps:
        if len(moves) > 2**16:
            tables, moves = [*tables, noise.table(moves)], []
        seen, grads = step.record, step.record.projected_grads
        if step.written:
            moves.append(written_after(seen.step - 1))
        if walked:
            for probe, cycles in enumerate(seen.cycles):
                moves += walk(seen.step, probe, step.eps, looks) * cycles
        if all(map(math.isfinite, grads)):
            history.append((seen.step, grads))
            number += 1
            how = step.lrs[group], step.weight_decays[group], history, len(history), number
            update = Update(rule, seen.step, *how)
            if plain:
                moves += update.moves(1.0, header["rounding"])
            else:
                moves.append(_mark(_UPDATE, len(updates)))
                updates.append(update)
        if interval and (seen.step + 1) % interval == 0:
            moves.append(written_after(seen.step))
    if interval and finish and steps:
        moves.append(written_after(steps[-1].record.step))
    return Program(np.concatenate([*tables, noise.table(moves)]), updates, history, number)


def rule_of(header: dict[str, Any]) -> dict[str, Any]:
    return rules.options({"name": header["rule"]} | header.get("rule_options", {}))


def written_after(step: int) -> noise.Move:
    """Where a program writes low-rank updates to the matrix."""
    return _mark(_WRITE, step)


def split_at_writing(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a program's table has up to the last writing of a matrix, and what it sums up after."""
    written = np.flatnonzero(table["rounding"] == _WRITE)
    end = int(written[-1]) + 1 if len(written) else 0
    return table[:end], table[end:]


def _mark(kind: int, number: int) -> noise.Move:
    return noise.Move(number, 0, 1.0, 0.0, kind)


def make_(
    tensor: torch.Tensor,
    entry: dict[str, Any],
    header: dict[str, Any],
    program: Program,
    state: dict[str, Any],
) -> None:
    """Run a program on the tensor that a log's `entry` names: in one pass over it, where it can be.

    `state` holds the buffers of a rule and of compensated or master rounding, and the sum of
    low-rank updates, as in the optimizer.
    """
    own = Own(entry.get("scale", 1.0), header.get("modified", "variance"), entry.get("threshold"))
    name, moves = entry["name"], program.table
    if own.scale != 1.0:  # the walks: no table has updates where a tensor has a scale
        moves = moves.copy()
        moves["coefficient"] /= own.scale
    marked = moves["rounding"] >= _UPDATE
    factored = is_factored(tensor, header)
    ends = marked if program.updates or factored else np.zeros_like(marked)
    if header["rounding"] == "compensated":  # splits its number in two at the end of every step
        ends[:-1] |= np.diff(moves["step"].astype(np.int64)) != 0
    for part in np.split(moves, np.flatnonzero(ends) + 1):
        mark, number = (part[-1]["rounding"], int(part[-1]["step"])) if len(part) else (0, 0)
        update = program.updates[number] if mark == _UPDATE else None
        step_(tensor, name, part[part["rounding"] < _UPDATE], update, header, state, own)
        if mark == _WRITE and factored:
            write_(tensor, name, number, header, state)
            restart_(tensor, number, header, state)
