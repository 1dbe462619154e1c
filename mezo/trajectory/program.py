"""What a run did to its weights, as a program of moves that needs neither data nor losses."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mezo import noise, rules
from mezo.errors import InputError
from mezo.estimators import sides_of
from mezo.forms.factors import as_written, is_factored, restart_, write_
from mezo.forms.factors import update_ as move_
from mezo.forms.rounding import ROUNDINGS
from mezo.forms.updates import Update, update_
from mezo.layers import TensorScale
from mezo.mezo import InPlace, MeZO, sgd
from mezo.noise import Move
from mezo.record import Applied
from mezo.rules import RULES, Rule
from mezo.trajectory.format import Step

MAX_WALKS = 2**25  # of 3 moves each, and 28 bytes per move


@dataclass(frozen=True)
class Write:
    """Write the accumulated low-rank updates to the matrix, after step number `step`."""

    step: int


@dataclass(frozen=True)
class Look:
    """Compare the tensor with the log's digest of it, before step number `step`."""

    step: int


Action = np.ndarray | Update | Write | Look  # a table of moves, what moves cannot express, ...


@dataclass(frozen=True)
class Program:
    """Everything that the steps do to a weight of one parameter group."""

    actions: list[Action]
    past: list[Applied] = field(default_factory=list)  # applied steps, including earlier ones
    number: int = 0  # number of steps applied since the run began


def program_of(
    header: dict[str, Any],
    steps: Sequence[Step],
    group: int,
    *,
    finish: bool = True,
    past: Sequence[Applied] = (),
    number: int = 0,
    looks: Sequence[int] = (),
    known: Mapping[str, type[Rule]] = RULES,
) -> Program:
    """Return the program of what `steps` do to a weight of parameter group number `group`.

    The walks of an in-place run are part of it, because theta + eps z - 2 eps z + eps z is rounded
    and so not quite theta. Low-rank updates are written at the end of each interval and where the
    run wrote them early.

    Args:
        header: The header of the log's first segment.
        steps: The steps to repeat, in order.
        group: The number of the parameter group.
        finish: Whether to write low-rank updates after the last step. Without it they stay in the
            state, as they do in the run.
        past: `Memory.past` before the first of `steps`.
        number: `Memory.number` before the first of `steps`.
        looks: The steps before which the tensors are compared, in order; not before the first.
        known: The rules by name.

    Raises InputError if the rule is unknown or the walks are too many for a replay's memory.
    """
    actions: list[Action] = []
    moves: list[Move] = []  # not in a table yet; a table holds them in a fifth of the memory
    walked = MeZO.forms[header["perturbation"]].moves_weights
    walks = sum(sum(step.record.cycles) for step in steps) if walked else 0
    if walks > MAX_WALKS:
        raise InputError(f"the log has {walks} walks; a replay holds at most {MAX_WALKS} in memory")
    interval = header["interval"] if header["perturbation"] == "low_rank" else 0
    rule, sides = rule_of(header, known), sides_of(header.get("estimator", "two_point"))
    legs = InPlace.legs[header.get("sides", sides)]
    history, coming = list(past), list(reversed(looks))
    scaled = any("scale" in entry or "threshold" in entry for entry in header["tensors"])

    def then(*following: Action) -> None:
        actions.extend([noise.table(moves)] if moves else [])
        actions.extend(following)
        moves.clear()

    for step in steps:
        if len(moves) > 2**16:
            then()
        record, grads = step.record, step.record.projected_grads
        if step.written:
            then(Write(record.step - 1))
        if coming and coming[-1] == record.step:
            then(Look(coming.pop()))
        if walked:
            for probe, cycles in enumerate(record.cycles):
                moves += [Move(record.step, probe, 1.0, leg * step.eps) for leg in legs] * cycles
        if all(map(math.isfinite, grads)):
            history.append((record.step, grads))
            number += 1
            how = step.lrs[group], step.weight_decays[group], history, len(history), number
            update = Update(rule, record.step, *how)
            if rule.linear and not scaled:
                moves += sgd(update, header["rounding"])
            else:
                then(update)
        if interval and (record.step + 1) % interval == 0:
            then(Write(record.step))
    then(*([Write(steps[-1].record.step)] if interval and finish and steps else []))
    then(*[Look(step) for step in coming])  # the end's
    return Program(actions, history, number)


def rule_of(header: dict[str, Any], known: Mapping[str, type[Rule]]) -> Rule:
    """Return the rule that a log names.

    Raises InputError for a rule that is not in `known`: a log must never cause code to be imported.
    """
    name = header["rule"]
    if name not in known:
        raise InputError(
            f"the log's rule {name} is not built in: pass rules=[{name.split(':')[-1]}], or --rule "
            f"{name} on the command line"
        )
    return rules.rule_of({"name": name} | header.get("rule_options", {}), known)


def split_at_writing(actions: Sequence[Action]) -> tuple[list[Action], list[np.ndarray]]:
    """Split a program after its last `Write`; of what follows, return only the tables of moves."""
    ends = [i + 1 for i, action in enumerate(actions) if isinstance(action, Write)]
    end = ends[-1] if ends else 0
    return list(actions[:end]), [x for x in actions[end:] if isinstance(x, np.ndarray)]


def make_(
    tensor: torch.Tensor,
    entry: dict[str, Any],
    header: dict[str, Any],
    program: Program,
    state: dict[str, Any],
    look: Callable[[str, int, torch.Tensor], None] | None = None,
) -> None:
    """Run a program on the tensor that a log's `entry` names, in one pass over it if possible.

    `state` is the tensor's optimizer state: the buffers of a rule and of compensated or master
    rounding, and the accumulated low-rank updates. `look` is called as `look(name, step, tensor)`
    where the program has a Look.
    """
    modified, threshold = header.get("modified", "variance"), entry.get("threshold")
    scale, name = TensorScale(entry.get("scale", 1.0), modified, threshold), entry["name"]
    factored = is_factored(tensor, header)
    each_step = ROUNDINGS[header["rounding"]].each_step
    tables: list[np.ndarray] = []  # moves to apply in one pass

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
        elif isinstance(action, Update) and action.rule.linear and scale.threshold is None:
            tables.append(noise.table(sgd(action, header["rounding"], scale.factor)))
        elif isinstance(action, Update):
            move()
            update_(tensor, name, action, header, state, scale)
        elif isinstance(action, Look):
            move()
            if look is not None:
                look(name, action.step, as_written(tensor, name, action.step - 1, header, state))
        elif factored:
            move()
            write_(tensor, name, action.step, header, state)
            restart_(tensor, action.step, header, state)
    move()


def _over(walks: np.ndarray, scale: float) -> np.ndarray:
    """Divide walks by the tensor's scale; tables hold only walks if any tensor has a scale."""
    if scale == 1.0:
        return walks
    walks = walks.copy()
    walks["coefficient"] /= scale
    return walks
