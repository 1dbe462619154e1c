"""What processes compare and send: checksums that see order, and collectives in their own group."""

import json
import os
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from perceptron import OPTIONS, digest, loss, message, model, points
from processes import run
from torch import distributed as dist

from mezo import MeZO
from mezo.distributed import exchange
from mezo.distributed import processes as distributed

CHECK_EVERY, STEPS = 3, 12
PLANS = int(os.environ.get("FAULT_PLANS", "4"))  # of faults, in the slow test


def naive(tensor):
    """The definition, with Python's integers."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(-1).view(width).tolist()
    return sum(b * (2 * i + 1) * exchange._ODD for i, b in enumerate(bits)) % 2**64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_a_fingerprint_is_its_definition_whatever_the_chunks(monkeypatch, dtype):
    tensor = (torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 50).to(dtype).t()
    whole = exchange.fingerprint(tensor)
    assert whole == naive(tensor)
    monkeypatch.setattr(exchange, "_CHUNK", 8)
    assert exchange.fingerprint(tensor) == whole
    assert exchange.fingerprint(tensor.t()) != whole  # the same numbers in another order


def test_a_permutation_has_another_fingerprint():
    """Rows that have changed places are other weights; their sum is the same."""
    tensor = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    prints = {exchange.fingerprint(tensor.roll(i, 0)) for i in range(64)}
    assert len(prints) == 64


def in_a_group(rank, differ):
    group = dist.new_group([1, 2])
    found = None
    if rank:
        net, (x, y) = model(seed=rank if differ else 0), points(4)
        optimizer = MeZO(net.named_parameters(), **OPTIONS)
        distributed.join(optimizer, net, group=group, check_every=1)
        for _ in range(2):
            optimizer.step(lambda: loss(net, x, y))
        found = digest(net)
    dist.all_reduce(torch.ones(1))  # nobody's messages are left over
    return found


@pytest.mark.parametrize("differ", [False, True])
def test_every_collective_is_in_the_given_group(tmp_path, differ):
    """Rank 0 takes no part, and rank 1 is the first of the group: its weights are sent."""
    found = run(in_a_group, 3, tmp_path, differ)
    assert found[0] is None
    assert found[1] == found[2] is not None


def other_tensors(rank, kind):
    net, (x, y) = model(), points(4)
    net.register_buffer("scale", torch.ones(3))
    net[0].requires_grad_(False)
    optimizer = MeZO(net.named_parameters(), perturbation="scratch", **OPTIONS)
    distributed.join(optimizer, net, check_every=2)
    if rank == 2:
        with torch.no_grad():
            {
                "buffer": lambda: net.scale.mul_(2),
                "frozen": lambda: net[0].weight.add_(1e-3),
                "permuted": lambda: net[2].weight.copy_(net[2].weight.flip(1)),
            }[kind]()
    return [message(lambda: optimizer.step(lambda: loss(net, x, y))) for _ in range(3)]


@pytest.mark.parametrize(
    ("kind", "name"), [("buffer", "scale"), ("frozen", "0.weight"), ("permuted", "2.weight")]
)
def test_the_periodic_check_sees_all_weights_their_order_and_buffers(tmp_path, kind, name):
    found = run(other_tensors, 3, tmp_path, kind)
    assert found[0] == found[1] == found[2]
    assert found[0][:2] == ["", ""]
    assert f"rank 2 differs from rank 0: the weights of {name}" in found[0][2]


def troubled(rank, seed, kind, folder):
    """Steps with delays, messages in any order, and, but for kind "none", one fault of one rank."""
    plan, own = random.Random(seed), random.Random(1000 * seed + rank)
    culprit, at = plan.randrange(3), plan.randrange(1, STEPS - CHECK_EVERY)
    fault = plan.choice(["weight", "buffer", "order", "lr", "seed"])
    net, (x, y) = model(), points(6)
    net.register_buffer("scale", torch.ones(3))
    form = plan.choice(["in_place", "scratch"])
    optimizer = MeZO(net.named_parameters(), num_samples=2, perturbation=form, **OPTIONS)
    processes = distributed.join(optimizer, net, check_every=CHECK_EVERY)
    others = processes._others
    processes._others = lambda: own.sample(others(), 2)
    digests = [digest(net)]
    for step in range(STEPS):
        if step == at and rank == culprit:
            if kind == "kill":
                os._exit(9)
            if kind == "lie":
                lie(optimizer, net, fault)

        def closure():
            time.sleep(own.choice([0, 0, 0.01]))
            return loss(net, x[rank::3], y[rank::3])

        try:
            optimizer.step(closure)
        except Exception as error:
            return keep(folder, rank, digests, step, f"{type(error).__name__}: {error}")
        digests.append(digest(net))
    return keep(folder, rank, digests, STEPS, "")


def keep(folder, rank, *result):
    """In a file: after a death nobody gets past the barrier at the end."""
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


def lie(optimizer, net, fault):
    with torch.no_grad():
        if fault == "weight":
            net[2].bias.add_(1e-3)
        elif fault == "buffer":
            net.scale.mul_(2)
        elif fault == "order":
            net[0].weight.copy_(net[0].weight.flip(0))
        elif fault == "lr":
            optimizer.param_groups[0]["lr"] *= 2
        else:
            optimizer.param_groups[0]["seed"] += 1


def plan_of(seed):
    plan = random.Random(seed)
    return plan.randrange(3), plan.randrange(1, STEPS - CHECK_EVERY)


def assert_survived(seed, kind, folder):
    run(troubled, 3, folder, seed, kind, str(folder), dying=kind == "kill")
    culprit, at = plan_of(seed)
    there = [rank for rank in range(3) if kind != "kill" or rank != culprit]
    found = {rank: json.loads(Path(folder, f"{rank}.json").read_text()) for rank in there}
    if kind == "none":
        assert found[0] == found[1] == found[2]
        assert found[0][1] == STEPS
        assert all(one != other for one, other in pairwise(found[0][0]))
        return
    honest = [found[rank] for rank in there if rank != culprit]
    if kind == "lie":
        assert all(row[1:] == honest[0][1:] for row in found.values())  # one step, one reason
        assert at <= honest[0][1] <= at + CHECK_EVERY
        assert f"rank {culprit} differs" in honest[0][2]
        assert honest[0][0] == honest[1][0]
        return
    first, second = honest
    assert {first[1], second[1]} <= {at, at + 1}  # its last message may have reached one of them
    assert "InputError" not in first[2] + second[2]
    shared = min(len(first[0]), len(second[0]))
    assert first[0][:shared] == second[0][:shared]


@pytest.mark.parametrize("kind", ["none", "lie", "kill"])
def test_processes_that_are_late_lie_or_die(tmp_path, kind):
    assert_survived(1, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 2 + PLANS))
def test_processes_that_are_late_lie_or_die_at_random(tmp_path, seed):
    """Plans of faults: who, when and what, and in which order messages are sent."""
    for kind in ("none", "lie", "kill"):
        assert_survived(seed, kind, tmp_path)
