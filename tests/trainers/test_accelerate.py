"""Loops of Accelerate's: what `prepare` wraps, and what `accelerate launch` starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from perceptron import OPTIONS, digest, loss, message, model, points
from processes import LIMIT, run

from mezo import MeZO
from mezo.distributed import processes as distributed

ROOT = Path(__file__).parents[2]
SIZE = 4  # examples a batch


def prepared(rank):
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(ranks, ACCELERATE_USE_CPU="1", MASTER_ADDR="localhost", MASTER_PORT="1")
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    found = []
    for everything in (False, True):
        net = model(torch.float64, seed=rank)  # rank 0's weights count
        optimizer = MeZO(net.named_parameters(), **OPTIONS)
        loader = DataLoader(TensorDataset(*points(24, torch.float64)), batch_size=SIZE)
        if everything:
            seen, wrapped, loader = accelerator.prepare(net, optimizer, loader)
            refused = message(lambda o=wrapped, n=seen: distributed.join(o, n))
            optimizer = wrapped.optimizer
        else:
            seen, loader = net, accelerator.prepare(loader)
        distributed.join(optimizer, seen)
        losses = [optimizer.step(lambda n=seen, b=batch: loss(n, *b)) for batch in loader]
        found.append((losses, digest(net)))
    return found, type(seen).__name__, refused


def test_a_model_in_ddp_takes_the_same_steps_as_without(tmp_path):
    """Weights equal in both processes, and losses those of one process with both batches.

    Tolerance as for unequal batches: test_distributed.py.
    """
    first, second = run(prepared, 2, tmp_path)
    assert first == second
    found, wrapper, refused = first
    assert wrapper == "DistributedDataParallel"
    assert "take its .optimizer" in refused
    assert found[0] == found[1]
    net = model(torch.float64, seed=0)
    optimizer = MeZO(net.named_parameters(), **OPTIONS)
    both = zip(*(one.split(2 * SIZE) for one in points(24, torch.float64)), strict=True)
    losses = [optimizer.step(lambda pair=pair: loss(net, *pair)) for pair in both]
    error = 8 * 2.0**-52 * 2 / OPTIONS["eps"]
    assert found[0][0] == pytest.approx(losses, abs=3 * 5 * OPTIONS["lr"] * error * 10)


def forgotten(rank):
    import logging

    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("mezo").addHandler(handler)
    net, (x, y) = model(seed=rank), points(4)
    optimizer = MeZO(net.named_parameters(), **OPTIONS)
    for _ in range(2):
        optimizer.step(lambda: loss(net, x, y))
    return told


def test_who_forgets_to_join_is_told_once(tmp_path):
    for told in run(forgotten, 2, tmp_path):
        assert [line for line in told if "join" in line] == told[:1]


@pytest.mark.slow  # 10 to 60 s: three programs that import torch and accelerate
def test_accelerate_launch_starts_two_processes_on_cpus(tmp_path):
    """As docs/distributed.md says; `--cpu --num_processes 2` starts one."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0"]
    command += [str(ROOT / "examples/two_processes.py"), "--steps", "20"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--log", str(tmp_path / "run.mezo")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = dict(re.findall(r"rank (\d) of 2: (loss \S+, weights [-\d.]+)", done.stdout))
    assert sorted(told) == ["0", "1"]
    assert told["0"] == told["1"]
