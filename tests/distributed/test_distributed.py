"""Several processes take the steps of one: data parallel, probe parallel, and what stops a run."""

import pytest
import torch
from perceptron import OPTIONS, digest, loss, message, model, points, weights
from processes import run
from torch import distributed as dist

from mezo import MeZO, trajectory
from mezo.closures import Mean
from mezo.distributed import processes as distributed

SIZES = (2, 3, 7)  # examples of each process


def data_parallel(rank):
    net = model(torch.float64, seed=rank)  # rank 0's count
    x, y = (part.split(SIZES)[rank] for part in points(12, torch.float64))
    calls, isend = [], dist.isend
    optimizer = MeZO(net.named_parameters(), num_samples=2, **OPTIONS)
    distributed.join(optimizer, net)
    dist.isend = lambda row, *rest: calls.append(row.numel()) or isend(row, *rest)
    dist.all_gather = None
    found = [optimizer.step(Mean(lambda: loss(net, x, y), len(x))) for _ in range(5)]
    return found, weights(net).tolist(), digest(net), calls


def test_unequal_batches_are_one_joined_batch(tmp_path):
    """15 numbers to each of the others a step, and nothing else, whatever the model's size.

    Tolerance: a mean of 12 squares in another order is off by 12 roundings of at most its size, 2;
    the projected gradient by that over eps; each of 5 steps moves a weight by lr |z| <= 5 lr of it.
    """
    found = run(data_parallel, 3, tmp_path)
    assert len({row[2] for row in found}) == 1
    assert all(row[3] == [3 + 2 * 6] * 2 * 5 for row in found)
    net, (x, y) = model(torch.float64), points(12, torch.float64)
    optimizer = MeZO(net.named_parameters(), num_samples=2, **OPTIONS)
    losses = [optimizer.step(lambda: loss(net, x, y)) for _ in range(5)]
    error = 12 * 2.0**-52 * 2 / OPTIONS["eps"]
    assert found[0][0] == pytest.approx(losses, abs=5 * 5 * OPTIONS["lr"] * error * 10)
    moved = (weights(net) - torch.tensor(found[0][1], dtype=torch.float64)).abs().max()
    assert moved <= 5 * 5 * OPTIONS["lr"] * error
    equal = model(torch.float64)  # the weights of batches matter: equal ones give another run
    plain = MeZO(equal.named_parameters(), num_samples=2, **OPTIONS)
    for _ in range(5):
        for probe in range(2):
            for part in zip(x.split(SIZES), y.split(SIZES), strict=True):
                plain.estimate(lambda part=part: loss(equal, *part), probe)
        plain.step()
    assert (weights(equal) - weights(net)).abs().max() > 1e-6


def test_examples_weigh_the_estimates_of_one_direction():
    """Micro-batches of 2, 3 and 7 in one process, as well as over three."""
    net, twin, (x, y) = model(torch.float64), model(torch.float64), points(12, torch.float64)
    options = OPTIONS | {"perturbation": "scratch"}
    parts, whole = MeZO(net.named_parameters(), **options), MeZO(twin.named_parameters(), **options)
    for part in zip(x.split(SIZES), y.split(SIZES), strict=True):
        parts.estimate(Mean(lambda part=part: loss(net, *part), len(part[0])))
    assert parts.step() == pytest.approx(whole.step(lambda: loss(twin, x, y)), rel=1e-13)
    assert torch.allclose(weights(net), weights(twin), rtol=0, atol=1e-12)


PROBES = [
    {},
    {"perturbation": "scratch"},
    {"perturbation": "low_rank", "interval": 2},
    {"shaping": "ranks"},
    {"estimator": "one_sided", "shaping": "z_scores", "distribution": "rademacher"},
    {"rule": "momentum", "weight_decay": 0.1},
]
EACH = 3  # directions: two of rank 1, as 3 are not divided by 2


def probe_parallel(rank, folder, options, batches):
    found, sizes = [], set()
    for number, more in enumerate(options):
        net = model(torch.bfloat16 if number == 1 else torch.float32)
        optimizer = MeZO(net.named_parameters(), num_samples=EACH, **(OPTIONS | more))
        processes = distributed.join(optimizer, net, probes=2)
        exchange = processes.exchange
        processes.exchange = lambda row, send=exchange: sizes.add(len(row)) or send(row)
        path = f"{folder}/{number}-{rank}.mezo"
        with trajectory.record(optimizer, path):
            for step in range(4):
                for probe in processes.share(EACH):
                    part = batches[step][probe]
                    optimizer.estimate(lambda part=part, net=net: part_loss(net, part), probe)
                optimizer.step()
        found.append(digest(net))
    assert sizes == {15}  # its own two directions of six numbers, two checksums, the first's place
    return found


