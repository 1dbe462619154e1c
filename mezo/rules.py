"""What is done with projected_grad * z: a rule turns a step's numbers into moves of a weight."""

from dataclasses import dataclass
from typing import Any

from . import noise
from .noise import Move
from .rounding import last_rounding


@dataclass(frozen=True)
class Record:
    """What one step did to the weights; with the settings in force, all that a replay needs."""

    step: int
    projected_grads: tuple[float, ...]  # one a probe; nothing was applied unless all are finite
    loss: float
    cycles: tuple[int, ...]  # walks a probe: 1, or more where losses were accumulated


def sgd(step: int, grads: dict[int, float], group: dict[str, Any]) -> list[Move]:
    """theta <- (1 - lr weight_decay) theta - lr / n * sum of projected_grad z, last z first."""
    lr, keep = float(group["lr"]), noise.KEEP
    moves = [Move(step, i, 1.0, -lr * g / len(grads), keep) for i, g in grads.items()][::-1]
    moves[0] = moves[0]._replace(scale=1 - lr * group["weight_decay"])
    moves[-1] = moves[-1]._replace(rounding=last_rounding(group["rounding"]))
    return moves
