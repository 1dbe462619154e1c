"""The torch optimizer around Algorithm 1: parameters, groups, states, copies, threads."""

import copy
import pickle
import threading

import pytest
import torch
from models import Regression, walked_home, weights
from torch.distributed.checkpoint.state_dict import get_state_dict

from mezo import MeZO, noise
from mezo.errors import InputError


def test_the_order_and_grouping_of_parameters_change_nothing():
    models = [Regression() for _ in range(3)]
    rows = [list(m.named_parameters()) for m in models]
    wrapped = [(f"module._orig_mod.{name}", p) for name, p in rows[1]]
    params = [rows[0], list(reversed(wrapped)), [{"params": rows[2][2:]}, {"params": rows[2][:2]}]]
    for model, given in zip(models, params, strict=True):
        optimizer = MeZO(given, lr=1e-2, seed=2)
        for _ in range(3):
            optimizer.step(model)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert torch.equal(weights(models[0]), weights(models[2]))


def test_plain_parameters_are_keyed_by_position():
    model = Regression()
    optimizer = MeZO([{"params": [model.first]}, {"params": [model.bias, model.last]}])
    assert [name for name, _, _ in optimizer.trained()] == ["0", "1", "2"]


def test_frozen_parameters_and_other_tensors_stay():
    model = Regression()
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    optimizer = MeZO(model.named_parameters(), lr=1e-2)
    optimizer.step(model)
    assert torch.equal(model.bias, before)
    assert [name for name, _, _ in optimizer.trained()] == ["first", "last"]


def test_groups_have_their_own_lr_and_weight_decay():
    model, same = Regression(), Regression()
    groups = [
        {"params": [("first", model.first)], "lr": 0.0},
        {"params": [("bias", model.bias), ("last", model.last)], "weight_decay": 1.0},
    ]
    MeZO(groups, lr=1e-2, seed=2).step(model)
    MeZO(same.named_parameters(), lr=1e-2, seed=2).step(same)
    start = Regression()
    assert ((model.first - start.first).abs() <= walked_home(start.first, 1e-3)).all()
    decayed = same.last - 1e-2 * start.last
    assert (model.last - decayed).abs().max() < 1e-14  # two roundings of numbers below 2


def test_a_scheduler_sets_the_learning_rate():
    model, twin = Regression(), Regression()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    other = MeZO(twin.named_parameters(), lr=1e-2, seed=1)
    for lr in (1e-2, 5e-3, 2.5e-3):
        other.param_groups[0]["lr"] = lr
        other.step(twin)
        optimizer.step(model)
        scheduler.step()
    assert torch.equal(weights(model), weights(twin))


def test_a_resumed_run_is_the_uninterrupted_run():
    """state_dict carries seed and step: no direction is drawn twice."""
    model, twin = Regression(), Regression()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=9)
    for _ in range(4):
        optimizer.step(model)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other = MeZO(twin.named_parameters(), lr=1.0, seed=0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        optimizer.step(model)
        other.step(twin)
    assert torch.equal(weights(model), weights(twin))
    assert optimizer.state_dict()["state"] == {}


def test_the_default_seed_is_what_torch_was_seeded_with():
    """`torch.manual_seed(3)` in a user's script chooses z; drawing z leaves no mark."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        before = torch.get_rng_state()
        model = Regression()
        optimizer = MeZO(model.named_parameters())
        optimizer.step(model)
        assert optimizer.param_groups[0]["seed"] == 3
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_optimizer_goes_on_with_the_copied_model(make):
    """As torch's own optimizers do; its observers stay behind."""
    model = Regression()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=9, rule="momentum")
    optimizer.observers.append(print)
    optimizer.step(model)
    other, copied = make((model, optimizer))
    assert not copied.observers
    for one, of in ((optimizer, model), (copied, other)):
        one.observers.clear()
        one.step(of)
    assert torch.equal(weights(model), weights(other))


def test_torchs_checkpoint_of_any_optimizer_reads_the_state():
    """torch.distributed.checkpoint asks for a step of zero gradients at lr 0, which is none."""
    model = Regression()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=9)
    before = weights(model)
    state = get_state_dict(model, optimizer)[1]
    assert len(state["param_groups"]) == 1
    assert optimizer.param_groups[0]["step"] == 0
    assert torch.equal(weights(model), before)


def test_nothing_to_train_is_said():
    model = Regression().requires_grad_(False)
    with pytest.raises(InputError, match="no parameter has requires_grad"):
        MeZO(model.named_parameters()).step(model)


def test_a_second_thread_is_refused():
    model = Regression()
    optimizer = MeZO(model.named_parameters(), lr=0.0)
    told = []

    def closure():
        def other():
            with pytest.raises(RuntimeError, match="in another thread"):
                optimizer.step(model)
            told.append(1)

        if not told:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return model()

    optimizer.step(closure)
    assert told == [1]


def test_loading_a_state_keeps_observers_processes_and_weights():
    """torch's load_state_dict calls __setstate__, which once made a lone optimizer of any."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = MeZO([("w", weight)], lr=1e-2, seed=1)
    steps, processes, weights = [], optimizer.processes, optimizer.weights
    optimizer.observers.append(lambda record: steps.append(record.step))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(lambda: weight.sum())
    assert steps == [0]
    assert optimizer.processes is processes
    assert optimizer.weights is weights


def test_a_distribution_may_be_given_by_name_or_as_a_value():
    """The value is what the names stand for, and the log's text is the name."""
    left = []
    for given in ("gaussian16", noise.DISTRIBUTIONS["gaussian16"]):
        model = Regression()
        optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=5, distribution=given)
        optimizer.step(model)
        assert optimizer.settings["distribution"] == "gaussian16"
        left.append(weights(model))
    assert torch.equal(*left)
