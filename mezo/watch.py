"""Warnings of a run's first steps, and the end of a run whose losses are not finite."""

import logging
from typing import Any

import numpy as np
import torch

from mezo.closures import Loss
from mezo.errors import InputError
from mezo.estimators import Combined
from mezo.forms.direction import Direction
from mezo.forms.rounding import HALF
from mezo.noise.sharded import local

_JUDGED = 20  # steps looked at before a warning: a schedule may begin near 0


def last_place(tensors: list[torch.Tensor]) -> tuple[float, torch.dtype]:
    """The median unit in the last place of the 16-bit weights, else of all; and their dtype.

    Of at most 4,096 elements a tensor, each for as many as the tensor has.
    """
    tensors = [t for t in tensors if t.dtype in HALF] or tensors
    units, weights = [], []
    for t in tensors:
        part = t.detach().flatten()[:: max(1, t.numel() // 4096)].float()
        unit = torch.finfo(t.dtype).eps * torch.exp2(torch.frexp(part)[1] - 1.0)
        units.append(unit * (part != 0))
        weights.append(torch.full_like(part, t.numel() / max(1, len(part))))
    unit, weight = torch.cat([u.cpu() for u in units]), torch.cat([w.cpu() for w in weights])
    order = unit.argsort()
    half = torch.searchsorted(weight[order].cumsum(0), weight.sum() / 2)
    return float(unit[order[half]]), tensors[0].dtype


class Watch:
    """Looks at every step, says once what will not work, and stops what has stopped learning.

    Attributes:
        looks: Whether the closure is to be looked at before the next estimate, which takes two
            more calls (forms/first_look.py). Set it to False for a closure that is costly, or that
            counts its calls.
        again: The step before which it is to be looked at once more; negative if at none.
        told: What was said of the closure, so that no line is said twice.
        repeats: Whether the closure gave the same loss twice at the same weights.
        refused: How many updates in a row were refused.
        tied: Whether a warning said that the two losses of most first steps were equal.
    """

    def __init__(self) -> None:
        self.looks = self.repeats = True
        self.again = -1
        self.told: set[str] = set()
        self.tied = False
        self.refused = 0
        self.unit: float | None = None  # of the last place of the weights, once it is known
        self.looking = True  # at every step; else at those that are refused alone
        self._sizes: list[float] = []  # of the first projected gradients
        self._log = logging.getLogger("mezo")

    def look_again(self, optimizer: Any) -> None:
        """Have the next estimate look at the closure, if the first did: the model is in train mode.

        Not in several processes, which must make the same number of forward passes.
        """
        if self.again > 0 and getattr(optimizer.processes, "size", 1) == 1:
            self.looks = True

    def first(self, closure: Loss, perturbed: Direction) -> None:
        """After the first estimate: is everything read perturbed, and is eps z representable?"""
        perturbed.check(closure)
        self._name_still(perturbed)
        self.unit, dtype = last_place([local(p) for _, p, _ in perturbed.rows])
        if perturbed.eps < self.unit / 2:
            name = str(dtype).removeprefix("torch.")
            self._log.warning(
                "eps %g is under half a unit in the last place (%.2g) of most %s weights: the two "
                "losses differ by rounding more than by z; take eps %.0e",
                *(perturbed.eps, self.unit, name, 4 * self.unit),
            )

    def _name_still(self, perturbed: Direction) -> None:
        """Warn of parameter groups whose rate is 0 while others' is not: they are not frozen."""
        groups = {id(part.group): part.group for part in perturbed.parts}.values()
        still = [group for group in groups if float(group["lr"]) == 0]
        if 0 < len(still) < len(groups):
            rounded = ", and in place the walk rounds them" if perturbed.moves_weights else ""
            self._log.warning(
                "a parameter group of %d tensors has lr 0, others have not: its tensors are "
                "perturbed like all others, which adds noise to every estimate%s; freeze them "
                "with requires_grad_(False), unless the group gets a rate later",
                *(len(still[0]["params"]), rounded),
            )

    def step(self, found: Combined, optimizer: Any) -> None:
        """Before an update: is the loss finite, and what do the first steps show?"""
        settings = optimizer.settings
        self.refused = 0 if found.finite else self.refused + 1
        self.looking = True
        if not found.finite:
            self._log.warning("step %d: loss %s: update refused", settings["step"], found.loss)
            return
        if self.unit is not None and len(self._sizes) < _JUDGED:
            self._sizes.append(max(map(abs, found.grads.values())))
            if len(self._sizes) == _JUDGED:
                self._judge(self.unit, settings, optimizer.form.moves_weights)
        self.looking = self.unit is None or len(self._sizes) < _JUDGED

    def _judge(self, unit: float, group: dict[str, Any], rounded: bool) -> None:
        """After some steps: are the losses told apart, and do the updates survive rounding?"""
        size = float(np.median(self._sizes))
        if size == 0:
            self.tied = True
            self._log.warning(
                "in most of the first %d steps both losses were the same number, and moved no "
                "weight: take a larger batch (for rewards more prompts a step, or a reward with "
                "more values), raise eps, or compute the loss in float32 (logits.float())",
                _JUDGED,
            )
        update = float(group["lr"]) * size
        if (rounded or group["rounding"] == "nearest") and 0 < update < unit / 2:
            self._log.warning(
                "updates of lr * |projected_grad| = %.2g are under half a unit in the last place "
                "(%.2g) of most weights, and are rounded away: raise lr, or for 16-bit weights "
                'take rounding="stochastic"',
                *(update, unit),
            )

    def stop(self, group: dict[str, Any]) -> None:
        """InputError if the last max_refused updates were all refused."""
        if self.refused >= group["max_refused"]:
            way = "lower lr or eps, or look at the data"
            if not self.repeats:
                way = "its noise drowns the difference that MeZO measures: call model.eval(), or "
                way += "pass common_random_numbers=True"
            raise InputError(
                f"the loss was not finite in {self.refused} steps in a row, the last one step "
                f"{group['step'] - 1}: the weights are those before them; {way}"
            )
