"""Updates that moves of z cannot express, applied to a tensor piece by piece.

Momentum, Adam, sign and masked updates work on 2^19 weights at a time on a CPU. The estimate of a
piece is drawn, used and dropped, so that only the buffers that a rule declares have the size of a
tensor. Every single operation is one that IEEE 754 rounds identically everywhere, so that a replay
gives the same bits on any device.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mezo import noise
from mezo.forms import factors
from mezo.forms.rounding import buffer_of, rounding_of
from mezo.layers import PLAIN, TensorScale, within
from mezo.noise import DISTRIBUTIONS, Move
from mezo.record import Applied
from mezo.rules import Rule

PIECE = 2**19  # elements in a piece: enough for several threads, few compared with a tensor


class Update(NamedTuple):
    """The numbers of one step for one parameter group."""

    rule: Rule
    step: int
    lr: float
    decay: float  # the group's weight_decay
    history: Sequence[Applied]  # `Memory.past`
    end: int  # history[end - 1] is this step
    number: int  # number of applied steps, including this one

    @property
    def past(self) -> Sequence[Applied]:
        """The last applied steps within the rule's window, including this one."""
        window = self.rule.window or 1
        start = 0 if window == "all" else max(0, self.end - int(window))
        return self.history[start : self.end]

    @property
    def keep(self) -> float:
        """The factor by which decoupled weight decay multiplies theta before the update."""
        return 1 - self.lr * self.decay


@torch.no_grad()
def update_(
    tensor: torch.Tensor,
    name: str,
    update: Update,
    settings: Mapping[str, Any],
    state: dict[str, Any],
    scale: TensorScale = PLAIN,
) -> None:
    """Apply a step's update to the weight of that name, or to the factor of a low-rank matrix.

    `settings` are those of the optimizer's first parameter group or of a log's header; `state`
    holds the buffers of this weight.
    """
    key, rounding = (
        noise.tensor_key(settings["seed"], name),
        rounding_of(tensor, settings["rounding"]),
    )
    rule, decay = update.rule, None
    if factors.is_factored(tensor, settings):
        tensor, key = factors.factor(tensor, name, settings, state)
        rounding = rounding_of(tensor, settings["rounding"])
        decay = state.get("decay", 1.0) * update.keep
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    beside = buffer_of(rounding, tensor, state)
    began = all(map(state.__contains__, rule.kept))
    for buffer in rule.kept:
        if buffer not in state:
            state[buffer] = torch.zeros(tensor.shape, dtype=wide, device=tensor.device)
    shrink = update.keep if decay is None and rule.decoupled_weight_decay else 1.0
    distribution = settings["distribution"]
    for piece, start in pieces_for(rule, tensor.detach(), distribution):
        span = slice(start, start + piece.numel())
        kept = {b: state[b].view(-1)[span].view(piece.shape) for b in rule.kept}
        rest = None if beside is None else beside.view(-1)[span].view(piece.shape)
        x = rounding.read(piece, rest)
        gradient = PieceGradient(x, start, update, key, distribution, scale.factor, began)
        u, after = rule.direction(x, gradient, kept)
        if scale.threshold is not None:
            u = u * within(piece, scale.threshold)
        x = x * shrink - u * update.lr
        bits = {"key": key, "start": span.start, "stop": span.stop, "step": update.step}
        for buffer, value in after.items():  # before theta, which a value may be a view of
            kept[buffer].copy_(value)
        for target, source in rounding.writes(piece, rest, x, bits):
            target.copy_(source)
    if decay is not None and decay != 1:
        state["decay"] = decay


def pieces_for(
    rule: Rule, tensor: torch.Tensor, distribution: str
) -> Iterable[tuple[torch.Tensor, int]]:
    """Return the pieces that the rule is given, each with the index of its first element."""
    if rule.whole:
        return [(tensor, 0)]
    return noise.pieces(tensor, DISTRIBUTIONS[distribution].group, PIECE)


class PieceGradient:
    """A `rules.Gradient` for the elements from `start` on, whose values are x."""

    def __init__(
        self,
        x: torch.Tensor,
        start: int,
        update: Update,
        key: tuple[int, int],
        distribution: str,
        factor: float,
        began: bool,
    ):
        self.number, self.weight_decay, self.began = update.number, update.decay, began
        self._past = update.past
        self.steps = len(self._past)
        self._x, self._start, self._key = x, start, key
        self._distribution, self._factor = distribution, factor

    def now(self) -> torch.Tensor:
        return self._summed(self._past[-1:], [1.0])

    def weighted(self, weights: Sequence[float]) -> torch.Tensor:
        return self._summed(self._past, weights)

    def squares(self, weights: Sequence[float]) -> torch.Tensor:
        one_each = all(len(grads) == 1 for _, grads in self._past)
        if one_each and DISTRIBUTIONS[self._distribution].signs:  # z^2 is 1: nothing is drawn
            mean = 0.0
            for (_, (grad,)), weight in zip(self._past, weights, strict=True):
                mean += weight * (self._factor * grad) ** 2
            return torch.full(self._x.shape, mean, dtype=self._x.dtype, device=self._x.device)
        total = torch.zeros(self._x.shape, dtype=self._x.dtype, device=self._x.device)
        for applied, weight in zip(self._past, weights, strict=True):
            g = self._summed([applied], [1.0])
            total = total + (g * g) * weight
        return total

    def _summed(self, past: Sequence[Applied], weights: Sequence[float]) -> torch.Tensor:
        """Return the sum of weight * projected_grad * z over steps, averaged over directions."""
        moves = [
            Move(step, i, 1.0, weight * self._factor * g / len(grads))
            for (step, grads), weight in zip(past, weights, strict=True)
            for i, g in enumerate(grads)
        ]
        total = torch.zeros(self._x.shape, dtype=self._x.dtype, device=self._x.device)
        noise.apply_(total, self._key, moves, distribution=self._distribution, offset=self._start)
        return total
