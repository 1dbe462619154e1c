"""Noise on a shard: each process moves only the elements of a DTensor that it holds.

z is a function of an element's index in the whole tensor, so that a shard's noise is a part of the
whole tensor's noise, to the bit. torch's random functions do not promise that; on a CPU they give
all shards the same numbers.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch

_BLOCK = 2**18  # elements of the whole width that are drawn at a time


def is_sharded(tensor: Any) -> bool:
    """Return whether it is a DTensor, without importing the module: making one imports it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard, which shares the tensor's memory; other tensors as they are."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def place(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of this process's shard of a DTensor, and its offset in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )


def partners(tensor: Any) -> list[int]:
    """Return the ranks that together hold the copy of a DTensor to which this process belongs."""
    mesh = tensor.device_mesh
    where = zip(mesh.get_coordinate(), tensor.placements, strict=True)
    line = tuple(at if placed.is_replicate() else slice(None) for at, placed in where)
    return mesh.mesh[line].flatten().tolist()


@torch.no_grad()
def apply_(tensor: Any, move: Callable[..., None]) -> None:
    """Call `move(part, offset=...)` on this process's elements, with offsets in the whole tensor.

    `apply_to_box_` says what the parts are.
    """
    if not is_sharded(tensor):
        return move(tensor, offset=0)
    mine, (shape, start) = local(tensor), place(tensor)
    if not mine.numel():
        return
    assert tuple(mine.shape) == tuple(shape)
    apply_to_box_(mine, tuple(tensor.shape), start, move)


@torch.no_grad()
def apply_to_box_(
    box: torch.Tensor, shape: tuple[int, ...], start: tuple[int, ...], move: Callable[..., None]
) -> None:
    """Call `move(part, offset=...)` on a box of a tensor of `shape`, which begins at `start`.

    A box of whole rows is one part. For any other box, rows are moved in their full width and then
    cut.
    """
    if not box.numel():
        return
    row = math.prod(shape[1:])
    if box.shape[1:] == shape[1:]:
        return move(box, offset=start[0] * row if start else 0)
    inner = tuple(slice(at, at + n) for at, n in zip(start[1:], box.shape[1:], strict=True))
    rows = max(1, _BLOCK // row)
    for first in range(0, len(box), rows):
        part = box[first : first + rows]
        whole = part.new_zeros(len(part), *shape[1:])
        whole[(slice(None), *inner)] = part
        move(whole, offset=(start[0] + first) * row)
        part.copy_(whole[(slice(None), *inner)])
