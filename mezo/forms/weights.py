"""The weights of a model that is resident and whole; Offload and Sharded are the alternatives."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from mezo import noise
from mezo.forms import factors
from mezo.forms.direction import Direction, Part
from mezo.forms.updates import Update, update_
from mezo.noise import Move


class Weights:
    """Weights that stay on the device that computes; offload.Offload has the same methods."""

    here: ClassVar[bool] = True  # they lie whole where they are: there is nothing more to do

    def direction(self, optimizer: Any, probe: int) -> Direction:
        """Return direction number `probe` of the optimizer's step."""
        return optimizer.plan.new(probe)

    def move_(
        self, optimizer: Any, part: Part, moves: Sequence[Move], update: Update | None = None
    ) -> None:
        """Apply the moves of a step, and then the update of a rule that needs more than moves."""
        settings, table = optimizer.settings, noise.table(moves)
        if part.plain and update is None:  # float32 and float64 tensors move in one launch
            noise.apply_all_(part.rows, table, distribution=settings["distribution"])
            return
        drawn = optimizer.plan.bundles.drawn if update is None and self.here else None
        if drawn is not None:  # low rank: A of all matrices moves in one launch
            drawn.add_(part.rows, table, optimizer.state)
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

    def queue(self, optimizer: Any, p, name: str, program: Any) -> bool:
        """Return whether the moves of a replay were queued; if not, the caller makes them."""
        return False

    def as_written(self, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and value of every trained weight, as `write_` would leave it; write none."""
        settings = optimizer.settings
        for name, p, _ in optimizer.trained():
            state = optimizer.state.get(p, {})
            yield name, factors.as_written(p, name, settings["step"] - 1, settings, state)

    def write_(self, optimizer: Any) -> None:
        """Write pending low-rank updates to the weights."""
        trained, settings = optimizer.trained(), optimizer.settings
        factors.write_now_(trained, settings, optimizer.state, optimizer.memory)
