"""Sharded models: every process draws its shard's part of z, and a run is the one of one device."""

import signal

import pytest
import torch
from perceptron import OPTIONS, digest, loss, message, model, points, weights
from processes import needs_fsdp, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from mezo import MeZO, noise, trajectory
from mezo.distributed import elastic
from mezo.distributed import processes as distributed
from mezo.interrupts import held
from mezo.noise import Move

KEY = noise.tensor_key(3, "weight")
MOVES = [Move(0, 0, 1.0, 0.1), Move(0, 0, 1.0, -0.2), Move(1, 1, 0.9, 0.3, noise.ROUND_UPDATE)]
SHAPES = [(7, 5), (3, 2048), (9,), (2, 3, 4), (1, 4), (600, 700)]


def whole(shape, dtype):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=generator).to(dtype)


def moved(rank, size):
    """Over a line of processes and, of four, over a square: does every element get its own z?"""
    wrong = []
    meshes = [(init_device_mesh("cpu", (size,)), [(Shard(0),), (Shard(1),), (Replicate(),)])]
    if size == 4:
        square = init_device_mesh("cpu", (2, 2))
        meshes += [(square, [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Shard(0))])]
    for mesh, placements in meshes:
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                for places in placements:
                    if max((p.dim for p in places if isinstance(p, Shard)), default=0) >= len(
                        shape
                    ):
                        continue
                    plain = whole(shape, dtype)
                    shards = distribute_tensor(plain.clone(), mesh, places)
                    noise.apply_(shards, KEY, MOVES)
                    noise.apply_(plain, KEY, MOVES)
                    if not torch.equal(shards.full_tensor(), plain):
                        wrong.append(f"{shape} {places} {dtype}")
    mine = distribute_tensor(torch.zeros(8, 64), meshes[0][0], [Shard(0)])
    noise.apply_(mine, KEY, MOVES)
    parts = mine.full_tensor().chunk(size)
    return wrong, any(torch.equal(parts[0], part) for part in parts[1:])


@pytest.mark.parametrize("size", [2, 4])
def test_a_shard_has_its_part_of_the_whole_tensors_noise(tmp_path, size):
    """ecosystem.md 5.3: torch's own random functions give all shards of a CPU the same numbers."""
    for wrong, same in run(moved, size, tmp_path, size):
        assert not wrong
        assert not same


def interrupted(rank):
    """By Ctrl-C, in the second of four blocks of rows."""
    mesh, calls = init_device_mesh("cpu", (2,)), []
    mine = distribute_tensor(torch.zeros(8, 4), mesh, [Shard(1)])

    def move(part, offset):
        part += 1
        calls.append(offset)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mezo.noise.sharded._BLOCK", 8)
        with pytest.raises(KeyboardInterrupt), held():
            noise.sharded.apply_(mine, move)
    return mine.to_local().tolist(), calls


def test_an_interrupt_waits_until_a_shard_of_columns_is_whole(tmp_path):
    for after, calls in run(interrupted, 2, tmp_path):
        assert after == [[1.0, 1.0]] * 8
        assert calls == [0, 8, 16, 24]


def fsdp(rank, folder, size):
    net, (x, y) = model(seed=1), points(8)
    init_device_mesh("cpu", (size,))
    fully_shard(net[0])
    fully_shard(net)  # the root: 2.weight and 2.bias; 2.weight has one row for several processes
    optimizer = MeZO(net.named_parameters(), num_samples=2, **OPTIONS)
    distributed.join(optimizer, net)
    losses, after = [], []
    with elastic.record(optimizer, f"{folder}/fsdp.mezo", model=net):
        for _ in range(3):
            losses.append(optimizer.step(lambda: loss(net, x, y)))
            with torch.no_grad():  # an evaluation keeps the gathered weights of the root
                after.append(loss(net, x, y).item())
    for module in (net, net[0]):
        module.reshard()
    full = torch.cat([p.full_tensor().detach().flatten().double() for p in net.parameters()])
    local = sum(p.to_local().numel() for p in net.parameters())
    return losses, after, full.tolist(), local


@needs_fsdp
@pytest.mark.parametrize("size", [2, 4])
def test_fsdp_takes_the_steps_of_one_device(tmp_path, size):
    """Losses, evaluations between the steps, weights and run log are those of one device, bitwise.

    Each process sees the whole batch, so that their mean is one of equal numbers. Without `reshard`
    the passes read what was gathered before the perturbation (ecosystem.md 5.3).
    """
    found = run(fsdp, size, tmp_path, str(tmp_path), size)
    net, (x, y) = model(seed=1), points(8)
    optimizer = MeZO(net.named_parameters(), num_samples=2, **OPTIONS)
    losses, after = [], []
    with trajectory.record(optimizer, tmp_path / "one.mezo", model=net):
        for _ in range(3):
            losses.append(optimizer.step(lambda: loss(net, x, y)))
            after.append(loss(net, x, y).item())
    for row in found:
        assert row[:3] == (losses, after, weights(net).tolist())
    assert sum(row[3] for row in found) == sum(p.numel() for p in net.parameters())
    assert (tmp_path / "fsdp.mezo").read_bytes() == (tmp_path / "one.mezo").read_bytes()


