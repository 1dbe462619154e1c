"""What the log takes as constant is checked before every step."""

import copy

import pytest
import torch
from models import Regression, weights

from mezo import MeZO, trajectory
from mezo.errors import InputError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, o: m.first.requires_grad_(False), "parameter first was .* and is now frozen"),
        (lambda m, o: m.bias.requires_grad_(True), "parameter bias was frozen"),
        (lambda m, o: o.param_groups[0].update(seed=8), "seed was 5 .* is now 8"),
        (lambda m, o: o.param_groups[0].update(perturbation="scratch"), "perturbation was in_pl"),
        (lambda m, o: o.param_groups[0].update(distribution="rademacher"), "distribution was ga"),
        (lambda m, o: o.param_groups[0].update(rule={"name": "sign"}), "rule was sgd"),
        (lambda m, o: o.param_groups[0].update(estimator="one_sided"), "estimator was two_point"),
    ],
)
def test_a_change_is_refused_before_the_step_and_named(change, message, tmp_path):
    """The weights are those of the log up to there, and it replays."""
    model = Regression(torch.float32)
    model.bias.requires_grad_(False)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=5)
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        optimizer.step(model)
        change(model, optimizer)
        with pytest.raises(InputError, match=message):
            optimizer.step(model)
    base = trajectory.replay(tmp_path / "run.mezo", Regression(torch.float32))
    assert torch.equal(weights(base), weights(model))


def retyped(model, optimizer):
    model.last.data = model.last.data.double()


def renamed(model, optimizer):
    """A step goes by the names of its plan, which loading a state makes anew."""
    optimizer.param_groups[0]["param_names"][2] = "other"
    optimizer.load_state_dict(optimizer.state_dict())


def tied(model, optimizer):
    """The output becomes another tensor of the model's, as tie_weights does."""
    optimizer.param_groups[0]["params"][2] = model.first


@pytest.mark.parametrize("form", ["in_place", "scratch", "low_rank"])
def test_parameters_that_become_one_are_refused(form, tmp_path):
    """Each walk would move it twice, under two names."""
    model = Regression(torch.float32)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=5, perturbation=form, interval=1)

    def run():
        with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
            optimizer.step(model)
            tied(model, optimizer)
            optimizer.step(model)

    with pytest.raises(InputError, match="parameters first and last share memory"):
        run()


@pytest.mark.parametrize("form", ["in_place", "scratch", "low_rank"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, o: m.last.requires_grad_(False), "parameter last was .* and is now frozen"),
        (retyped, "parameter last was float32 .* and is now float64"),
        (renamed, "parameter last was .* and is now frozen"),
    ],
)
def test_every_form_refuses_and_says_how_to_go_on(form, change, message, tmp_path):
    """And the way that the message names works: another log, from these weights."""
    model = Regression(torch.float32)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=5, perturbation=form, interval=1)
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        optimizer.step(model)
        change(model, optimizer)
        with pytest.raises(InputError, match=message) as refused:
            optimizer.step(model)
    assert "trajectory.record(optimizer, another_path, resume=True)" in str(refused.value)
    if change in (renamed, retyped):  # no forward pass, or no model, fits those
        return
    begun = copy.deepcopy(model)
    with trajectory.record(optimizer, tmp_path / "next.mezo", model=model, resume=True):
        optimizer.step(model)
    again = trajectory.replay(tmp_path / "next.mezo", begun)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


@pytest.mark.parametrize("named", [lambda m: m.parameters(), lambda m: [("w.first", m.first)]])
def test_names_that_no_replay_would_find_are_refused_when_the_log_begins(named, tmp_path):
    model = Regression(torch.float32)
    optimizer = MeZO(named(model), lr=1e-2, seed=5)
    with pytest.raises(InputError, match="is not a name of the model's"):
        trajectory.record(optimizer, tmp_path / "run.mezo", model=model)
