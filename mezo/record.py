"""What a step leaves behind: its record, for the run log, and what the next steps look back at."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

Applied = tuple[int, Sequence[float]]  # a step that was applied, and its projected gradients


@dataclass(frozen=True)
class Record:
    """What one step did to the weights; with the settings in force, all that a replay needs."""

    step: int
    projected_grads: tuple[float, ...]  # one a probe; nothing was applied unless all are finite
    loss: float
    cycles: tuple[int, ...]  # walks a probe: 1, or more where losses were accumulated


@dataclass
class Memory:
    """What a run remembers from step to step beside the weights: a few numbers, no tensor.

    A checkpoint has it: `MeZO.state_dict` writes what is set into the first parameter group, and
    `MeZO.load_state_dict` takes it from there.
    """

    past: list[Applied] = field(default_factory=list)  # as far back as the rule's window reaches
    number: int = 0  # steps applied since the run began
    written: int | None = None  # the step before which low-rank updates were last written early
    paired: bool | None = None  # whether one forward pass gives both losses; None: not tried yet
    before: list[float] = field(default_factory=list)  # the last step's losses, for one_point
    history: tuple[float, ...] = ()  # |projected_grad| as measured, for clip_quantile
    second_moment: tuple[float, float] = (0.0, 0.0)  # scalar_adam's mean square and its weight

    def remember(self, step: int, grads: Sequence[float], window: int | str | None) -> None:
        """Note a step that was applied; the past is kept for as many steps as the window has."""
        past = [*self.past, (step, tuple(grads))]
        self.past = past if window == "all" else past[-(int(window or 1)) :]
        self.number += 1

    def as_dict(self) -> dict[str, Any]:
        """What is not as it was when the run began."""
        fresh = Memory()
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value != getattr(fresh, name)}

    @classmethod
    def taken_from(cls, group: MutableMapping[str, Any]) -> "Memory":
        """The memory that a saved parameter group has; its keys are taken out of the group."""
        names = [f.name for f in fields(cls) if f.name in group]
        return cls(**{name: group.pop(name) for name in names})
