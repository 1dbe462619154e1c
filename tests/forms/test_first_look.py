"""The first step looks at the closure: what would spoil a run in silence is said before it begins.

A loss that draws noise, a forward pass that writes to a trained weight or hides its perturbation:
each trains to something else than its log says, or to nothing, and no later step shows why.
"""

import logging
import random

import numpy as np
import pytest
import torch
from torch import nn

from mezo import MeZO, trajectory
from mezo.closures import Mean
from mezo.errors import InputError
from mezo.memory.measured import PeakMemory

FORMS = pytest.mark.parametrize("form", ["in_place", "scratch", "low_rank"])
X = torch.linspace(-1, 1, 48).view(8, 6)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


def stepped(form: str, closure, model: nn.Module, **options) -> MeZO:
    """An optimizer that has made a step at lr 0."""
    named = model.named_parameters()
    optimizer = MeZO(named, lr=0.0, seed=1, perturbation=form, **options)
    optimizer.step(closure)
    return optimizer


def refused(form: str, closure, model: nn.Module) -> str:
    """What the first step says; the weights are those before, and no step was taken."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MeZO(list(model.named_parameters()), lr=1e-2, seed=1, perturbation=form)
    with pytest.raises(InputError) as error:
        optimizer.step(closure)
    assert optimizer.param_groups[0]["step"] == 0
    assert not optimizer.directions
    for (_, p, _), values in zip(optimizer.trained(), before, strict=True):
        assert torch.equal(p, values)
    return str(error.value)


# noise


def dropout(model: nn.Module) -> torch.Tensor:
    return nn.functional.dropout(model(X), 0.5, training=True).square().mean()


def of_numpy(model: nn.Module) -> torch.Tensor:
    return loss_of(model) + np.random.rand()


def of_python(model: nn.Module) -> torch.Tensor:
    return loss_of(model) + random.random()


@FORMS
@pytest.mark.parametrize("noise", [dropout, of_numpy, of_python])
def test_a_loss_that_draws_is_told_with_both_ways_out(form, noise, caplog):
    """Dropout drowns the difference of the two losses: a run ends in NaN, or learns nothing."""
    model = net()
    stepped(form, lambda: noise(model), model)
    assert "model.eval()" in caplog.text
    assert "common_random_numbers=True" in caplog.text
    assert "draws random numbers" in caplog.text


@FORMS
def test_a_model_left_in_train_mode_is_told_and_one_in_eval_mode_is_not(form, caplog):
    """PyTorch's default is train mode, and most loops leave models in it."""
    model = net().append(nn.Dropout(0.5))
    stepped(form, lambda: loss_of(model.eval()), model)
    assert not caplog.records
    stepped(form, lambda: loss_of(model.train()), model)
    assert "model.eval()" in caplog.text


@FORMS
@pytest.mark.parametrize("noise", [dropout, of_numpy, of_python])
def test_common_random_numbers_are_not_told(form, noise, caplog):
    """With it, noise by design is the same in all passes of a batch: nothing is to be said."""
    model = net()
    stepped(form, lambda: noise(model), model, common_random_numbers=True)
    assert not caplog.records


@FORMS
def test_a_closure_that_takes_another_batch_each_time_is_told(form, caplog):
    """The two losses would be of two batches: fetch it before the step."""
    model, batches = net(), iter(torch.randn(100, 8, 6, generator=torch.Generator()))
    stepped(form, lambda: model(next(batches)).square().mean(), model)
    assert "no random numbers were drawn" in caplog.text
    assert "fetch the batch" in caplog.text


