"""What a step does to one weight: the walk home, and the rule's update, in one pass where it can.

Momentum, Adam, sign and masked updates are made piece by piece, 2^19 weights at a time on a CPU:
the gradient estimate of a piece is drawn, used and dropped, so that nothing has the size of a
tensor but the buffers that a rule says it keeps. All operations are ones that IEEE 754 rounds
identically everywhere, one at a time, so that a replay has the same bits on any device.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from mezo import noise
from mezo.errors import Held
from mezo.forms import factors
from mezo.forms.rounding import HALF, last_rounding
from mezo.layers import PLAIN, Own, within
from mezo.noise import Move
from mezo.noise.definition import round_stochastically, rounding_bits
from mezo.rules import BUFFERS, is_linear

Applied = tuple[int, Sequence[float]]  # a step that was applied, and its projected gradients
PIECE = 2**19  # elements of a moment at a time: enough for several threads, few beside a tensor
_ROUNDED = {"compensated": "compensation", "master": "master"}


@dataclass(frozen=True)
class Update:
    """A step's numbers, for one parameter group."""

    rule: Mapping[str, Any]
    step: int
    lr: float
    weight_decay: float
    history: Sequence[Applied]  # `rules.remember`
    end: int  # of it: this step is the one before
    number: int  # of steps applied, this one included

    @classmethod
    def of(cls, group: Mapping[str, Any], first: Mapping[str, Any]) -> "Update":
        """A group's part of the step that `rules.remember` has noted in the first group."""
        past, lr, decay = first["past"], float(group["lr"]), group["weight_decay"]
        return cls(first["rule"], first["step"], lr, decay, past, len(past), first["number"])

    @property
    def past(self) -> Sequence[Applied]:
        """The last steps that were applied, as many as the rule looks at, this one included."""
        window = self.rule.get("window") or 1
        return self.history[0 if window == "all" else max(0, self.end - window) : self.end]

    @property
    def grads(self) -> Sequence[float]:
        return self.history[self.end - 1][1]

    def moves(self, factor: float, rounding: str) -> list[Move]:
        """sgd: theta <- (1 - lr weight_decay) theta - lr / n * sum of projected_grad z, last first.

        `factor` is the weight's own (`layers.Own`).
        """
        lr, grads, keep = self.lr * factor, self.grads, noise.KEEP
        rows = [Move(self.step, i, 1.0, -lr * g / len(grads), keep) for i, g in enumerate(grads)]
        rows = rows[::-1]
        rows[0] = rows[0]._replace(scale=1 - self.lr * self.weight_decay)
        rows[-1] = rows[-1]._replace(rounding=last_rounding(rounding))
        return rows


@torch.no_grad()
def make_(
    tensor: torch.Tensor,
    name: str,
    moves: Sequence[Move] | np.ndarray,
    update: Update | None,
    settings: Mapping[str, Any],
    state: dict[str, Any],
    own: Own = PLAIN,
) -> None:
    """Make `moves`, and then the update, on the weight of that name.

    `settings` are those of the optimizer's first group or of a log's header; `state` the buffers.
    An interrupt comes when the weight is whole again.
    """
    if update is not None and is_linear(update.rule) and own.threshold is None:
        moves, update = [*moves, *update.moves(own.factor, settings["rounding"])], None
    interrupt = Held()
    with interrupt:
        factors.update_(tensor, name, moves, settings, state)
    if update is not None:
        _update_(tensor, name, update, settings, state, own, interrupt)
    interrupt.release()


def _update_(tensor, name: str, update: Update, settings, state, own: Own, interrupt: Held) -> None:
    """The rule's update, piece by piece; of a matrix along low-rank directions, on its factor."""
    key, rounding, decay = noise.tensor_key(settings["seed"], name), settings["rounding"], None
    if factors.is_factored(tensor, settings):
        tensor, key = factors.factor(tensor, name, settings, state)
        decay = state.get("decay", 1.0) * (1 - update.lr * update.weight_decay)
    stored = _Stored(tensor, key, rounding, update.step, state)
    wide = stored.wide
    began = {b: b in state for b in _buffers(update.rule)}
    for buffer in began:
        if buffer not in state:
            state[buffer] = torch.zeros(tensor.shape, dtype=wide, device=tensor.device)
    shrunk = decay is None and update.rule.get("decoupled_weight_decay", True)
    scale = 1 - update.lr * update.weight_decay if shrunk else 1.0
    rule = _Rule(update, key, settings["distribution"], own.factor, all(began.values()))
    pieces = list(noise.pieces(tensor.detach(), noise.GROUP[settings["distribution"]], PIECE))

    def computed(piece: torch.Tensor, start: int) -> list[tuple]:
        span = slice(start, start + piece.numel())
        kept = {b: state[b].view(-1)[span].view(piece.shape) for b in began}
        x = stored.read(piece, span)
        u, after = rule.direction(x, start, kept)
        if own.threshold is not None:
            u = u * within(piece, own.threshold)
        x = x * scale - u * update.lr
        return [*stored.writes(piece, span, x), *((kept[b], after[b]) for b in after)]

    interrupt.commit(pieces, computed)
    if decay is not None and decay != 1:
        state["decay"] = decay


def _buffers(rule: Mapping[str, Any]) -> tuple[str, ...]:
    return () if rule.get("window") is not None else BUFFERS.get(rule["name"], ())


