"""Addax (Li et al., 2024, arXiv:2410.06441): forward passes on long examples, gradients on short.

theta <- theta - lr (alpha g0 z + (1 - alpha) g1),    g1 by back-propagation, applied in place
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mezo import MeZO


class Addax:
    """One step on two batches, of long examples and of short ones; `lr` is that of both parts.

    The optimizer must perturb in scratch, so that both parts are measured at theta, and its rate
    is set to alpha lr. The paper takes alpha from 1e-4 to 1e-1 at rates of 1e-5 to 1e-4.

    A run log holds only the first part, since a gradient is no number: a run cannot be replayed.
    """

    def __init__(self, optimizer: MeZO, lr: float, alpha: float):
        self.optimizer, self.lr, self.alpha = optimizer, lr, alpha
        optimizer.param_groups[0]["lr"] = alpha * lr

    def step(self, long: Callable[[], float], short: Callable[[], torch.Tensor]) -> float:
        """Update, and return the mean loss of the long examples' two passes."""
        found = self.optimizer.estimate(long)
        with torch.enable_grad(), self._in_place():
            short().backward()
        self.optimizer.step()
        return found.loss

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Apply each gradient as it is made, and drop it."""

        def applied(p: torch.Tensor) -> None:
            with torch.no_grad():
                p.sub_(p.grad * ((1 - self.alpha) * self.lr))
            p.grad = None

        made = [
            p.register_post_accumulate_grad_hook(applied) for _, p, _ in self.optimizer.trained()
        ]
        try:
            yield
        finally:
            for hook in made:
                hook.remove()
