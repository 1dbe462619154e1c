"""What a step leaves behind: its record for the run log, and the memory of later steps."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

Applied = tuple[int, Sequence[float]]  # number of an applied step, and its projected gradients


@dataclass(frozen=True)
class Record:
    """What one step did to the weights; with the options in force, all that a replay needs."""

    step: int
    projected_grads: tuple[float, ...]  # one per probe; nothing was applied unless all are finite
    loss: float
    cycles: tuple[int, ...]  # walks per probe: 1, or more if losses were accumulated


@dataclass
class Memory:
    """What a run remembers between steps besides the weights: a few numbers and no tensor.

    It is part of a checkpoint: `MeZO.state_dict` writes the fields that were set into the first
    parameter group, and `MeZO.load_state_dict` reads them from there.
    """

    past: list[Applied] = field(default_factory=list)  # applied steps within the rule's window
    number: int = 0  # number of steps applied since the run began
    written: int | None = None  # the step before which low-rank updates were last written early
    paired: bool | None = None  # whether one forward pass gives both losses; None: not tried yet
    stacked: bool | None = None  # whether one forward pass gives those of several directions
    before: list[float] = field(default_factory=list)  # the last step's losses, for one_point
    history: tuple[float, ...] = ()  # |projected_grad| as measured, for clip_quantile
    second_moment: tuple[float, float] = (0.0, 0.0)  # scalar_adam's mean square and its weight

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their values at the start of a run."""
        fresh = Memory()
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(fresh, name)}

    @classmethod
    def taken_from(cls, group: MutableMapping[str, Any]) -> "Memory":
        """Return the memory in a saved parameter group, and remove its keys from the group."""
        names = [f.name for f in fields(cls) if f.name in group]
        return cls(**{name: group.pop(name) for name in names})
