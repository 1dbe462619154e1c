"""Several processes, one run, that may be killed: the plain loop with three lines more.

    torchrun --nproc_per_node=2 examples/two_processes.py
    torchrun --nproc_per_node=2 --max-restarts=3 examples/two_processes.py --probes=-1

Each process sees its own examples; what travels a step is some dozen bytes. With --probes=-1 each
has a direction of its own too. A process that dies is started again with the others by torchrun,
and makes the steps that were made from the run log (docs/distributed.md). Alone, without torchrun,
the script does it all in one process.
"""

import argparse
import os

import torch
from torch import distributed as dist

from mezo import MeZO
from mezo.distributed import elastic
from mezo.distributed import processes as distributed

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--probes", type=int, default=1)
parser.add_argument("--log", default="two_processes.mezo")
args = parser.parse_args()

rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if size > 1:
    dist.init_process_group("gloo")  # "nccl" on GPUs

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
x = torch.randn(1024, 8)
y = x.sum(1, keepdim=True).sin()

samples = max(args.probes, size if args.probes == -1 else 1)
optimizer = MeZO(model.named_parameters(), lr=1e-2, eps=1e-3, num_samples=samples, seed=0)
elastic.catch_up(optimizer, args.log)  # of a run that was interrupted: its steps up to now
distributed.join(optimizer, model, probes=args.probes)

loss = float("nan")
with elastic.record(optimizer, args.log, model=model):
    for step in range(optimizer.param_groups[0]["step"], args.steps):
        order = torch.Generator().manual_seed(step)
        mine = torch.randint(len(x), (size, 32), generator=order)[rank]
        batch, target = x[mine], y[mine]
        loss = optimizer.step(lambda b=batch, t=target: (model(b) - t).square().mean())

with torch.no_grad():
    final = (model(x) - y).square().mean().item()
checksum = sum(p.double().sum().item() for p in model.parameters())
print(f"rank {rank} of {size}: loss {final:.4f}, weights {checksum:.15f}")
distributed.leave()
