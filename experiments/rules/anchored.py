"""Anchored weight decay (Schweighofer et al., 2026, arXiv:2605.30148), against forgetting.

MeZO(model.named_parameters(), rule=Anchored(10.0))
"""

from dataclasses import dataclass

from mezo.errors import InputError
from mezo.rules import Rule


@dataclass(frozen=True)
class Anchored(Rule):
    """theta <- theta - lr G - lr decay (theta - theta_0): decay towards where the run began.

    The paper takes a decay of 10 with ES at its own rate. theta_0 is kept in a buffer, 4 bytes per
    weight; the paper keeps a copy, too. The paper decays after the update, which differs by
    lr^2 decay G.
    """

    decay: float = 10.0

    buffers = ("anchor",)

    def direction(self, theta, gradient, kept):
        anchor = kept["anchor"] if gradient.began else theta
        return gradient.now() + (theta - anchor) * self.decay, {"anchor": anchor}

    def check(self):
        if not self.decay >= 0:
            raise InputError(f"rule Anchored: decay must not be negative, got {self.decay}")
