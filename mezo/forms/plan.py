"""What a step goes by: the tensors that are trained, and what their options ask for."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from mezo import noise, rules
from mezo.estimators import Estimator
from mezo.forms import rounding
from mezo.forms.bundles import Bundles
from mezo.forms.direction import Direction, Part, Row
from mezo.layers import PLAIN, TensorScale, scales_of
from mezo.rules import Rule

Trained = tuple[str, torch.nn.Parameter, dict[str, Any]]  # canonical name, parameter, its group


class Plan(NamedTuple):
    """What a step goes by; made anew when parameters or options have changed."""

    trained: list[Trained]
    parts: list[Part]  # the same tensors with the keys of their z, by what they have in common
    form: type[Direction]
    rule: Rule
    estimator: Estimator
    new: Callable[[int], Direction]  # the direction of that number
    bundles: Bundles


def planned(optimizer: Any) -> Plan:
    """Return the plan of a `ZerothOrderOptimizer` for its parameters and options as they are.

    Parameters without names are numbered.
    """
    groups, first, position = optimizer.param_groups, optimizer.settings, 0
    scales = scales_of(first["layers"])
    trained: list[Trained] = []
    rows: dict[tuple[int, TensorScale], list[Row]] = {}
    for i, group in enumerate(groups):
        names = group.get("param_names") or map(str, range(position, 2**31))
        position += len(group["params"])
        for name, p in zip(names, group["params"], strict=False):
            if p.requires_grad:
                name = noise.canonical_name(name)
                trained.append((name, p, group))
                row = Row(name, p, noise.tensor_key(first["seed"], name))
                rows.setdefault((i, scales.get(name, PLAIN)), []).append(row)
    half = any(p.dtype in rounding.HALF for _, p, _ in trained)
    form = optimizer.forms[first["perturbation"] or ("scratch" if half else "in_place")]
    buffered = half and rounding.ROUNDINGS[first["rounding"]].buffer is not None
    plain = not buffered and not form.factored
    parts = [Part(groups[i], noise.Rows(of), scale, plain) for (i, scale), of in rows.items()]
    rule = rules.rule_of(first["rule"], optimizer.rules)
    measure = optimizer.measures[first["estimator"]]
    memory, states = optimizer.memory, optimizer.state
    new = partial(form, parts, first, sides=measure.sides, memory=memory, states=states)
    return Plan(trained, parts, form, rule, measure, new, Bundles(parts))