def part_loss(net, part):
    dtype = next(net.parameters()).dtype
    return loss(net, *(torch.tensor(one).to(dtype) for one in part)).float()


def test_probe_parallel_is_one_process_with_as_many_directions(tmp_path):
    """The run logs are the same bytes: in place too, where every walk rounds the weights."""
    x, y = points(4 * EACH * 2)
    rows = [one.view(4, EACH, 2, -1).tolist() for one in (x, y)]
    batches = [[(rows[0][s][p], rows[1][s][p]) for p in range(EACH)] for s in range(4)]
    found = run(probe_parallel, 2, tmp_path, str(tmp_path), PROBES, batches)
    assert found[0] == found[1]
    for number, more in enumerate(PROBES):
        net = model(torch.bfloat16 if number == 1 else torch.float32)
        optimizer = MeZO(net.named_parameters(), num_samples=EACH, **(OPTIONS | more))
        with trajectory.record(optimizer, tmp_path / "one.mezo"):
            for step in range(4):
                for probe in range(EACH):
                    part = batches[step][probe]
                    optimizer.estimate(lambda part=part, net=net: part_loss(net, part), probe)
                optimizer.step()
        assert digest(net) == found[0][number], more
        for rank in range(2):
            log = (tmp_path / f"{number}-{rank}.mezo").read_bytes()
            assert log == (tmp_path / "one.mezo").read_bytes(), more


def mesh(rank):
    from torch.distributed.device_mesh import init_device_mesh

    net, (x, y) = model(), points(8)
    optimizer = MeZO(net.named_parameters(), num_samples=4, **OPTIONS)
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "probe"))
    processes = distributed.join(optimizer, mesh=both)
    data = both.get_local_rank("data")
    half = slice(4 * data, 4 * data + 4)
    for _ in range(3):
        optimizer.step(lambda: loss(net, x[half], y[half]))
    return digest(net), list(processes.share(4)), weights(net).tolist()


def test_a_mesh_of_probes_and_data(tmp_path):
    """Ranks 0 and 2 share directions 0 and 1, each with half of the batch; 1 and 3 the others.

    Tolerance: losses of at most 1, means of 8 or of 4 and 4, are off by 8 roundings.
    """
    found = run(mesh, 4, tmp_path)
    assert len({row[0] for row in found}) == 1
    assert [row[1] for row in found] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    net, (x, y) = model(), points(8)
    optimizer = MeZO(net.named_parameters(), num_samples=4, **OPTIONS)
    for _ in range(3):
        optimizer.step(lambda: loss(net, x, y))
    error = 8 * 2.0**-24 * 2 / OPTIONS["eps"]
    moved = (weights(net) - torch.tensor(found[0][2], dtype=torch.float64)).abs().max()
    assert moved <= 3 * 5 * OPTIONS["lr"] * error


def two_ways(rank):
    found, (x, y) = [], points(6)
    for direct in (True, False):
        net = model()
        optimizer = MeZO(net.named_parameters(), num_samples=2, **OPTIONS)
        distributed.join(optimizer, net)._direct = direct
        for _ in range(3):
            optimizer.step(lambda net=net: loss(net, x[rank::3], y[rank::3]))
        found.append(digest(net))
    return found


def test_a_gather_does_as_well_as_messages(tmp_path):
    """Messages are gloo's, for up to 64 processes; NCCL and more processes gather."""
    found = run(two_ways, 3, tmp_path)
    assert len({one for row in found for one in row}) == 1


