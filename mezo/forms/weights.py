"""Where the weights are: here. offload.Offload and distributed's Sharded stand in its place."""

from collections.abc import Iterable, Sequence
from typing import Any

from mezo import noise
from mezo.forms import factors
from mezo.forms.direction import Direction, Part
from mezo.forms.updates import Update, update_
from mezo.noise import Move


class Weights:
    """The weights are where they are computed with; offload.Offload does the same from afar."""

    def direction(self, optimizer: Any, probe: int) -> Direction:
        """A new direction of the step, number `probe`."""
        estimator, memory = optimizer.estimator, optimizer.memory
        found = optimizer.form(
            optimizer.parts(),
            optimizer.settings,
            probe,
            sides=estimator.sides,
            memory=memory,
            states=optimizer.state,
        )
        if estimator.looks_back and probe < len(memory.before):
            found.before = memory.before[probe]
        return found

    def move_(
        self, optimizer: Any, part: Part, moves: Sequence[Move], update: Update | None = None
    ) -> None:
        """The moves of a step, and then the update of a rule that is more than moves."""
        if not len(moves) and update is None:
            return
        settings, table = optimizer.settings, noise.table(moves)
        plain = part.plain and update is None and not optimizer.form.factored
        if plain:  # float32 and float64: all of them in one launch
            noise.apply_all_(part.rows, table, distribution=settings["distribution"])
            return
        for name, p, _ in part.rows:
            state = optimizer.state.get(p, {})
            factors.update_(p, name, table, settings, state)
            if update is not None:
                update_(p, name, update, settings, state, part.scale)
            if state:
                optimizer.state[p] = state

    def end_step_(self, optimizer: Any) -> None:
        """After a step that was counted: low-rank matrices at an interval's end."""
        if optimizer.form.factored:
            factors.write_due_(optimizer.trained(), optimizer.settings, optimizer.state)

    def together(self, optimizer: Any, probes: Iterable[int]) -> None:
        """These directions of a step are estimated next, with the same closure."""

    def queue(self, optimizer: Any, p, name: str, program: Any) -> bool:
        """Whether the moves of a replay are taken, to be made later; else the caller makes them."""
        return False

    def write_(self, optimizer: Any) -> None:
        """Whatever is not in the weights yet."""
        trained, settings = optimizer.trained(), optimizer.settings
        factors.write_now_(trained, settings, optimizer.state, optimizer.memory)
