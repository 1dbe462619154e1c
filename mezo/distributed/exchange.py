"""What processes say to each other: a few numbers, or a text, from each to all, in rank order."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from mezo.noise.sharded import is_sharded

_TAG = 0x6D657A6F  # of our messages, so that they are told from a program's own
_MOST = 64  # processes that send to each other directly: then it is a few KB a step in all
_CHUNK = 2**20  # elements of a fingerprint at a time: its integers then take 16 MiB
_ODD = 0x1E3779B97F4A7C15  # of a fingerprint: element i has the factor (2 i + 1) _ODD


class Link:
    """Exchanges small values between all processes of a group, in rank order.

    Args:
        device: where the weights are. NCCL sends from there, other backends from the CPU.
        group: the processes; None is all of them.

    Attributes:
        rank, size: this process's number in the group, and how many there are.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._device = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
        self._direct = dist.get_backend(group) == "gloo" and self.size <= _MOST
        self._wanted: dict[int, tuple[torch.Tensor, Any]] = {}  # by rank: receipts under way

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every process's `values`, in rank order. All give equally many."""
        mine = torch.tensor(values, dtype=torch.float64, device=self._device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        return [row.tolist() for row in found]

    def expect(self, count: int) -> None:
        """Ask all others for `count` numbers, before a forward pass: they may send without asking.

        On a link of 50 ms the `exchange` after it then takes 50 ms for any number of processes,
        where gloo's ring takes 100 ms for each but one of them.
        """
        if not self._direct or self._wanted:
            return
        for rank in self._others():
            row = torch.empty(count, dtype=torch.float64)
            self._wanted[rank] = row, dist.irecv(row, self._global(rank), self.group, _TAG)

    def exchange(self, values: Sequence[float]) -> list[list[float]]:
        """`gather`, of as many numbers as are expected."""
        if not self._direct:
            return self.gather(values)
        self.expect(len(values))
        mine = torch.tensor(values, dtype=torch.float64)
        wanted, self._wanted = self._wanted, {}
        sent = [dist.isend(mine, self._global(i), self.group, _TAG) for i in self._others()]
        for work in (*(work for _, work in wanted.values()), *sent):
            work.wait()
        rows = {rank: row for rank, (row, _) in wanted.items()} | {self.rank: mine}
        return [rows[rank].tolist() for rank in range(self.size)]

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def ranks(self, of_all: Sequence[int]) -> list[int]:
        """In this group, of ranks among all processes."""
        known = self.group
        return [r if known is None else dist.get_group_rank(known, r) for r in of_all]

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    @torch.no_grad()
    def broadcast_(self, tensor: torch.Tensor) -> None:
        """Copy a tensor's elements from the group's rank 0 to every process, in place."""
        sent = tensor.detach().contiguous()  # the tensor itself, unless its strides forbid it
        dist.broadcast(sent, src=self._global(0), group=self.group)
        if sent.data_ptr() != tensor.data_ptr():
            tensor.copy_(sent)

    def gather_json(self, value: Any) -> list[Any]:
        """Every process's `value`, which JSON can hold: nothing is executed to read it."""
        return [json.loads(text) for text in self._gather_bytes(json.dumps(value).encode())]

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        sizes = [int(size) for (size,) in self.gather([float(len(data))])]
        padded = np.zeros(max(1, *sizes), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        mine = torch.from_numpy(padded).to(self._device)
        found = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(found, mine, group=self.group)
        pairs = zip(found, sizes, strict=True)
        return [row[:size].cpu().numpy().tobytes() for row, size in pairs]

    def send(self, data: bytes, source: int) -> bytes:
        """`data` of rank `source`, at every process: each receives it once."""
        place: dict[str, Any] = {"src": self._global(source), "group": self.group}
        size = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        dist.broadcast(size, **place)
        held = np.zeros(int(size), np.uint8)
        if self.rank == source:
            held[:] = np.frombuffer(data, np.uint8)
        found = torch.from_numpy(held).to(self._device)
        if len(held):
            dist.broadcast(found, **place)
        return found.cpu().numpy().tobytes()


def fingerprint(tensor: torch.Tensor) -> int:
    """A checksum of the elements' bits and of their order, in [0, 2^64), computed on their device.

    It is the sum of bits_i (2 i + 1) _ODD modulo 2^64, over the elements in row-major order: two
    elements that change places change it, as does any one that changes. It tells accidents, not
    forgeries. 0 for a tensor that this process does not hold as a whole.
    """
    if tensor.is_meta or is_sharded(tensor) or not tensor.numel():
        return 0
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(kind)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    factors = torch.arange(1, 2 * min(_CHUNK, len(bits)), 2, device=bits.device) * _ODD
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        total += (part * (factors[: len(part)] + _wrapped(2 * start * _ODD))).sum()
    return int(total) % 2**64


def _wrapped(value: int) -> int:
    """As a signed integer of 64 bits, whose arithmetic is modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63
