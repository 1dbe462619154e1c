"""Sharded models perturbed where they are read: scratch, low rank, FSDP2 on tensor parallel."""

import hashlib
from contextlib import contextmanager

import pytest
import torch
from perceptron import OPTIONS, loss, message, model, points, weights
from processes import needs_fsdp, newer_torch, run
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

from mezo import MeZO, trajectory
from mezo.distributed import elastic
from mezo.distributed import processes as distributed

FORMS = [
    ("float32", "in_place"),
    ("float32", "scratch"),
    ("bfloat16", "scratch"),
    ("float16", "scratch"),
    ("float32", "low_rank"),
    ("bfloat16", "low_rank"),
]
IDS = torch.arange(24).view(4, 6) % 11


class Net(torch.nn.Module):
    """A tied embedding, read outside of its module; a vector that no module reads as it is."""

    def __init__(self):
        super().__init__()
        self.embed, self.scale = torch.nn.Embedding(11, 8), torch.nn.Parameter(torch.zeros(8))
        self.inner, self.outer = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    def forward(self, ids):
        x = self.outer(self.inner(self.embed(ids)).tanh()) * (1 + self.scale)
        return F.linear(x, self.embed.weight)


def net_of(dtype):
    with torch.random.fork_rng():
        torch.random.manual_seed(1)
        return Net().to(getattr(torch, dtype))


def steps_of(net, optimizer, log):
    """Losses of 4 steps, and evaluations between them, of what is written meanwhile."""
    losses, after = [], []

    def entropy():
        return F.cross_entropy(net(IDS).flatten(0, 1).float(), IDS.flatten())

    with log, torch.no_grad():
        for step in range(4):
            losses.append(optimizer.step(entropy))
            if step > 1:
                after.append(entropy().item())
                optimizer.write()
                after.append(entropy().item())
    return losses, after


def optimizer_of(net, form):
    return MeZO(net.named_parameters(), perturbation=form, num_samples=2, interval=3, **OPTIONS)


def digest(tensors):
    whole = torch.cat([p.detach().flatten().double() for p in tensors])
    return hashlib.sha256(whole.numpy().tobytes()).hexdigest()


def columns(p):
    return Shard(1) if p.dim() == 2 else None