def test_a_few_roundings_of_the_losss_own_dtype_are_no_noise(caplog):
    """Kernels may add in another order: 4 units in the last place are let through, 8 are not."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for units, told in ((4, False), (8, True)):
            caplog.clear()
            unit, calls, p = torch.finfo(dtype).eps, [0], nn.Parameter(torch.ones(1))

            def closure(calls=calls, units=units, unit=unit, dtype=dtype, p=p):
                calls[0] += 1
                loss = torch.tensor(1 + units * unit * (calls[0] == 2), dtype=dtype)
                return loss + 0 * p.to(dtype).sum()

            optimizer = MeZO([("p", p)], lr=0.0, seed=1)
            optimizer.step(closure)
            assert bool(caplog.records) == told, (dtype, units)


def test_the_end_of_a_noisy_run_names_its_noise(caplog):
    """Such a run goes to NaN, and it is not the data that is to blame."""
    model, calls = net(), [0]

    def closure():
        calls[0] += 1
        return dropout(model) * (1 if calls[0] < 3 else torch.nan)  # the look alone is finite

    optimizer = MeZO(model.named_parameters(), lr=0.0, seed=1, max_refused=2)
    optimizer.step(closure)
    with pytest.raises(InputError, match=r"not finite in 2 steps .* noise .* model.eval\(\)"):
        optimizer.step(closure)


@FORMS
def test_generators_and_the_log_are_as_without_a_look(form, tmp_path):
    """A run that is looked at has the losses, the draws and the bytes of one that is not."""
    found = []
    for looks in (True, False):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        model, seen = net(), []
        torch.manual_seed(3)
        optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, perturbation=form)
        optimizer.watch.looks = looks
        path = tmp_path / f"{looks}.mezo"
        with trajectory.record(optimizer, path, model=model):
            for _ in range(2):
                seen.append(optimizer.step(lambda m=model: of_numpy(m) + dropout(m)))
        optimizer.write()
        weights = [p.tolist() for p in model.parameters()]
        draws = [float(torch.rand(())), float(np.random.rand()), random.random()]
        found.append((seen, weights, draws, path.read_bytes()))
    assert found[0] == found[1]


@FORMS
def test_the_look_takes_two_calls_of_the_first_step_alone(form):
    """Two more passes at the beginning of a run are cheap; two a step would double it."""
    model, calls = net(), [0]

    def closure():
        calls[0] += 1
        return loss_of(model)

    optimizer = stepped(form, closure, model)
    assert calls == [4]
    optimizer.step(closure)
    assert calls == [6]
    optimizer.watch.looks = True
    optimizer.step(Mean(closure, 3))
    assert calls == [10]


def test_looks_false_takes_no_more_calls():
    """For a closure that is costly, such as one that generates text."""
    model, calls = net(), [0]

    def closure():
        calls[0] += 1
        return loss_of(model)

    optimizer = MeZO(model.named_parameters(), lr=0.0, seed=1)
    optimizer.watch.looks = False
    optimizer.step(closure)
    assert calls == [2]


# writes


def clipped(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.1, 0.1)
    return loss_of(model)


def through_a_view(model: nn.Module) -> torch.Tensor:
    model[0].weight.detach().view(-1)[:2] = 0.5
    return loss_of(model)


def out(model: nn.Module) -> torch.Tensor:
    torch.mul(model[0].bias, 2, out=model[0].bias.detach())
    return loss_of(model)


def foreach(model: nn.Module) -> torch.Tensor:
    torch._foreach_mul_([p.detach() for p in model.parameters()], 0.5)
    return loss_of(model)


@FORMS
@pytest.mark.parametrize("writing", [clipped, through_a_view, out, foreach])
def test_a_forward_pass_that_writes_to_a_trained_weight_is_refused_before_it_does(form, writing):
    """In place, such a write moves theta under the walk, and the log says another thing."""
    model = net()
    assert "writes to the trained parameter" in refused(form, lambda: writing(model), model)


@FORMS
def test_an_embedding_that_rescales_itself_is_refused(form):
    """max_norm (pytorch#28959): with lr 0 the weights moved, and nothing was said."""
    torch.manual_seed(0)
    table = nn.Embedding(10, 8, max_norm=1.0)
    told = refused(form, lambda: table(torch.arange(10)).square().mean(), table)
    assert "parameter weight" in told or "embedding weight" in told


@FORMS
def test_data_that_is_assigned_is_refused_and_put_back(form):
    """The optimizer's tensor would be the one of before, which nothing reads any more."""
    model = net()
    storage = model[0].weight.data_ptr()

    def closure():
        model[0].weight.data = model[0].weight.data * 2
        return loss_of(model)

    assert "replaces the trained parameter 0.weight" in refused(form, closure, model)
    assert model[0].weight.data_ptr() == storage


@FORMS
def test_a_parameter_that_the_forward_pass_makes_anew_is_refused(form):
    """The second loss is that of the first one's copy: projected_grad is 0 for ever."""
    model = net()

    def closure():
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        return loss_of(model)

    optimizer = MeZO(list(model.named_parameters()), lr=1e-2, seed=1, perturbation=form)
    with pytest.raises(InputError, match=r"0.weight in one of two equal calls"):
        optimizer.step(closure)


@FORMS
def test_what_is_kept_from_an_earlier_call_is_refused(form):
    """A cache of activations hides the perturbation of all weights before it."""
    model, kept = net(), []

    def closure():
        kept.extend([] if kept else [model[0](X).detach()])
        return model[2](model[1](kept[0])).square().mean()

    assert "keeps what it has computed" in refused(form, closure, model)


@FORMS
def test_a_write_past_torch_is_refused_by_the_digest(form):
    """numpy writes to the memory itself; nothing can put it back, and the sentence says so."""
    model = net()
    array = model[0].weight.detach().numpy()

    def closure():
        array[:] = 0.5
        return loss_of(model)

    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, perturbation=form)
    with pytest.raises(InputError, match=r"0.weight past torch's functions"):
        optimizer.step(closure)


