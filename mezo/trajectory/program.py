"""What a run did to its weights, as moves that need neither data nor losses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mezo import noise, rules
from mezo.errors import InputError
from mezo.estimators import sides_of
from mezo.forms.factors import is_factored, restart_, write_
from mezo.forms.factors import update_ as move_
from mezo.forms.rounding import ROUNDINGS
from mezo.forms.updates import Update, update_
from mezo.layers import TensorScale
from mezo.mezo import LEGS, MeZO, sgd
from mezo.noise import Move
from mezo.record import Applied
from mezo.rules import RULES, Rule
from mezo.trajectory.format import Step

MAX_WALKS = 2**25  # 3 moves each, of 28 bytes


@dataclass(frozen=True)
class Write:
    """After the step of that number, low-rank updates are written to the matrix."""

    step: int


Action = np.ndarray | Update | Write  # a table of moves, an update that is more than moves, a write


@dataclass(frozen=True)
class Program:
    """All that steps do to a weight of one parameter group."""

    actions: list[Action]
    past: list[Applied] = field(default_factory=list)  # the steps applied, and those before
    number: int = 0  # of steps applied since the run began


def program_of(
    header: dict[str, Any],
    steps: Sequence[Step],
    group: int,
    *,
    finish: bool = True,
    past: Sequence[Applied] = (),
    number: int = 0,
    known: Mapping[str, type[Rule]] = RULES,
) -> Program:
    """What `steps` do to a weight of parameter group number `group`.

    In place, the walks are repeated too: theta + eps z - 2 eps z + eps z is not quite theta.
    Low-rank updates are written at the end of an interval, where the run wrote them within one, and
    with `finish` after the last step: else they stay in the state, as in the run. `past` and
    `number` are the first group's after the steps before. `known` are the rules by name.
    Raises InputError if they are too many for a replay.
    """
    actions: list[Action] = []
    moves: list[Move] = []  # that are in no table yet: it holds them in a fifth of the memory
    walked = MeZO.forms[header["perturbation"]].moves_weights
    walks = sum(sum(step.record.cycles) for step in steps) if walked else 0
    if walks > MAX_WALKS:
        raise InputError(f"the log has {walks} walks: a replay holds at most {MAX_WALKS} in memory")
    interval = header["interval"] if header["perturbation"] == "low_rank" else 0
    rule, sides = rule_of(header, known), sides_of(header.get("estimator", "two_point"))
    legs = LEGS[header.get("sides", sides)]
    history = list(past)
    scaled = any("scale" in entry or "threshold" in entry for entry in header["tensors"])

    def then(*following: Action) -> None:
        actions.extend([noise.table(moves)] if moves else [])
        actions.extend(following)
        moves.clear()

    for step in steps:
        if len(moves) > 2**16:
            then()
        seen, grads = step.record, step.record.projected_grads
        if step.written:
            then(Write(seen.step - 1))
        if walked:
            for probe, cycles in enumerate(seen.cycles):
                moves += [Move(seen.step, probe, 1.0, leg * step.eps) for leg in legs] * cycles
        if all(map(math.isfinite, grads)):
            history.append((seen.step, grads))
            number += 1
            how = step.lrs[group], step.weight_decays[group], history, len(history), number
            update = Update(rule, seen.step, *how)
            if rule.linear and not scaled:
                moves += sgd(update, header["rounding"])
            else:
                then(update)
        if interval and (seen.step + 1) % interval == 0:
            then(Write(seen.step))
    then(*([Write(steps[-1].record.step)] if interval and finish and steps else []))
    return Program(actions, history, number)


def rule_of(header: dict[str, Any], known: Mapping[str, type[Rule]]) -> Rule:
    """The rule that a log names. InputError for one that is not known: a file imports no code."""
    name = header["rule"]
    if name not in known:
        raise InputError(
            f"the log's rule {name} is not one of mezo's: give it, rules=[{name.split(':')[-1]}], "
            f"or --rule {name} on the command line"
        )
    return rules.rule_of({"name": name} | header.get("rule_options", {}), known)


def split_at_writing(actions: Sequence[Action]) -> tuple[list[Action], list[np.ndarray]]:
    """A program up to the last writing of a matrix, and the tables of what it sums up after."""
    ends = [i + 1 for i, action in enumerate(actions) if isinstance(action, Write)]
    end = ends[-1] if ends else 0
    return list(actions[:end]), [x for x in actions[end:] if isinstance(x, np.ndarray)]


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
    modified, threshold = header.get("modified", "variance"), entry.get("threshold")
    scale, name = TensorScale(entry.get("scale", 1.0), modified, threshold), entry["name"]
    factored = is_factored(tensor, header)
    each_step = ROUNDINGS[header["rounding"]].each_step
    tables: list[np.ndarray] = []  # moves that are made in one pass

    def move() -> None:
        if not tables:
            return
        moves = np.concatenate(tables)
        ends = np.flatnonzero(np.diff(moves["step"].astype(np.int64))) + 1
        for part in np.split(moves, ends) if each_step else [moves]:
            move_(tensor, name, part, header, state)
        tables.clear()

    for action in program.actions:
        if isinstance(action, np.ndarray):
            tables.append(_over(action, scale.scale))
        elif isinstance(action, Update) and action.rule.linear and not scale.masked:
            tables.append(noise.table(sgd(action, header["rounding"], scale.factor)))
        elif isinstance(action, Update):
            move()
            update_(tensor, name, action, header, state, scale)
        elif factored:
            move()
            write_(tensor, name, action.step, header, state)
            restart_(tensor, action.step, header, state)
    move()


def _over(walks: np.ndarray, scale: float) -> np.ndarray:
    """The walks of a tensor with a scale: no table has updates where a tensor has one."""
    if scale == 1.0:
        return walks
    walks = walks.copy()
    walks["coefficient"] /= scale
    return walks
