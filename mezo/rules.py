"""What is done with G = projected_grad * z, averaged over the directions: a rule.

    sgd          theta <- theta - lr G
    momentum     buf <- momentum buf + G;  theta <- theta - lr buf
    adam         moments of G and of its square, for each weight
    sign         theta <- theta - lr sign(G)
    scalar_adam  one second moment for all weights: it scales the step, and costs nothing

A rule is a value: a frozen dataclass of plain numbers, which the run log keeps, with the function
`direction` that turns G into what lr multiplies. `MeZO(..., rule=...)` takes one, or the name of
one here, which stands for its defaults; docs/extending.md shows how to write your own.

Momentum and Adam keep their moments in buffers of the weights' size, or, with a `window`, keep
none: a run's history is its projected gradients, and from those the moments of one small piece of a
tensor at a time are made again, used, and dropped (Appendix B.2 of the paper).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch

from mezo.errors import InputError
from mezo.foreign import imported
from mezo.record import Memory


class Gradient(Protocol):
    """G for the piece of a tensor that a rule is asked about; drawn when it is asked for."""

    number: int  # of steps applied since the run began, this one included
    began: bool  # whether the buffers hold an earlier step's values; at first they are zeros
    steps: int  # that the history has within the rule's window, this one included
    weight_decay: float

    def now(self) -> torch.Tensor:
        """G of this step."""

    def weighted(self, weights: Sequence[float]) -> torch.Tensor:
        """The sum of weight * G over the last `steps` steps, the oldest first."""

    def squares(self, weights: Sequence[float]) -> torch.Tensor:
        """The sum of weight * G * G over them."""


class Rule:
    """The base of every rule: subclass it as a frozen dataclass whose fields JSON can hold.

    Attributes:
        buffers: names of the tensors of a weight's size that it keeps, zeros at first.
        window: how many past steps `Gradient.weighted` sees ("all", or a number), for a rule that
            keeps no buffers then; None is this step alone, with buffers.
        linear: theta only ever moves by multiples of this step's z, so that the moves themselves
            are the update (sgd).
        additive: `direction` is linear in the gradients, and so may be applied to a low-rank
            factor in the place of its matrix.
        decoupled_weight_decay: theta is multiplied by 1 - lr weight_decay before the update. Else
            `direction` sees to decay itself.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    window: int | str | None = None
    decoupled_weight_decay: bool = True

    def direction(
        self, theta: torch.Tensor, gradient: Gradient, kept: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """What lr multiplies, and the buffers' new values, for a piece of one tensor.

        `theta`, the buffers `kept` and what is returned have one shape, in float32 (float64 for a
        float64 weight). Nothing is changed in place. A replay calls it again: the same numbers must
        give the same bits on every device, so take operations that IEEE 754 rounds alike
        everywhere (+, -, *, /, comparisons, sign), and of roots those of float64.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raise InputError, naming the option, for values that cannot work."""

    def scaled(self, grads: dict[int, float], memory: Memory) -> dict[int, float]:
        """The projected gradients as they are applied and recorded."""
        return grads

    @property
    def kept(self) -> tuple[str, ...]:
        """The buffers that it keeps as it is set."""
        return self.buffers if self.window is None else ()

    @property
    def replayed(self) -> "Rule":
        """The rule that repeats what the records hold."""
        return self


@dataclass(frozen=True)
class SGD(Rule):
    """theta <- (1 - lr weight_decay) theta - lr G. No memory; the paper's, and the default."""

    linear = additive = True

    def direction(self, theta, gradient, kept):
        return gradient.now(), {}


@dataclass(frozen=True)
class Momentum(Rule):
    """torch.optim.SGD's momentum, of G.

    Args:
        momentum, dampening, nesterov: as torch.optim.SGD has them.
        window: None keeps a buffer of 4 bytes a weight (8 for float64). A number of steps, or
            "all", keeps none: the buffer is summed up anew from the last `window` projected
            gradients, at the cost of as many draws of z a step. What an older step would add is
            left out: at most momentum^window / (1 - momentum) of the largest |G|; 150 steps at 0.9
            leave out 1.4e-6 of it.
        decoupled_weight_decay: False adds weight_decay * theta to G, as torch.optim.SGD does; not
            with a window, as the history has no theta.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    window: int | str | None = None
    decoupled_weight_decay: bool = True

    buffers = ("momentum_buffer",)
    additive = True

    def check(self) -> None:
        _check_betas("momentum", [self.momentum])
        if not 0 <= self.dampening < 1:
            raise InputError(f"rule momentum: dampening must be in [0, 1), got {self.dampening}")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise InputError("rule momentum: nesterov needs momentum and no dampening")
        _check_window("momentum", self)

    def direction(self, theta, gradient, kept):
        beta, dampening = self.momentum, self.dampening
        if self.window is None:
            g = _coupled(self, theta, gradient)
            buf = kept["momentum_buffer"] * beta + g * (1 - dampening) if gradient.began else g
            return (g + buf * beta if self.nesterov else buf), {"momentum_buffer": buf}
        powers = _powers(beta, gradient.steps)
        weights = [w * (1 - dampening) for w in powers]
        if gradient.steps == gradient.number:  # torch does not dampen the first
            weights[0] = powers[0]
        if self.nesterov:
            weights = [w * beta for w in weights]
            weights[-1] += 1.0
        return gradient.weighted(weights), {}


@dataclass(frozen=True)
class Adam(Rule):
    """Adam, or with its default of decoupled weight decay AdamW, of G.

    Args:
        betas, eps: as torch.optim.Adam has them.
        window: None keeps two buffers, 8 bytes a weight (16 for float64). A number of steps, or
            "all", keeps none: both moments are computed anew from the last `window` projected
            gradients, with weights that sum to 1, at the cost of as many draws of z a step. A
            moment is then off by at most 2 beta^window of the largest |G| (or G^2): 0.999 needs
            6,900 steps for 1e-3. With Rademacher directions, one a step, the second moment needs no
            draw.
        decoupled_weight_decay: False adds weight_decay * theta to G; not with a window.

    With one direction a step, G / sqrt(v) depends little on the weight: expect no gain over a tuned
    sgd (arXiv:2605.03869); it is here to compare with.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    window: int | str | None = None
    decoupled_weight_decay: bool = True

    buffers = ("exp_avg", "exp_avg_sq")

    def check(self) -> None:
        _check_betas("adam", self.betas, 2)
        _check_eps("adam", self.eps)
        _check_window("adam", self)

    def direction(self, theta, gradient, kept):
        beta1, beta2 = self.betas
        if self.window is None:
            g = _coupled(self, theta, gradient)
            m = kept["exp_avg"] * beta1 + g * (1 - beta1)
            v = kept["exp_avg_sq"] * beta2 + (g * g) * (1 - beta2)
            after, used = {"exp_avg": m, "exp_avg_sq": v}, gradient.number
        else:
            used, after = gradient.steps, {}
            m = gradient.weighted([w * (1 - beta1) for w in _powers(beta1, used)])
            v = gradient.squares([w * (1 - beta2) for w in _powers(beta2, used)])
        m = m * (1 / (1 - _power(beta1, used)))
        v = v * (1 / (1 - _power(beta2, used)))
        root = v.double().sqrt().to(v.dtype)  # float32's square root is not IEEE 754's everywhere
        return m / (root + self.eps), after


@dataclass(frozen=True)
class Sign(Rule):
    """theta <- theta - lr sign(G). No memory. lr is the size of every weight's step."""

    def direction(self, theta, gradient, kept):
        return gradient.now().sign(), {}


@dataclass(frozen=True)
class ScalarAdam(Rule):
    """sgd with lr / (sqrt(v) + eps), v the bias-corrected mean of projected_grad^2.

    One number for all weights (MEAZO, arXiv:2605.03869): lr is then about the size of a weight's
    step, whatever the loss's scale. What the run log holds are projected gradients so scaled.
    """

    beta: float = 0.99
    eps: float = 1e-8

    linear = additive = True

    def check(self) -> None:
        _check_betas("scalar_adam", [self.beta])
        _check_eps("scalar_adam", self.eps)

    def direction(self, theta, gradient, kept):
        return gradient.now(), {}

    def scaled(self, grads, memory):
        """Over the root of the mean square of all projected gradients up to now."""
        mean, weight = memory.second_moment
        square = sum([g * g for g in grads.values()]) / len(grads)
        mean = mean * self.beta + square * (1 - self.beta)
        weight = weight * self.beta + (1 - self.beta)
        memory.second_moment = mean, weight
        return {i: g / (math.sqrt(mean / weight) + self.eps) for i, g in grads.items()}

    @property
    def replayed(self) -> Rule:
        return SGD()


RULES: dict[str, type[Rule]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "adam": Adam,
    "sign": Sign,
    "scalar_adam": ScalarAdam,
}
_NAMES = {kind: name for name, kind in RULES.items()}


def name_of(kind: type[Rule]) -> str:
    """A rule's name in options and logs; of one that is not of this file, "module:Name"."""
    return _NAMES.get(kind) or f"{kind.__module__}:{kind.__qualname__}"


def known(rules: Iterable[type[Rule]]) -> dict[str, type[Rule]]:
    """By name: those of this file, and `rules`."""
    return RULES | {name_of(kind): kind for kind in rules}


def options(
    rule: Rule | str | dict[str, Any], rules: Mapping[str, type[Rule]] = RULES
) -> dict[str, Any]:
    """The rule as JSON holds it, {"name": ...} and its options. InputError for what is none."""
    if isinstance(rule, str | dict):
        return options(rule_of({"name": rule} if isinstance(rule, str) else rule, rules), rules)
    if not isinstance(rule, Rule):
        raise InputError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not is_dataclass(rule):
        raise InputError(f"rule {name_of(type(rule))} is not a frozen dataclass")
    rule.check()
    name, given = name_of(type(rule)), asdict(rule)  # type: ignore[call-overload]
    given = {k: list(v) if isinstance(v, tuple | list) else v for k, v in given.items()}
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"rule {name}: the run log cannot hold its options: {error}") from None
    return {"name": name} | given