def sharded(rank, folder, shape):
    """Rows, columns, a unit that keeps what it has gathered; of a square, one side replicates."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    found = []
    for dtype, form in FORMS:
        net = net_of(dtype)
        fully_shard(net.embed, mesh=mesh, reshard_after_forward=False)
        fully_shard(net.inner, mesh=mesh, shard_placement_fn=columns)
        fully_shard(net, mesh=mesh)
        optimizer = optimizer_of(net, form)
        distributed.join(optimizer, net)
        log = elastic.record(optimizer, f"{folder}/{dtype}-{form}.mezo", model=net)
        told = steps_of(net, optimizer, log)
        full = digest([p.full_tensor() for _, p, _ in optimizer.trained()])
        found.append((*told, full))
    return found


def assert_one_device(tmp_path, found, forms=FORMS):
    """Losses, evaluations, weights and run log of all processes are those of one."""
    assert all(row == found[0] for row in found)
    for (dtype, form), row in zip(forms, found[0], strict=True):
        net, path = net_of(dtype), tmp_path / "one.mezo"
        optimizer = optimizer_of(net, form)
        told = steps_of(net, optimizer, trajectory.record(optimizer, path, model=net))
        assert row == (*told, digest(net.parameters())), (dtype, form)
        assert (tmp_path / f"{dtype}-{form}.mezo").read_bytes() == path.read_bytes(), (dtype, form)


@needs_fsdp
def test_every_form_takes_the_steps_of_one_device(tmp_path):
    """Rows, columns, a tied embedding; the evaluations read what was written."""
    assert_one_device(tmp_path, run(sharded, 2, tmp_path, str(tmp_path), (2,)))


@needs_fsdp
def test_replicas_of_shards_take_the_steps_of_one_device(tmp_path):
    """HSDP: two replicas of two shards."""
    assert_one_device(tmp_path, run(sharded, 4, tmp_path, str(tmp_path), (2, 2)))


PROBED = [FORMS[i] for i in (0, 1, 2, 4)]


def with_probes(rank, folder):
    """Two pairs, each with a direction and a copy of its own, sharded over the two."""
    mesh, found = init_device_mesh("cpu", (2, 2), mesh_dim_names=("probe", "shard")), []
    for dtype, form in PROBED:
        net = net_of(dtype)
        fully_shard(net, mesh=mesh["shard"])
        optimizer = optimizer_of(net, form)
        distributed.join(optimizer, net, mesh=mesh)
        log = elastic.record(optimizer, f"{folder}/{dtype}-{form}.mezo", model=net)
        told = steps_of(net, optimizer, log)
        full = digest([p.full_tensor() for _, p, _ in optimizer.trained()])
        found.append((*told, full))
    wide = net_of("float32")
    fully_shard(wide, mesh=init_device_mesh("cpu", (4,)))
    optimizer = optimizer_of(wide, "in_place")
    return found, message(lambda: distributed.join(optimizer, wide, probes=2))


@needs_fsdp
def test_probes_go_with_shards_if_each_has_a_copy(tmp_path):
    """Else one forward pass would gather what is perturbed along several directions."""
    rows = run(with_probes, 4, tmp_path, str(tmp_path))
    assert_one_device(tmp_path, [found for found, _ in rows], PROBED)
    for _, refused in rows:
        assert "scale is sharded over ranks 0, 1, 2, 3, which have directions of their" in refused


def seldom(rank):
    """One process does not read a parameter: what then is looked into takes forward passes."""
    net, (x, y) = model(seed=1), points(4)
    net.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    fully_shard(net)
    optimizer = MeZO(net.named_parameters(), perturbation="scratch", num_samples=2, **OPTIONS)
    distributed.join(optimizer, net)

    def closure():
        found = loss(net, x, y)  # it was gathered for this pass
        return found + (net.extra.square().sum() if rank else 0.0)

    return [optimizer.step(closure) for _ in range(2)]


@needs_fsdp
def test_processes_that_read_other_parameters_stay_together(tmp_path):
    first, second = run(seldom, 2, tmp_path)
    assert first == second


@contextmanager
def plain(module):
    """As transformers has a tensor parallel module's parameters: this process's part of each."""
    kept = dict(module._parameters)
    module._parameters.update({leaf: p.to_local() for leaf, p in kept.items()})
    try:
        yield
    finally:
        module._parameters.update(kept)


def in_parts(rank, folder):
    net, (x, y) = model(torch.float64, 1, 8), points(8, torch.float64)
    mesh, found = init_device_mesh("cpu", (2,)), []
    for i, leaf, place in ((0, "weight", 0), (0, "bias", 0), (2, "weight", 1), (2, "bias", None)):
        placement = Replicate() if place is None else Shard(place)
        whole = distribute_tensor(getattr(net[i], leaf).detach(), mesh, [placement])
        net[i].register_parameter(leaf, torch.nn.Parameter(whole))
    optimizer = MeZO(net.named_parameters(), perturbation="scratch", **OPTIONS)
    distributed.join(optimizer, net)

    def closure():
        with plain(net[0]):
            inner = net[0](x).tanh()
        with plain(net[2]):
            out = F.linear(inner, net[2].weight)
            dist.all_reduce(out)
            return (out + net[2].bias - y).square().mean()

    with elastic.record(optimizer, f"{folder}/parts.mezo", model=net):
        found = [optimizer.step(closure) for _ in range(3)]
    return found, torch.cat([p.full_tensor().detach().flatten() for p in net.parameters()]).tolist()


@newer_torch("gives no Parameter for a part of one: the run is refused")
def test_plain_parts_of_tensor_parallel_weights_are_perturbed_as_what_they_are(tmp_path):
    """Tolerance: means of 8 squares of at most 4, sums of products in another order, in 3 steps."""
    first, second = run(in_parts, 2, tmp_path, str(tmp_path))
    assert first == second
    net, (x, y) = model(torch.float64, 1, 8), points(8, torch.float64)
    optimizer = MeZO(net.named_parameters(), perturbation="scratch", **OPTIONS)
    losses = [optimizer.step(lambda: loss(net, x, y)) for _ in range(3)]
    assert first[0] == pytest.approx(losses, abs=3 * (8 + 8 * 2) * 2.0**-52 * 2 / OPTIONS["eps"])
    replayed = trajectory.replay(tmp_path / "parts.mezo", model(torch.float64, 1, 8))
    assert weights(replayed).tolist() == first[1]


def experts_of(rank):
    """One expert's weights, of three that are stacked and split by columns."""
    whole = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net = torch.nn.ParameterDict({"w": whole})
    if rank is not None:
        shards = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(1)])
        net = torch.nn.ParameterDict({"w": shards})
    optimizer = MeZO(net.named_parameters(), perturbation="scratch", **OPTIONS)
    distributed.join(optimizer, net)

    def closure():
        found = net["w"][1].square().sum()
        return found if rank is None else found.full_tensor()

    return [optimizer.step(closure) for _ in range(3)]


