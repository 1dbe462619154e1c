"""Rules on tensors with scales and masks: every combination against the plain rule."""

import pytest
import torch

from mezo import rules
from mezo.forms.updates import Update, update_
from mezo.layers import TensorScale, within

RULES = [
    rules.Momentum(0.9),
    rules.Momentum(0.5, window=2),
    rules.Adam(),
    rules.Adam(window="all"),
    rules.Sign(),
]
SETTINGS = {"seed": 5, "rounding": "stochastic", "distribution": "gaussian"}
SETTINGS |= {"perturbation": "scratch", "rule": "momentum"}
GRADS = ((0.5, -1.0), (2.0, 0.25), (-0.75, 1.5))


def after(rule, scale, factor=1.0, distribution="gaussian", directions=2):
    """The weights and buffers after three steps of so many directions each."""
    weight, state = torch.linspace(-1, 1, 37), {}
    history = [(i, tuple(factor * g for g in row[:directions])) for i, row in enumerate(GRADS)]
    for end in range(1, len(history) + 1):
        update = Update(rule, end - 1, 0.01, 0.1, history, end, end)
        settings = SETTINGS | {"distribution": distribution}
        update_(weight, "w", update, settings, state, scale)
    return weight, state


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__} {rule.window}")
def test_a_scale_multiplies_the_gradient_that_a_rule_sees(rule, distribution, directions):
    """Definition 6: the estimate goes along d z, in moments too. d = 4 is exact in binary.

    Squares of estimates along one direction of signs are known without drawing it.
    """
    given = {"distribution": distribution, "directions": directions}
    found, kept = after(rule, TensorScale(4.0, "variance"), **given)
    expected, buffers = after(rule, TensorScale(), 4.0, **given)
    assert torch.equal(found, expected)
    assert all(torch.equal(kept[name], buffers[name]) for name in buffers)
    plain, _ = after(rule, TensorScale(), **given)
    along_z, _ = after(rule, TensorScale(4.0, "expectation"), **given)
    assert torch.equal(along_z, plain)  # Definition 7: along z
    assert not torch.equal(plain, torch.linspace(-1, 1, 37))


def test_factors_without_weight_decay_keep_no_decay():
    """A low-rank matrix keeps its decay until it is written; a plain step has none to keep."""
    settings = SETTINGS | {"perturbation": "low_rank", "rule": "sgd", "rank": 1, "interval": 50}
    for decay in (0.0, 0.5):
        weight, state = torch.ones(4, 6), {}
        update = Update(rules.SGD(), 0, 0.1, decay, [(0, (0.5,))], 1, 1)
        update_(weight, "w", update, settings, state)
        assert state.get("decay") == (None if decay == 0 else 1 - 0.1 * decay)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__} {rule.window}")
def test_a_mask_keeps_the_larger_weights_but_for_decay(rule):
    masked, _ = after(rule, TensorScale(threshold=0.5))
    start = torch.linspace(-1, 1, 37)
    outside = start.abs() > 0.51
    shrunk = start.clone()
    for _ in GRADS:
        shrunk = shrunk * (1 - 0.01 * 0.1)
    assert torch.equal(masked[outside], shrunk[outside])
    assert not torch.equal(masked[~outside], shrunk[~outside])


def test_a_weight_on_the_threshold_is_trained():
    """`small` takes the threshold from a weight, which is one of those to be trained."""
    inside = within(torch.tensor([-2.0, 2.0, 2.0000002, 1.0]), 2.0)
    assert inside.tolist() == [True, True, False, True]