def rule_of(given: Mapping[str, Any], rules: Mapping[str, type[Rule]] = RULES) -> Rule:
    """The value that `options` has as a dict. InputError for an unknown name or option."""
    name = given.get("name")
    if not isinstance(name, str) or name not in rules:
        hint = f"; pass rules=[{str(name).split(':')[-1]}]" if ":" in str(name) else ""
        raise InputError(f"rule must be one of {', '.join(rules)}, got {name!r}{hint}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "name"}
    try:
        return rules[name](**values)
    except TypeError:
        options_of = ", ".join(asdict(rules[name]())) or "none"  # type: ignore[call-overload]
        raise InputError(f"rule {name} has no option {', '.join(values)}: {options_of}") from None


def rule_class(text: str) -> type[Rule]:
    """The class that the user names, "module:Name" or "file.py:Name"; InputError for no rule."""
    found = imported(text, "rule")
    if not (isinstance(found, type) and issubclass(found, Rule) and is_dataclass(found)):
        raise InputError(f"rule {text} is not a dataclass that subclasses mezo.rules.Rule")
    return found


def _check_betas(name: str, betas: Sequence[Any], count: int = 1) -> None:
    number = all(type(x) in (int, float) for x in betas)
    if not number or not all(0 <= beta < 1 for beta in betas) or len(betas) != count:
        raise InputError(f"rule {name}: betas must be in [0, 1), got {list(betas)}")


def _check_eps(name: str, eps: float) -> None:
    if not eps > 0:
        raise InputError(f"rule {name}: eps must be positive, got {eps}")


def _check_window(name: str, rule: Rule) -> None:
    window = rule.window
    if window not in (None, "all") and not (type(window) is int and window >= 1):
        raise InputError(
            f'rule {name}: window is a number of steps, "all", or None: got {window!r}'
        )
    if window is not None and not rule.decoupled_weight_decay:
        raise InputError(
            f"rule {name}: a window has the history of the gradients alone: coupled weight "
            "decay needs buffers (window=None)"
        )


def _coupled(rule: Rule, theta: torch.Tensor, gradient: Gradient) -> torch.Tensor:
    """G, with weight_decay * theta where the rule adds decay to it."""
    g, decay = gradient.now(), gradient.weight_decay
    return g + theta * decay if decay and not rule.decoupled_weight_decay else g


@lru_cache(maxsize=16)
def _powers(beta: float, n: int) -> tuple[float, ...]:
    """beta^(n - 1), ..., beta, 1: by multiplication alone, which is the same everywhere."""
    found = [1.0]
    while len(found) < n:
        found.append(found[-1] * beta)
    return tuple(reversed(found))


def _power(beta: float, n: int) -> float:
    return 1.0 if n == 0 else _powers(beta, n + 1)[0]