@newer_torch("cannot index a DTensor")
def test_an_expert_of_a_sharded_stack_is_perturbed_as_what_it_is(tmp_path):
    """Tolerance: 24 squares of at most 16 in another order, over eps, in 3 steps."""
    found = run(experts_of, 2, tmp_path)
    error = 3 * 24 * 16 * 2.0**-52 * 2 / OPTIONS["eps"]
    assert found[0] == found[1] == pytest.approx(experts_of(None), abs=error)


TWO = [("float32", "in_place"), ("float32", "scratch"), ("bfloat16", "scratch")]


def on_a_square(rank, folder):
    """Rows and columns by tensor parallelism, each shard split by FSDP2; each pair has its half."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    found = []
    for dtype, form in TWO:
        net, (x, y) = model(getattr(torch, dtype), 1, 8), points(8, getattr(torch, dtype))
        parallelize_module(net, mesh["tensor"], plan)
        for module in (net[0], net):
            fully_shard(module, mesh=mesh["data"])
        optimizer = MeZO(net.named_parameters(), perturbation=form, **OPTIONS)
        distributed.join(optimizer, net)
        half = slice(4 * mesh.get_local_rank("data"), 4 * mesh.get_local_rank("data") + 4)
        with elastic.record(optimizer, f"{folder}/{dtype}-{form}.mezo", model=net):
            losses = [
                optimizer.step(lambda n=net, a=x[half], b=y[half]: loss(n, a, b)) for _ in range(3)
            ]
        full = [p.full_tensor().detach().flatten().double() for _, p, _ in optimizer.trained()]
        found.append((losses, torch.cat(full).tolist()))
    low_rank = MeZO(net.named_parameters(), perturbation="low_rank", **OPTIONS)
    uneven = model(seed=1, width=7)
    parallelize_module(uneven, mesh["tensor"], plan)
    fully_shard(uneven, mesh=mesh["data"])
    other = MeZO(uneven.named_parameters(), **OPTIONS)
    refused = message(lambda: distributed.join(low_rank, net))
    return found, [refused, message(lambda: distributed.join(other, uneven))]


@needs_fsdp
def test_fsdp_of_tensor_parallel_shards_replays_on_one_device(tmp_path):
    """Tolerance of the first loss: means of 8 squares of at most 4, sums of products in two."""
    found = run(on_a_square, 4, tmp_path, str(tmp_path))
    assert all(row == found[0] for row in found)
    runs, refused = found[0]
    assert "tensor parallelism: perturbation must be in_place or scratch" in refused[0]
    assert "0.weight has 7 rows" in refused[1]
    for (name, form), (losses, after) in zip(TWO, runs, strict=True):
        dtype = getattr(torch, name)
        replayed = trajectory.replay(tmp_path / f"{name}-{form}.mezo", model(dtype, 1, 8))
        assert weights(replayed).tolist() == after
        net, (x, y) = model(dtype, 1, 8), points(8, dtype)
        optimizer = MeZO(net.named_parameters(), perturbation=form, **OPTIONS)
        first = optimizer.estimate(lambda net=net, x=x, y=y: loss(net, x, y))
        assert losses[0] == pytest.approx(first.loss, abs=(8 + 8 * 2) * torch.finfo(dtype).eps * 2)