class _Stored:
    """How a weight is kept: as it is, with what rounding cut off, or with a float32 master."""

    def __init__(self, tensor, key, rounding: str, step: int, state: MutableMapping[str, Any]):
        half = tensor.dtype in HALF
        self.key, self.step, self.rounding = key, step, rounding if half else "nearest"
        self.wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        self.second = None
        if self.rounding in _ROUNDED:
            name = _ROUNDED[self.rounding]
            if name not in state:
                state[name] = (
                    tensor.detach().float().contiguous()
                    if name == "master"
                    else torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                )
            self.second = state[name]

    def _part(self, piece, span: slice):
        assert self.second is not None
        return self.second.view(-1)[span].view(piece.shape)

    def read(self, piece, span: slice):
        if self.rounding == "master":
            return self._part(piece, span)
        x = piece.to(self.wide)
        return x + self._part(piece, span).float() if self.second is not None else x

    def writes(self, piece, span: slice, x) -> list[tuple]:
        if self.rounding == "stochastic":
            where = {"step": self.step, "stream": noise.ROUND_UPDATE, "device": x.device}
            bits = rounding_bits(self.key, span.start, span.stop, **where).view(x.shape)
            return [(piece, round_stochastically(x, bits, piece.dtype))]
        if self.rounding == "master":
            return [(piece, x.to(piece.dtype)), (self._part(piece, span), x)]
        kept = x.to(piece.dtype)
        if self.rounding == "compensated":
            return [(piece, kept), (self._part(piece, span), (x - kept.float()).to(piece.dtype))]
        return [(piece, kept)]


class _Rule:
    """The direction that a rule takes, for a piece of one tensor."""

    def __init__(self, update: Update, key, distribution: str, factor: float, began: bool):
        self.update, self.key, self.distribution = update, key, distribution
        self.factor, self.began = factor, began  # whether the buffers hold an earlier step
        self.rule, self.past = update.rule, update.past

    def direction(self, x: torch.Tensor, start: int, kept: Mapping[str, torch.Tensor]):
        """(what lr multiplies, the buffers' new values) for weights x, from element `start` on."""
        name = self.rule["name"]
        if name == "momentum":
            return self._momentum(x, start, kept)
        if name == "adam":
            return self._adam(x, start, kept)
        g = self._summed(x, start, self.past[-1:], [1.0])
        return (g.sign() if name == "sign" else g), {}

    def _summed(self, x, start: int, past: Sequence[Applied], weights: Sequence[float]):
        """The sum of weight * projected_grad * z over steps and their directions."""
        moves = [
            Move(step, i, 1.0, weight * self.factor * g / len(grads))
            for (step, grads), weight in zip(past, weights, strict=True)
            for i, g in enumerate(grads)
        ]
        found = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        noise.apply_(found, self.key, moves, distribution=self.distribution, offset=start)
        return found

    def _gradient(self, x, start: int):
        g = self._summed(x, start, self.past[-1:], [1.0])
        coupled = not self.rule["decoupled_weight_decay"] and self.update.weight_decay
        return g + x * self.update.weight_decay if coupled else g

    def _momentum(self, x, start: int, kept):
        beta, dampening = self.rule["momentum"], self.rule["dampening"]
        if self.rule["window"] is None:
            g = self._gradient(x, start)
            buf = kept["momentum_buffer"] * beta + g * (1 - dampening) if self.began else g
            return (g + buf * beta if self.rule["nesterov"] else buf), {"momentum_buffer": buf}
        weights = [w * (1 - dampening) for w in _powers(beta, len(self.past))]
        if len(self.past) == self.update.number:  # torch does not dampen the first
            weights[0] = _powers(beta, len(self.past))[0]
        if self.rule["nesterov"]:
            weights = [w * beta for w in weights]
            weights[-1] += 1.0
        return self._summed(x, start, self.past, weights), {}

    def _adam(self, x, start: int, kept):
        (beta1, beta2), number = self.rule["betas"], self.update.number
        if self.rule["window"] is None:
            g = self._gradient(x, start)
            m = kept["exp_avg"] * beta1 + g * (1 - beta1)
            v = kept["exp_avg_sq"] * beta2 + (g * g) * (1 - beta2)
            after, used = {"exp_avg": m, "exp_avg_sq": v}, number
        else:
            used, after = len(self.past), {}
            weights = [w * (1 - beta1) for w in _powers(beta1, used)]
            m = self._summed(x, start, self.past, weights)
            v = self._second_moment(x, start, [w * (1 - beta2) for w in _powers(beta2, used)])
        m = m * (1 / (1 - _power(beta1, used)))
        v = v * (1 / (1 - _power(beta2, used)))
        root = v.double().sqrt().to(v.dtype)  # float32's square root is not IEEE 754's everywhere
        return m / (root + self.rule["eps"]), after

    def _second_moment(self, x, start: int, weights: Sequence[float]):
        if self.distribution == "rademacher" and all(len(g) == 1 for _, g in self.past):
            found = 0.0  # z^2 is 1
            for (_, (g,)), weight in zip(self.past, weights, strict=True):
                found += weight * (self.factor * g) ** 2
            return torch.full(x.shape, found, dtype=x.dtype, device=x.device)
        v = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        for one, weight in zip(self.past, weights, strict=True):
            g = self._summed(x, start, [one], [1.0])
            v = v + (g * g) * weight
        return v


@lru_cache(maxsize=16)
def _powers(beta: float, n: int) -> tuple[float, ...]:
    """beta^(n - 1), ..., beta, 1: by multiplication alone, which is the same everywhere."""
    found = [1.0]
    while len(found) < n:
        found.append(found[-1] * beta)
    return tuple(reversed(found))


def _power(beta: float, n: int) -> float:
    return 1.0 if n == 0 else _powers(beta, n + 1)[0]