def refused(rank):
    found, (x, y) = {}, points(4)
    net = model()
    fully_shard(net)
    with torch.no_grad():
        net(x)  # leaves the gathered weights in the model
    late = MeZO(net.named_parameters(), **OPTIONS)
    found["gathered"] = message(lambda: distributed.join(late, net))
    net.reshard()
    optimizer = MeZO(net.named_parameters(), **OPTIONS)
    found["alone"] = message(lambda: optimizer.step(lambda: loss(net, x, y)))
    found["model"] = message(lambda: distributed.join(optimizer))
    for options in (
        {"rule": "adam"},
        {"layers": {"thresholds": {"0.weight": 1.0}}, "perturbation": "scratch"},
    ):
        other = MeZO(net.named_parameters(), **OPTIONS, **options)
        found[str(options)] = message(lambda other=other: distributed.join(other, net))
    mixed = model()
    fully_shard(mixed, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    other = MeZO(mixed.named_parameters(), **OPTIONS, perturbation="scratch")
    found["mixed"] = message(lambda: distributed.join(other, mixed))
    twice = model(seed=rank)
    whole = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(twice, mesh=whole)
    other = MeZO(twice.named_parameters(), **OPTIONS)
    found["replicas"] = message(lambda: distributed.join(other, twice))
    tensor = model(width=8)
    parallelize_module(tensor, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    other = MeZO(tensor.named_parameters(), **OPTIONS, perturbation="low_rank")
    found["low_rank"] = message(lambda: distributed.join(other, tensor))
    return found


@needs_fsdp
def test_what_would_corrupt_silently_is_refused_by_name(tmp_path):
    first, second = run(refused, 2, tmp_path)
    assert first == second
    assert first["gathered"].startswith("parameter 0.weight of the optimizer is not the model's")
    assert first["alone"].startswith("parameter 0.weight is sharded: call mezo.distributed.join")
    assert first["model"] == "parameter 0.weight is sharded: join(optimizer, model)"
    assert "float32 and gathered as torch.bfloat16" in first["mixed"]
    assert "rank 1 has other numbers than rank 0 in the same shard" in first["replicas"]
    assert "is sharded by tensor parallelism: perturbation must be" in first["low_rank"]
    assert all(value.startswith("parameter 0.weight") for value in first.values())


def tensor_parallel(rank, folder, dtype, form):
    net, (x, y) = model(dtype, seed=1, width=8), points(8, dtype)
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = MeZO(net.named_parameters(), perturbation=form, **OPTIONS)
    distributed.join(optimizer, net)
    with elastic.record(optimizer, f"{folder}/tp.mezo", model=net):
        losses = [optimizer.step(lambda: loss(net, x, y)) for _ in range(3)]
    kinds = [str(p.placements[0]) if isinstance(p, DTensor) else "" for p in net.parameters()]
    shards = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
    return losses, torch.cat([p.detach().flatten().double() for p in shards]).tolist(), kinds


BOTH = [(torch.float32, "in_place"), (torch.float32, "scratch"), (torch.bfloat16, "scratch")]


@pytest.mark.parametrize(("dtype", "form"), BOTH, ids=lambda value: str(value))
def test_a_tensor_parallel_run_replays_on_one_device(tmp_path, dtype, form):
    """Columns and rows: the log rebuilds the weights to the bit; losses differ in sums' order.

    Tolerance of the first step: each loss is a mean of 8 squares of at most 4, after sums of at
    most 8 products of at most 1, each rounded.
    """
    found = run(tensor_parallel, 2, tmp_path, str(tmp_path), dtype, form)
    assert found[0] == found[1]
    losses, after, kinds = found[0]
    assert {kinds[0], kinds[2]} == {str(Shard(0)), str(Shard(1))}
    replayed = trajectory.replay(tmp_path / "tp.mezo", model(dtype, seed=1, width=8))
    assert weights(replayed).tolist() == after
    net, (x, y) = model(dtype, seed=1, width=8), points(8, dtype)
    optimizer = MeZO(net.named_parameters(), perturbation=form, **OPTIONS)
    first = optimizer.estimate(lambda: loss(net, x, y))
    error = (8 + 8 * 2) * torch.finfo(dtype).eps * 2
    assert losses[0] == pytest.approx(first.loss, abs=error)
    (grad,) = trajectory.read(tmp_path / "tp.mezo").steps[0].record.projected_grads
    assert grad == pytest.approx(first.projected_grad, abs=error / OPTIONS["eps"])


def rejoining(rank, folder):
    """Rank 1 alone has the log of 3 steps; the run goes on to 5 from it."""
    net, (x, y) = model(seed=1), points(8)
    fully_shard(net)
    optimizer = MeZO(net.named_parameters(), num_samples=2, **OPTIONS)
    path = f"{folder}/{rank}.mezo"
    made = elastic.catch_up(optimizer, path)
    distributed.join(optimizer, net)
    with elastic.record(optimizer, path, model=net):
        for _ in range(2):
            optimizer.step(lambda: loss(net, x, y))
    full = torch.cat([p.full_tensor().detach().flatten().double() for p in net.parameters()])
    return made, full.tolist()


@needs_fsdp
def test_processes_without_the_log_are_sent_it(tmp_path):
    """The log of a run on one device: shards catch up by it, as if nothing had come between."""
    net, (x, y) = model(seed=1), points(8)
    optimizer = MeZO(net.named_parameters(), num_samples=2, **OPTIONS)
    with trajectory.record(optimizer, tmp_path / "1.mezo", model=net):
        for _ in range(3):
            optimizer.step(lambda: loss(net, x, y))
    found = run(rejoining, 2, tmp_path, str(tmp_path))
    for _ in range(2):
        optimizer.step(lambda: loss(net, x, y))
    assert found == [(3, weights(net).tolist())] * 2
    again = trajectory.replay(tmp_path / "0.mezo", model(seed=1))
    assert digest(again) == digest(net)