# gradients


def told(form: str, closure, model: nn.Module, caplog) -> str:
    with pytest.raises(InputError) as error:
        stepped(form, closure, model)
    return str(error.value)


@FORMS
@pytest.mark.parametrize("before", [False, True], ids=["without .grad", "with .grad"])
def test_a_closure_that_calls_backward_is_told(form, before, caplog):
    """A loop that was Adam's: with gradients from before, backward adds to them in silence."""
    model = net()
    if before:
        loss_of(model).backward()
    kept = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    def closure():
        with torch.enable_grad():
            loss = loss_of(model)
            loss.backward()
        return loss.item()

    def without():
        loss = loss_of(model)
        loss.backward()
        return loss

    for one in (without, closure):
        assert "calls backward()" in told(form, one, model, caplog)
    if not before:
        assert kept == [p.grad for p in model.parameters()]


@FORMS
def test_a_graph_that_is_kept_is_told_once(form, caplog):
    """enable_grad within the closure keeps every activation, the memory that MeZO saves."""
    model = net()

    def closure():
        with torch.enable_grad():
            return loss_of(model) + torch.zeros(1, requires_grad=True).sum()

    stepped(form, closure, model)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "torch.enable_grad" in caplog.text


# padding


@FORMS
def test_padding_idx_is_told_where_the_loss_depends_on_it_alone(form, caplog):
    """torch never trains that row, and here it is trained; masked padding makes no difference."""
    torch.manual_seed(0)
    table, ids = nn.Embedding(10, 4, padding_idx=0), torch.tensor([[1, 2, 0]])
    mask = (ids != 0).unsqueeze(-1)
    stepped(form, lambda: (table(ids) * mask).square().sum(), table)
    stepped(form, lambda: table(ids[:, :2]).square().sum(), table)
    assert not caplog.records
    stepped(form, lambda: table(ids).square().sum(), table)
    assert "row 0 of weight (padding_idx)" in caplog.text
    assert "mask the padding" in caplog.text


@FORMS
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_running_averages_that_a_pass_updates_are_told(form, mode, caplog):
    """Both calls give one loss in train mode, and a replay gave a model with other averages."""
    torch.manual_seed(1)
    layers = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
    model, x = torch.nn.Sequential(*layers), torch.randn(16, 4)
    getattr(model, mode)()
    optimizer = MeZO(model.named_parameters(), seed=1, perturbation=form)
    optimizer.step(lambda: model(x).square().mean())
    assert caplog.text.count("updates running averages") == (mode == "train")


def test_the_look_takes_no_memory_of_a_weights_size():
    """A sum of bits in 64 bits copied a weight into twice its size, which the first step took."""
    weight = nn.Parameter(torch.ones(2**25))  # 128 MiB; the measure is good to 20
    optimizer = MeZO([("w", weight)], seed=1)
    with PeakMemory() as peak:
        optimizer.step(lambda: weight[0] ** 2)
    assert peak.bytes < 64 * 2**20


def test_a_failure_in_the_look_leaves_the_step_refused_as_one_in_an_estimate(tmp_path):
    """What raises in a first step has refused it ever since; weights and log agree."""
    model = net()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1)
    before = [p.tolist() for p in model.parameters()]
    path = tmp_path / "run.mezo"

    def fails():
        raise OSError("no batch")

    with trajectory.record(optimizer, path, model=model):
        with pytest.raises(OSError, match="no batch"):
            optimizer.step(fails)
        assert optimizer.param_groups[0]["step"] == 1
        optimizer.step(lambda: loss_of(model))
    fresh = net()
    trajectory.replay(path, fresh)
    assert [p.tolist() for p in fresh.parameters()] == [p.tolist() for p in model.parameters()]
    assert before != [p.tolist() for p in model.parameters()]
