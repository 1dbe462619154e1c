"""Schedules for the options of the estimate: eps and the number of directions.

    schedule = Schedule(optimizer, num_samples=linear(1, 16, steps=20_000))
    for batch in batches:
        schedule.step()
        optimizer.step(lambda: model(**batch).loss)

For the learning rate, use the schedulers of torch or transformers. The schedules here are functions
of the optimizer's step, so that a resumed run needs no state for them; the run log records the
values that were in force.
"""

from collections.abc import Callable

from mezo.errors import InputError
from mezo.mezo import MeZO


class Schedule:
    """Sets `eps` and `num_samples` for the next step, by functions of its number, counted from 0.

    An option without a function stays as it is.
    """

    def __init__(
        self,
        optimizer: MeZO,
        *,
        eps: Callable[[int], float] | None = None,
        num_samples: Callable[[int], float] | None = None,
    ):
        self.optimizer, self.eps, self.num_samples = optimizer, eps, num_samples

    def step(self) -> None:
        """Set the options, before each step. Raises InputError for a value that is not positive."""
        number, values = self.optimizer.param_groups[0]["step"], {}
        if self.eps is not None:
            values["eps"] = float(self.eps(number))
        if self.num_samples is not None:
            values["num_samples"] = round(self.num_samples(number))
        for name, value in values.items():
            if not value > 0:
                raise InputError(f"the schedule of {name} gives {value} at step {number}")
        for group in self.optimizer.param_groups:
            group.update(values)


def linear(start: float, end: float, steps: int, *, stairs: int = 20) -> Callable[[int], float]:
    """Return a schedule from `start` at step 0 to `end` at the last of `steps`, in equal stairs.

    The paper's schedule of n (Appendix A.2) is linear(1, n, steps). Each stair adds a header of
    about 100 bytes to the run log. Raises InputError unless steps >= 1 and stairs >= 2.
    """
    if steps < 1 or stairs < 2:
        raise InputError(
            f"steps must be at least 1 and stairs at least 2, got {steps} and {stairs}"
        )

    def value(step: int) -> float:
        stair = min(step * stairs // steps, stairs - 1)
        return start + (end - start) * stair / (stairs - 1)

    return value