def stopped(rank):
    found = {}
    x, y = points(4)

    def begun(**changes):
        net = model()
        optimizer = MeZO(net.named_parameters(), **(OPTIONS | changes))
        return net, optimizer, lambda: optimizer.step(lambda: loss(net, x, y))

    net, optimizer, step = begun(seed=rank // 2)
    found["seed"] = message(lambda: distributed.join(optimizer, net))
    net, optimizer, step = begun()
    distributed.join(optimizer, net, check_every=2)
    step()
    before = weights(net)
    optimizer.param_groups[0]["lr"] = 0.5 if rank == 1 else 1e-2
    found["lr"] = message(step)
    optimizer.param_groups[0]["lr"] = 1e-2
    found["moved"] = (weights(net) - before).abs().max().item()
    net, optimizer, step = begun(perturbation="scratch")
    distributed.join(optimizer, net, check_every=2)
    step()
    if rank == 2:
        net[2].bias.data[0] += 1e-6
    found["weights"] = [message(step), message(step)]
    net, optimizer, step = begun(perturbation="scratch", num_samples=2)
    distributed.join(optimizer, net, probes=1)
    found["probes"] = message(lambda: distributed.join(optimizer, net, probes=2))
    found["few"] = message(lambda: distributed.join(optimizer, net, probes=-1))
    found["walks"] = []
    net, optimizer, _ = begun()
    distributed.join(optimizer, net)
    for _ in range(1 + rank):
        optimizer.estimate(lambda: loss(net, x, y))
    found["walks"] = message(optimizer.step)
    return found


def test_a_process_that_differs_stops_the_run_and_is_named(tmp_path):
    """At the door, at the step for settings, at the next comparison for weights; on every rank."""
    found = run(stopped, 3, tmp_path)
    assert found[0] == found[1] == found[2]
    first = found[0]
    assert "rank 2 differs from rank 0: seed is 1, not 0" in first["seed"]
    assert first["lr"].startswith("step 1: rank 1 differs from rank 0: lr is [0.5], not [0.01]")
    assert first["moved"] <= 3 * 2.0**-24  # there and back, without an update
    assert first["weights"][0] == ""
    assert "step 2: rank 2 differs from rank 0: the weights of 2.bias" in first["weights"][1]
    assert first["probes"] == "3 processes cannot be split into 2 groups for probes"
    assert first["few"].startswith("num_samples 2 is less than the 3 groups")
    assert first["walks"].startswith("the processes made 1, 2, 3 estimates along direction 0")


def failing(rank):
    net, (x, y) = model(), points(4)
    optimizer = MeZO(net.named_parameters(), num_samples=2, **OPTIONS)
    distributed.join(optimizer, net)
    records, digests = [], []
    optimizer.observers.append(lambda record: records.append(record.projected_grads))

    def bad():
        if rank == 1 and len(records) == 1:
            raise OSError("no such batch")
        return loss(net, x, y) * (float("nan") if rank == 0 and len(records) == 2 else 1.0)

    for step in range(4):
        try:
            optimizer.step(bad)
        except OSError:
            assert (rank, step) == (1, 1)
        digests.append(digest(net))
    return [[g == g for g in grads] for grads in records], digests


def test_all_refuse_a_step_that_failed_in_one(tmp_path):
    """An exception in one process, and a NaN in another: nobody updates, and all go on together.

    In place the walks round the weights, so that those of directions which were not reached in the
    failing process are made there too.
    """
    first, second = run(failing, 2, tmp_path)
    assert first == second
    finite = [all(row) for row in first[0]]
    assert finite == [True, False, False, True]


def sent(rank):
    net = model(seed=0)
    net[2] = torch.nn.Linear(7, 1)
    torch.nn.init.constant_(net[2].weight, rank)
    torch.nn.init.constant_(net[2].bias, 1.0)
    net.register_buffer("offset", torch.full((3, 2), rank + 5.0).t())
    optimizer = MeZO(net.named_parameters(), **OPTIONS)
    calls, broadcast = [], dist.broadcast
    dist.broadcast = lambda tensor, **rest: (
        calls.append(tensor.numel()) or broadcast(tensor, **rest)
    )
    distributed.join(optimizer, net)
    dist.broadcast = broadcast
    return calls, digest(net), net.offset.tolist(), net.offset.stride()


def test_joining_sends_what_differs_alone(tmp_path):
    """A head that each process initialised, and a buffer; over a slow link the rest would cost."""
    first, second = run(sent, 2, tmp_path)
    assert first == second
    assert first[0] == [7, 6]
    assert first[2] == [[5.0] * 3] * 2
    assert first[3] == (1, 2)


def test_alone_joining_changes_nothing():
    net, twin, (x, y) = model(), model(), points(4)
    joined, plain = (MeZO(m.named_parameters(), num_samples=2, **OPTIONS) for m in (net, twin))
    distributed.join(joined, net, probes=2)
    joined.step(lambda: loss(net, x, y))
    plain.step(lambda: loss(twin, x, y))
    assert torch.equal(weights(net), weights(twin))
