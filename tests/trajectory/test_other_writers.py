"""What else writes to weights between steps is in no record: the step after it says so."""

import pytest
import torch
from models import Regression

from mezo import MeZO, trajectory
from mezo.trajectory.other_writers import OtherWriters

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


def in_place_by_data(model):
    model.first.data.mul_(0.9)


def by_numpy(model):
    model.first.detach().numpy()[0] = 1.0


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
@pytest.mark.parametrize("between", [clipped, averaged, loaded, in_place_by_data, by_numpy])
def test_a_weight_that_something_else_wrote_to_is_named_at_the_next_step_once(
    form, between, tmp_path, caplog
):
    """The run trains on from what was written, and its log replays to other weights."""
    run(tmp_path / "run.mezo", form, between)
    told = [r.message for r in caplog.records]
    assert len(told) == 1
    assert "something besides the optimizer wrote to first after step 2" in told[0]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (40, 3), (3, 40), (2, 3, 50), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_elements_of_every_shape_are_looked_at(shape, dtype, transposed):
    """A write through .data to all of a tensor is seen, whatever its strides."""
    tensor = torch.ones(shape, dtype=dtype)
    p = torch.nn.Parameter(tensor.mT if transposed and tensor.dim() > 1 else tensor)
    optimizer = MeZO([("p", p), ("other", torch.nn.Parameter(torch.ones(2)))])
    others = OtherWriters(optimizer)
    assert others.first() is None
    p.data.mul_(2)
    assert others.first() == ("p" if p.numel() else None)
    others.note()
    assert others.first() is None


def test_a_write_after_the_last_step_is_told_when_the_log_is_closed(tmp_path, caplog):
    """No step follows that could tell it, and the model would be saved with it."""
    model = Regression(torch.float32)
    writer = trajectory.record(MeZO(model.named_parameters(), seed=1), tmp_path / "run.mezo")
    writer.optimizer.step(model)
    by_numpy(model)
    writer.close()
    assert "wrote to first after step 0" in caplog.text


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizers_own_writes_are_not_told(form, dtype, tmp_path, caplog):
    """Steps, refused ones, and the writing of low-rank updates between two of them."""
    run(tmp_path / "run.mezo", form, nothing, dtype)
    assert not [r for r in caplog.records if "besides" in r.message]


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

    def forward(self):
        return self.b(self.a(torch.ones(2, 3))).square().mean()


def replaced(model):
    model.b.weight = torch.nn.Parameter(model.b.weight.detach().clone())


def tied(model):
    model.b.weight = model.a.weight


@FORMS
@pytest.mark.parametrize("change", [replaced, tied, nothing])
def test_a_parameter_that_the_model_no_longer_has_is_named_once(form, change, tmp_path, caplog):
    """The run went on to train a tensor that no forward pass reads, and its log replayed so."""
    model = TwoLayers()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, perturbation=form)
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model) as log:
        optimizer.step(model)
        change(model)
        optimizer.step(model)
        optimizer.write()
        log.digest()
    told = caplog.text.count("b.weight is no longer the one that the optimizer trains")
    assert told == (change is not nothing)
