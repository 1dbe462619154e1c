"""Update rules: how G = projected_grad * z, averaged over the directions, changes the weights.

    sgd          theta <- theta - lr G
    momentum     buf <- momentum buf + G;  theta <- theta - lr buf
    adam         moments of G and of its square, for each weight
    sign         theta <- theta - lr sign(G)
    scalar_adam  one second moment for all weights, which scales the step and costs nothing

A rule is a value: a frozen dataclass of plain numbers, which the run log keeps, with a method
`direction` that turns G into what lr multiplies. `MeZO(..., rule=...)` takes a rule or the name of
a built-in one, which stands for its defaults; docs/extending.md shows how to write your own.

Momentum and Adam keep their moments in buffers of the weights' size. With a `window` they keep no
buffers: a run's projected gradients are its history, from which the moments of one small piece of a
tensor at a time are recomputed, used and dropped (Appendix B.2 of the paper).
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
    """G for one piece of a tensor; it is drawn when one of the methods is called."""

    number: int  # number of steps applied since the run began, including this one
    began: bool  # whether the buffers hold an earlier step's values; at first they are zeros
    steps: int  # number of steps in the history within the rule's window, including this one
    weight_decay: float

    def now(self) -> torch.Tensor:
        """Return G of this step."""

    def weighted(self, weights: Sequence[float]) -> torch.Tensor:
        """Return the sum of weight * G over the last `steps` steps, from the oldest on."""

    def squares(self, weights: Sequence[float]) -> torch.Tensor:
        """Return the sum of weight * G * G over the last `steps` steps, from the oldest on."""


class Rule:
    """The base class of rules: subclass it as a frozen dataclass whose fields JSON can hold.

    Attributes:
        buffers: Names of the buffers of a weight's size that the rule keeps; they start as zeros.
        window: The number of past steps that `Gradient.weighted` covers, or "all"; the rule then
            keeps no buffers. None covers this step alone, and the rule keeps its buffers.
        linear: Whether theta only moves by multiples of this step's z, as for sgd, so that the
            moves themselves are the update.
        additive: Whether `direction` can be applied to a low-rank factor instead of its matrix:
            because it is linear in the gradients, or because the rule is meant for the factor.
        whole: Whether `direction` needs a tensor, or a factor, in one piece of its own shape. The
            temporaries are then as large as the tensor.
        decoupled_weight_decay: Whether theta is multiplied by 1 - lr weight_decay before the
            update. If not, `direction` must apply the decay itself.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    window: int | str | None = None
    decoupled_weight_decay: bool = True

    def direction(
        self, theta: torch.Tensor, gradient: Gradient, kept: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return what lr multiplies and the buffers' new values, for one piece of a tensor.

        `theta`, the buffers `kept` and all results have the same shape, in float32 (float64 for a
        float64 weight). Change nothing in place. A replay calls this method again, and equal inputs
        must give equal bits on every device. Use only operations that IEEE 754 rounds identically
        everywhere (+, -, *, /, comparisons, sign), and take square roots in float64.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raise InputError, naming the option, if an option's value is invalid."""

    def scaled(self, grads: dict[int, float], memory: Memory) -> dict[int, float]:
        """Return the projected gradients as they are to be applied and recorded."""
        return grads

    @property
    def kept(self) -> tuple[str, ...]:
        """The buffers that the rule keeps with its present options."""
        return self.buffers if self.window is None else ()

    @property
    def replayed(self) -> "Rule":
        """The rule that a replay applies to the recorded gradients."""
        return self


@dataclass(frozen=True)
class SGD(Rule):
    """The paper's rule and the default: theta <- (1 - lr weight_decay) theta - lr G.

    It keeps no memory.
    """

    linear = additive = True

    def direction(self, theta, gradient, kept):
        return gradient.now(), {}


@dataclass(frozen=True)
class Momentum(Rule):
    """Momentum as in torch.optim.SGD, applied to G.

    Args:
        momentum, dampening, nesterov: As in torch.optim.SGD.
        window: None keeps a buffer of 4 bytes per weight (8 for float64). A number of steps, or
            "all", keeps no buffer: momentum is summed anew from the last `window` projected
            gradients, at the cost of that many draws of z per step. The contribution of older steps
            is left out: at most momentum^window / (1 - momentum) times the largest |G|, which is
            1.4e-6 for 150 steps at 0.9.
        decoupled_weight_decay: False adds weight_decay * theta to G, as torch.optim.SGD does. It
            cannot be combined with a window, since the history does not contain theta.

    Raises InputError (from `check`) if an option is out of range.
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
    """Adam applied to G; with decoupled weight decay, the default, it is AdamW.

    With one direction per step, G / sqrt(v) depends little on the weight, so expect no gain over a
    tuned sgd (arXiv:2605.03869). The rule is meant for comparisons.

    Args:
        betas, eps: As in torch.optim.Adam.
        window: None keeps two buffers, 8 bytes per weight (16 for float64). A number of steps, or
            "all", keeps no buffers: both moments are recomputed from the last `window` projected
            gradients, with weights that sum to 1, at the cost of that many draws of z per step. The
            error of a moment is at most 2 beta^window times the largest |G| (or G^2); with 0.999 it
            takes 6,900 steps to reach 1e-3. With one Rademacher direction per step, the second
            moment needs no draw.
        decoupled_weight_decay: False adds weight_decay * theta to G. It cannot be combined with a
            window.

    Raises InputError (from `check`) if an option is out of range.
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
        root = v.double().sqrt().to(v.dtype)  # not every device rounds float32 roots as IEEE 754
        return m / (root + self.eps), after


@dataclass(frozen=True)
class Sign(Rule):
    """theta <- theta - lr sign(G): every weight moves by lr. It keeps no memory."""

    def direction(self, theta, gradient, kept):
        return gradient.now().sign(), {}


@dataclass(frozen=True)
class ScalarAdam(Rule):
    """sgd with lr / (sqrt(v) + eps), where v is the bias-corrected mean of projected_grad^2.

    v is one number for all weights (MEAZO, arXiv:2605.03869). lr is then about the size of a
    weight's step, whatever the scale of the loss. The run log holds the scaled projected gradients,
    and a run can resume only from a checkpoint, since the log does not hold v.
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
        """Divide by the root of the running mean square of all projected gradients so far."""
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
    """Return a rule's name in options and logs; for a user's rule it is "module:Name"."""
    return _NAMES.get(kind) or f"{kind.__module__}:{kind.__qualname__}"


def known(rules: Iterable[type[Rule]]) -> dict[str, type[Rule]]:
    """Return the built-in rules and `rules`, by name."""
    return RULES | {name_of(kind): kind for kind in rules}


def options(
    rule: Rule | str | dict[str, Any], rules: Mapping[str, type[Rule]] = RULES
) -> dict[str, Any]:
    """Return a rule as JSON holds it: {"name": ...} and its options.

    Raises InputError if it is not a rule, if an option is invalid, or if JSON cannot hold one.
    """
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
    """Return the rule that a dict of `options` describes.

    Raises InputError for an unknown name or option.
    """
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
    """Import the rule class that a user names as "module:Name" or "file.py:Name".

    Raises InputError if it is not a dataclass that subclasses `Rule`.
    """
    kind = imported(text, "rule")
    if not (isinstance(kind, type) and issubclass(kind, Rule) and is_dataclass(kind)):
        raise InputError(f"rule {text} is not a dataclass that subclasses mezo.rules.Rule")
    return kind


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
            f'rule {name}: window must be a number of steps, "all" or None, got {window!r}'
        )
    if window is not None and not rule.decoupled_weight_decay:
        raise InputError(
            f"rule {name}: coupled weight decay needs buffers (window=None), because a window "
            "holds only the history of the gradients"
        )


def _coupled(rule: Rule, theta: torch.Tensor, gradient: Gradient) -> torch.Tensor:
    """Return G, plus weight_decay * theta if the rule couples weight decay."""
    g, decay = gradient.now(), gradient.weight_decay
    return g + theta * decay if decay and not rule.decoupled_weight_decay else g


@lru_cache(maxsize=16)
def _powers(beta: float, n: int) -> tuple[float, ...]:
    """Return (beta^(n - 1), ..., beta, 1), by multiplications, which round alike everywhere."""
    powers = [1.0]
    while len(powers) < n:
        powers.append(powers[-1] * beta)
    return tuple(reversed(powers))


def _power(beta: float, n: int) -> float:
    return 1.0 if n == 0 else _powers(beta, n + 1)[0]
