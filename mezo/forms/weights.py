"""The weights of a model that is resident and whole; Offload and Sharded are the alternatives."""

from collections.abc import Iterable, Sequence
from typing import Any

from mezo import noise
from mezo.forms import factors
from mezo.forms.direction import Direction, Part
from mezo.forms.updates import Update, update_
from mezo.noise import Move


class Weights:
    """Weights that stay on the device that computes; offload.Offload has the same methods."""

    def direction(self, optimizer: Any, probe: int) -> Direction:
        """Return direction number `probe` of the optimizer's step."""
        estimator, memory = optimizer.estimator, optimizer.memory
        direction = optimizer.form(
            optimizer.parts(),
            optimizer.settings,
            probe,
            sides=estimator.sides,
            memory=memory,
            states=optimizer.state,
        )
        if estimator.looks_back and probe < len(memory.before):
            direction.before = memory.before[probe]
        return direction

    def move_(
        self, optimizer: Any, part: Part, moves: Sequence[Move], update: Update | None = None
    ) -> None:
        """Apply the moves of a step, and then the update of a rule that needs more than moves."""
        if not len(moves) and update is None:
            return
        settings, table = optimizer.settings, noise.table(moves)
        plain = part.plain and update is None and not optimizer.form.factored
        if plain:  # float32 and float64 tensors move in one launch
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
        """Write low-rank updates to the matrices if the step ended an interval."""
        if optimizer.form.factored:
            factors.write_due_(optimizer.trained(), optimizer.settings, optimizer.state)

    def together(self, optimizer: Any, probes: Iterable[int]) -> None:
        """Announce the directions of a step that are estimated next, with the same closure."""

    def queue(self, optimizer: Any, p, name: str, program: Any) -> bool:
        """Return whether the moves of a replay were queued; if not, the caller makes them."""
        return False

    def write_(self, optimizer: Any) -> None:
        """Write pending low-rank updates to the weights."""
        trained, settings = optimizer.trained(), optimizer.settings
        factors.write_now_(trained, settings, optimizer.state, optimizer.memory)
