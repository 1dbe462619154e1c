"""Settings of the estimate that change in the course of a run: eps, and the number of directions.

    schedule = Schedule(optimizer, num_samples=linear(1, 16, steps=20_000))
    for batch in batches:
        schedule.step()
        optimizer.step(lambda: model(**batch).loss)

The learning rate has torch's and transformers' own schedulers. These are functions of the
optimizer's step, so that a resumed run needs no state of theirs; the run log has what was in force.
"""

from collections.abc import Callable

from mezo.errors import InputError
from mezo.mezo import MeZO


class Schedule:
    """Sets `eps` and `num_samples` for the step to come, by functions of its number from 0 on."""

    def __init__(
        self,
        optimizer: MeZO,
        *,
        eps: Callable[[int], float] | None = None,
        num_samples: Callable[[int], float] | None = None,
    ):
        self.optimizer, self.eps, self.num_samples = optimizer, eps, num_samples

    def step(self) -> None:
        """Before each step. InputError for a value that is not positive."""
        number, found = self.optimizer.param_groups[0]["step"], {}
        if self.eps is not None:
            found["eps"] = float(self.eps(number))
        if self.num_samples is not None:
            found["num_samples"] = round(self.num_samples(number))
        for name, value in found.items():
            if not value > 0:
                raise InputError(f"the schedule of {name} gives {value} at step {number}")
        for group in self.optimizer.param_groups:
            group.update(found)


def linear(start: float, end: float, steps: int, *, stairs: int = 20) -> Callable[[int], float]:
    """From `start` at step 0 to `end` at the last of `steps`, in stairs of like length.

    The paper's schedule of n (Appendix A.2) is linear(1, n, steps). Each stair is a new header of
    about 100 bytes in the run log.
    """
    if steps < 1 or stairs < 2:
        raise InputError(f"steps must be at least 1 and stairs 2, got {steps} and {stairs}")

    def value(step: int) -> float:
        stair = min(step * stairs // steps, stairs - 1)
        return start + (end - start) * stair / (stairs - 1)

    return value
