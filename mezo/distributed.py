"""Data parallel: every process holds the same weights and the same z, and sees its own examples.

    loss_plus = mean over processes of loss_plus(process's batch)        loss_minus likewise

One number a forward pass is all that travels: no gradient, so no DistributedDataParallel. Start the
same script with `torchrun --nproc_per_node=N`; without a process group all this is the identity.
"""

from itertools import chain

import torch
from torch import distributed as dist


def mean_over_processes(value: float, device: torch.device | str = "cpu") -> float:
    """The mean of every process's `value`, the same bits everywhere: float64, summed in rank order.

    An all-reduce would not do: its order of summation may differ from rank to rank, and weights
    that differ in one bit drift apart. A value that is not finite reaches every process, so that
    all refuse the update together. `device` is where the backend sends from (NCCL: the GPU).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return sum(torch.cat(everyone).tolist()) / len(everyone)


@torch.no_grad()
def broadcast_(module: torch.nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0, as DistributedDataParallel does.

    Once, before the first step: heads and adapters are initialised at random by each process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    for tensor in chain(module.parameters(), module.buffers()):
        if not tensor.is_meta:  # offloaded: frozen, or the optimizer has refused it
            sent = tensor.detach().contiguous()  # the tensor itself, unless its strides forbid it
            dist.broadcast(sent, src=0)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)
