"""What is done with projected_grad * z: a rule, as a value that `MeZO(..., rule=...)` takes.

    sgd          theta <- theta - lr G,  G = projected_grad * z, averaged over the directions
    momentum     buf <- momentum buf + G;  theta <- theta - lr buf
    adam         moments of G and of its square, for each weight
    sign         theta <- theta - lr sign(G)
    scalar_adam  one second moment for all weights: it scales the step, and costs nothing

A name stands for the rule with its defaults. Momentum and Adam keep their moments in buffers of the
weights' size, or, with a `window`, keep none: a run's history is its projected gradients, and from
those the moments of one small piece of a tensor at a time are made again, used, and dropped
(Appendix B.2 of the paper).
"""

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

from mezo.errors import InputError


@dataclass(frozen=True)
class Record:
    """What one step did to the weights; with the settings in force, all that a replay needs."""

    step: int
    projected_grads: tuple[float, ...]  # one a probe; nothing was applied unless all are finite
    loss: float
    cycles: tuple[int, ...]  # walks a probe: 1, or more where losses were accumulated


@dataclass(frozen=True)
class SGD:
    """theta <- (1 - lr weight_decay) theta - lr G. No memory; the paper's, and the default."""


@dataclass(frozen=True)
class Momentum:
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


@dataclass(frozen=True)
class Adam:
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


@dataclass(frozen=True)
class Sign:
    """theta <- theta - lr sign(G). No memory. lr is the size of every weight's step."""


@dataclass(frozen=True)
class ScalarAdam:
    """sgd with lr / (sqrt(v) + eps), v the bias-corrected mean of projected_grad^2.

    One number for all weights (MEAZO, arXiv:2605.03869): lr is then about the size of a weight's
    step, whatever the loss's scale. What the run log holds are projected gradients so scaled.
    """

    beta: float = 0.99
    eps: float = 1e-8


Rule = SGD | Momentum | Adam | Sign | ScalarAdam
RULES = {"sgd": SGD, "momentum": Momentum, "adam": Adam, "sign": Sign, "scalar_adam": ScalarAdam}
BUFFERS = {"momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}


def options(rule: "Rule | str | dict[str, Any]") -> dict[str, Any]:
    """The rule as JSON holds it: {"name": ...} and its arguments. InputError if it is none."""
    if isinstance(rule, str):
        rule = {"name": rule}
    if not isinstance(rule, dict):
        names = {kind: name for name, kind in RULES.items()}
        if type(rule) not in names:
            raise InputError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        rule = {"name": names[type(rule)]} | asdict(rule)
    given = dict(rule)
    name = given.pop("name", None)
    if name not in RULES:
        raise InputError(f"rule must be one of {', '.join(RULES)}, got {name!r}")
    try:
        whole = asdict(RULES[name](**given))
    except TypeError:
        known = ", ".join(asdict(RULES[name]())) or "none"
        raise InputError(f"rule {name} has no option {', '.join(given)}: {known}") from None
    whole = {k: list(v) if isinstance(v, tuple | list) else v for k, v in whole.items()}
    found = {"name": name} | whole
    _check(found)
    return found


def _check(rule: dict[str, Any]) -> None:
    betas = [rule[k] for k in ("momentum", "beta") if k in rule] + rule.get("betas", [])
    number = all(type(x) in (int, float) for x in betas)
    if not number or not all(0 <= beta < 1 for beta in betas) or len(rule.get("betas", "12")) != 2:
        raise InputError(f"rule {rule['name']}: betas must be in [0, 1), got {betas}")
    if "dampening" in rule and not 0 <= rule["dampening"] < 1:
        raise InputError(f"rule momentum: dampening must be in [0, 1), got {rule['dampening']}")
    if rule.get("nesterov") and (rule["momentum"] == 0 or rule["dampening"] != 0):
        raise InputError("rule momentum: nesterov needs momentum and no dampening")
    if not rule.get("eps", 1.0) > 0:
        raise InputError(f"rule {rule['name']}: eps must be positive, got {rule['eps']}")
    window = rule.get("window")
    if window not in (None, "all") and not (type(window) is int and window >= 1):
        raise InputError(
            f'rule {rule["name"]}: window is a number of steps, "all", or None: got {window!r}'
        )
    if window is not None and not rule["decoupled_weight_decay"]:
        raise InputError(
            f"rule {rule['name']}: a window has the history of the gradients alone: coupled weight "
            "decay needs buffers (window=None)"
        )


def is_linear(rule: Mapping[str, Any]) -> bool:
    """Whether a step is an addition of multiples of z alone, as sgd's is."""
    return rule["name"] in ("sgd", "scalar_adam")


def remember(group: MutableMapping[str, Any], step: int, grads: Iterable[float]) -> None:
    """Note in `group` that a step was applied; the past, as far as the rule's window reaches."""
    window = group["rule"].get("window")
    past = [*group.get("past", ()), (step, tuple(grads))]
    group["past"] = past if window == "all" else past[-(window or 1) :]
    group["number"] = group.get("number", 0) + 1
