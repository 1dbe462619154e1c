"""Where a worker's part of a tensor lies, in the tensor and in the worker's fused matrix.

Engines spread a layer over workers and fuse layers that read the same input. A part is told by two
things: where its box begins in transformers' own tensor, and which rows of the worker's parameter
hold it. These functions are arithmetic, so that they are tested without an engine.

    workers = 2, query heads 4, key heads 2, head size 8

    q_proj.weight (32, H)   worker 1 holds rows 16..31, as rows 0..15 of its fused matrix
    k_proj.weight (16, H)   worker 1 holds rows  8..15, as rows 16..23
    v_proj.weight (16, H)   worker 1 holds rows  8..15, as rows 24..31
"""

from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A worker's part of a tensor."""

    start: tuple[int, ...]  # where the part begins in the whole tensor
    rows: slice | None = None  # the rows of the worker's parameter that hold it; None: all


class Heads(NamedTuple):
    """One worker's heads of a fused query, key and value layer.

    With more workers than key heads, `replicas` neighbouring workers hold the same key head.
    """

    query: int  # query heads of this worker
    key: int  # key heads of this worker, at least one
    size: int  # of a query or key head
    value_size: int
    replicas: int = 1


def of_heads(part: int, rank: int, heads: Heads, dimensions: int) -> Box:
    """Return the box of the query (part 0), key (1) or value (2) of worker `rank`."""
    sizes = (heads.query * heads.size, heads.key * heads.size, heads.key * heads.value_size)
    at = rank if part == 0 else rank // heads.replicas
    return _stacked(part, at, sizes, dimensions)


def of_merged(part: int, rank: int, sizes: Sequence[int], workers: int, dimensions: int) -> Box:
    """Return the box of one of several stacked layers; `sizes` are the layers' whole outputs."""
    return _stacked(part, rank, [size // workers for size in sizes], dimensions)


def of_rows(first: int, dimensions: int, count: int | None = None) -> Box:
    """Return the box of rows from `first` on; of the parameter, the first `count` rows hold it."""
    return Box((first, *_zeros(dimensions)), None if count is None else slice(0, count))


def of_columns(rank: int, size: int, dimensions: int) -> Box:
    """Return the box of a row-parallel layer: `size` columns of its matrix, and all of its bias."""
    return Box((0, rank * size) if dimensions == 2 else (0,))


def _stacked(part: int, at: int, sizes: Sequence[int], dimensions: int) -> Box:
    first = sum(sizes[:part])
    return Box((at * sizes[part], *_zeros(dimensions)), slice(first, first + sizes[part]))


def _zeros(dimensions: int) -> tuple[int, ...]:
    return (0,) * (dimensions - 1)
