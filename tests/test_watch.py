"""What the first step says of an optimizer's options."""

import logging

import pytest
import torch
from models import Regression

from mezo import MeZO


def told(caplog, rates, form="in_place"):
    model = Regression(torch.float32)
    groups = [
        {"params": [("first", model.first), ("bias", model.bias)], "lr": rates[0]},
        {"params": [("last", model.last)], "lr": rates[1]},
    ]
    optimizer = MeZO(groups, seed=1, perturbation=form)
    with caplog.at_level(logging.WARNING):
        optimizer.step(model)
        optimizer.step(model)
    return [r.message for r in caplog.records if "lr 0" in r.message]


@pytest.mark.parametrize("form", ["in_place", "scratch", "low_rank"])
def test_a_group_of_rate_0_beside_others_is_named_once(form, caplog):
    """Elsewhere a rate of 0 freezes; here the group's noise is in every estimate."""
    (line,) = told(caplog, (0.0, 1e-3), form)
    assert line.startswith("a parameter group of 2 tensors has lr 0, others have not")
    assert ("in place the walk rounds them" in line) == (form == "in_place")
    assert "requires_grad_(False)" in line


@pytest.mark.parametrize("rates", [(0.0, 0.0), (1e-3, 1e-3)])
def test_rates_that_are_0_together_or_not_at_all_are_not_named(rates, caplog):
    """A warm-up begins with a rate of 0 for all."""
    assert told(caplog, rates) == []
