"""The closure is looked at again: a model does not stay as the first step saw it."""

import pytest
import torch
from torch import nn

from mezo import MeZO, trajectory
from mezo.forms.first_look import AGAIN

FORMS = pytest.mark.parametrize("form", ["in_place", "scratch", "low_rank"])
X = torch.linspace(-1, 1, 48).view(8, 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 1)).eval()


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


@FORMS
@pytest.mark.parametrize("common", [False, True])
def test_the_look_is_repeated_at_steps_that_double(form, common):
    """What a run shows at first may change; a look now and then costs next to nothing."""
    model, calls = net(), []
    optimizer = MeZO(
        model.named_parameters(), seed=1, perturbation=form, common_random_numbers=common
    )

    def closure():
        calls.append(optimizer.settings["step"])
        return loss_of(model)

    for _ in range(2 * AGAIN + 2):
        optimizer.step(closure)
    assert [step for step in range(2 * AGAIN + 2) if calls.count(step) == 4] == [
        0,
        AGAIN,
        2 * AGAIN,
    ]


@FORMS
def test_dropout_that_is_switched_on_later_is_told_once(form, caplog):
    """An evaluation ends with model.train(), as nanoGPT's does: nothing said so."""
    model = net()
    optimizer = MeZO(model.named_parameters(), lr=0.0, seed=1, perturbation=form)
    for step in range(4 * AGAIN):
        model.train(step > 0)
        optimizer.step(lambda: loss_of(model))
    told = [r.message for r in caplog.records if "model.eval()" in r.message]
    assert len(told) == 1


@FORMS
def test_train_mode_of_a_recorded_model_is_told_at_its_first_step(form, tmp_path, caplog):
    """Where the model is known, nobody has to wait for the next look."""
    model = net()
    optimizer = MeZO(model.named_parameters(), lr=0.0, seed=1, perturbation=form)
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        for step in range(4):
            model.train(step == 2)
            optimizer.step(lambda: loss_of(model))
            assert ("model.eval()" in caplog.text) == (step >= 2)
