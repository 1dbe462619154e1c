"""Exchange small messages between processes: numbers or a text from each to all, in rank order."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from mezo.noise.sharded import is_sharded

_TAG = 0x6D657A6F  # the tag of our messages, which a program's own messages will not have
_MOST = 64  # up to this many processes send to each other directly: a few KB per step in all
_CHUNK = 2**20  # elements of a fingerprint computed at a time, with 16 MiB of integers
_ODD = 0x1E3779B97F4A7C15  # in a fingerprint, element i has the factor (2 i + 1) _ODD


class Link:
    """Exchanges small values between all processes of a group, in rank order.

    Args:
        device: The device of the weights. NCCL sends from it, other backends send from the CPU.
        group: The processes; None means all of them.

    Attributes:
        rank, size: This process's number in the group, and the number of processes.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._device = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
        self._direct = dist.get_backend(group) == "gloo" and self.size <= _MOST
        self._wanted: dict[int, tuple[torch.Tensor, Any]] = {}  # pending receipts by rank

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return every process's `values`, in rank order. All must pass equally many."""
        mine = torch.tensor(values, dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self.group)
        return [row.tolist() for row in rows]

    def expect(self, count: int) -> None:
        """Post receives of `count` numbers from all others before a forward pass.

        They can then send at once. On a link with a latency of 50 ms, the following `exchange`
        takes 50 ms for any number of processes, while gloo's ring takes 100 ms for each process but
        one.
        """
        if not self._direct or self._wanted:
            return
        for rank in self._others():
            row = torch.empty(count, dtype=torch.float64)
            self._wanted[rank] = row, dist.irecv(row, self._global(rank), self.group, _TAG)

    def exchange(self, values: Sequence[float]) -> list[list[float]]:
        """Do what `gather` does, for as many numbers as were announced by `expect`."""
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
        """Translate global ranks into ranks of this group."""
        group = self.group
        return [r if group is None else dist.get_group_rank(group, r) for r in of_all]

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
        """Return every process's `value`, in rank order; it is sent as JSON, never as code."""
        return [json.loads(text) for text in self._gather_bytes(json.dumps(value).encode())]

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        sizes = [int(size) for (size,) in self.gather([float(len(data))])]
        padded = np.zeros(max(1, *sizes), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        mine = torch.from_numpy(padded).to(self._device)
        rows = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(rows, mine, group=self.group)
        pairs = zip(rows, sizes, strict=True)
        return [row[:size].cpu().numpy().tobytes() for row, size in pairs]

    def send(self, data: bytes, source: int) -> bytes:
        """Return, in every process, the `data` of rank `source`; each receives it once."""
        place: dict[str, Any] = {"src": self._global(source), "group": self.group}
        size = torch.tensor([len(data)], dtype=torch.int64, device=self._device)
        dist.broadcast(size, **place)
        held = np.zeros(int(size), np.uint8)
        if self.rank == source:
            held[:] = np.frombuffer(data, np.uint8)
        received = torch.from_numpy(held).to(self._device)
        if len(held):
            dist.broadcast(received, **place)
        return received.cpu().numpy().tobytes()


def fingerprint(tensor: torch.Tensor) -> int:
    """Return a checksum in [0, 2^64) of the elements' bits and order, computed on their device.

    It is the sum of bits_i (2 i + 1) _ODD modulo 2^64 over the elements in row-major order, so that
    a changed element changes it, as do two swapped elements. It detects accidents, not forgeries.
    It is 0 for a tensor that this process does not hold as a whole.
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
    """Return the signed 64-bit integer that equals the value modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63
