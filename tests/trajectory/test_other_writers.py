"""What else writes to weights between steps is in no record: the step after it says so."""

import pytest
import torch
from models import Regression

from mezo import MeZO, trajectory

FORMS = pytest.mark.parametrize("form", ["in_place", "scratch", "low_rank"])


def nothing(model):
    model.eval()


def clipped(model):
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.1, 0.1)


def averaged(model):
    for p in model.parameters():
        p.data = p.data * 0.9


def loaded(model):
    model.load_state_dict(Regression(torch.float32).state_dict())


def run(path, form, between, dtype=torch.float32):
    model = Regression(dtype)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, perturbation=form, interval=2)
    with trajectory.record(optimizer, path, model=model):
        for step in range(6):
            between(model) if step in (3, 4) else None
            optimizer.write() if step == 5 else None
            optimizer.step(model)


@FORMS
@pytest.mark.parametrize("between", [clipped, averaged, loaded])
def test_a_weight_that_something_else_wrote_to_is_named_at_the_next_step_once(
    form, between, tmp_path, caplog
):
    """The run trains on from what was written, and its log replays to other weights."""
    run(tmp_path / "run.mezo", form, between)
    told = [r.message for r in caplog.records]
    assert len(told) == 1
    assert "something besides the optimizer wrote to first before step 3" in told[0]


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizers_own_writes_are_not_told(form, dtype, tmp_path, caplog):
    """Steps, refused ones, and the writing of low-rank updates between two of them."""
    run(tmp_path / "run.mezo", form, nothing, dtype)
    assert not [r for r in caplog.records if "besides" in r.message]
