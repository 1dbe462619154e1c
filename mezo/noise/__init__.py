"""The noise z: `apply_` adds multiples of z to a tensor without ever storing z.

definition.py defines the bits. cpu.py and gpu.py are kernels that give the same bits; they are used
if numba and triton are installed.
"""

import importlib
import logging
from collections.abc import Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from mezo.noise import live
from mezo.noise import sharded as shards
from mezo.noise.definition import (
    CONTRACT,
    DISTRIBUTIONS,
    MAX_PROBE,
    MAX_STEP,
    ROUND_PERTURBED,
    ROUND_UPDATE,
    Distribution,
    canonical_name,
    draw,
    round_stochastically,
    rounding_bits,
    tensor_key,
)

__all__ = ["CONTRACT", "DISTRIBUTIONS", "KEEP", "MAX_PROBE", "MAX_STEP", "NEAREST", "Distribution"]
__all__ += ["ROUND_PERTURBED", "ROUND_UPDATE", "Move", "apply_", "canonical_name", "draw"]
__all__ += ["Kept", "Rows", "apply_all_", "apply_both_", "aside", "moved_all", "pieces", "table"]
__all__ += ["tensor_key"]

KEEP, NEAREST = 0, 3  # roundings of a move, beside the stochastic ones of streams 1 and 2


class Move(NamedTuple):
    """One move: theta <- scale * theta + coefficient * z(step, probe) in float32, then rounding.

    `rounding` says how the number of a 16-bit tensor is rounded after this move. KEEP leaves it in
    float32. NEAREST rounds it to the tensor's dtype. ROUND_UPDATE and ROUND_PERTURBED round it
    stochastically, with the random bits of that stream, step and probe. After the last move the
    number is rounded in any case.
    """

    step: int  # in [0, 2^32)
    probe: int  # in [0, 2^24)
    scale: float
    coefficient: float
    rounding: int = NEAREST


_TABLE = np.dtype(
    [("step", "u4"), ("probe", "u4"), ("scale", "f8"), ("coefficient", "f8"), ("rounding", "u4")]
)


def table(moves: Sequence[Move] | np.ndarray) -> np.ndarray:
    """Return moves as the array that `apply_` works with; make it once for many tensors."""
    return moves if isinstance(moves, np.ndarray) else np.array([tuple(m) for m in moves], _TABLE)


_KERNELS = {"cpu": ".cpu", "cuda": ".gpu"}  # of numba, of triton
_PIECE = {"cpu": 2**16, "other": 2**22}  # elements drawn at a time in plain torch: caches, launches


@cache
def _kernel(device: str) -> ModuleType | None:
    """Return the kernel module for a type of device, or None.

    Without a kernel, plain torch draws the same bits, but more slowly.
    """
    if device not in _KERNELS:
        _tell(f"there is no kernel for {device}")
        return None
    try:
        return importlib.import_module(_KERNELS[device], __package__)
    except Exception as error:  # not installed, or Triton finds no C compiler
        _tell(f"the kernel for {device} cannot be loaded ({error})")
        return None


@cache
def _tell(reason: str) -> None:
    """Log each reason once."""
    logging.getLogger("mezo").info("noise is drawn by plain torch, slower: %s", reason)


def apply_(
    tensor: torch.Tensor,
    key: tuple[int, int],
    moves: Sequence[Move] | np.ndarray,
    *,
    distribution: str = "gaussian",
    offset: int = 0,
    source: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> None:
    """Apply `moves` to a tensor in order, in one pass over it; z is never stored.

    A move multiplies theta by scale and z by the coefficient, and adds the two; each operation is
    rounded to float32 (float64 for a float64 tensor). Successive moves along one direction draw it
    once. The bits equal those of one call per move.

    Args:
        tensor: The parameter, or a part of it that begins at element `offset` in row-major order,
            with any strides. For a DTensor this process's shard is moved; `rows` is not supported.
        key: `tensor_key(seed, name)` of the parameter.
        moves: The moves; their numbers are rounded to float32 (unless the tensor is float64).
        distribution: The name of one of `DISTRIBUTIONS`.
        offset: Row-major index, in the parameter, of the tensor's first element.
        source: Read the old values from this tensor, of the same dtype and shape, instead of from
            `tensor`.
        rows: int64; tensor[k] is row rows[k] of the parameter, as in an embedding lookup. It cannot
            be combined with `source` or `offset`.
    """
    moves = table(moves)
    if not len(moves) or not tensor.numel():
        return
    if shards.is_sharded(tensor):
        if source is not None:
            tensor.copy_(source)
        move = partial(apply_, key=key, moves=moves, distribution=distribution)
        return shards.apply_(tensor, move)
    module = _kernel(tensor.device.type)
    if (
        module is not None
        and module.supports(tensor)
        and (source is None or module.supports(source))
    ):
        if (tables := live.current()) is not None:
            tables.launch(module, tensor, key, moves, distribution, offset, source, rows)
            return
        module.apply_(tensor, key, moves, distribution, offset, source, rows)
        return
    live.refuse(f"noise for a {tensor.dtype} tensor on {tensor.device.type}")
    if module is not None:
        kind, apart = str(tensor.dtype).removeprefix("torch."), not tensor.is_contiguous()
        _tell(f"the kernel takes no {kind} tensor" + " that is not contiguous" * apart)
    with torch.no_grad():
        if rows is not None:
            for part, row in zip(tensor, rows.tolist(), strict=True):
                _apply_in_pieces(part, key, moves, distribution, row * part.numel())
            return
        if source is not None:
            tensor.copy_(source)
        _apply_in_pieces(tensor.detach(), key, moves, distribution, offset)


def apply_both_(
    both: torch.Tensor,
    key: tuple[int, int],
    plus: np.ndarray,
    minus: np.ndarray,
    *,
    source: torch.Tensor,
    distribution: str = "gaussian",
) -> None:
    """Set both[0] to `source` after the moves `plus`, and both[1] to it after the moves `minus`.

    The bits are those of two calls of `apply_`. Where a kernel can, z is drawn once for both: each
    is then one move along the same z, by opposite coefficients and with the same rounding.
    """
    module: Any = _kernel(source.device.type)
    opposite = len(plus) == 1 and np.array_equal(plus, _opposite(minus))
    both_ = getattr(module, "apply_both_", None)
    if both_ and opposite and module.supports(source) and module.supports(both):
        if (tables := live.current()) is not None:
            plus = tables.live(plus)
        return both_(both, key, plus, distribution, source)
    for out, moves in zip(both, (plus, minus), strict=True):
        apply_(out, key, moves, distribution=distribution, source=source)
    return None


def _opposite(moves: np.ndarray) -> np.ndarray:
    turned = moves.copy()
    turned["coefficient"] *= -1
    return turned


class Kept:
    """z of tensors that are few together, kept from one move along it to the next.

    A walk moves theta along the same z three times. Where that z fits into a few megabytes, it is
    drawn once. `Rows` that share it are moved by the kernels for CPUs, which alone make use of it.
    """

    MOST: ClassVar[int] = 2**21  # elements; more are drawn each time

    def __init__(self, keys: Sequence[tuple[int, int]], sizes: Sequence[int]):
        ends = np.cumsum([0, *sizes])
        self.starts = dict(zip(keys, ends.tolist(), strict=False))  # of each tensor's z
        self.places = {key: i for i, key in enumerate(keys)}
        self.sizes = sizes
        self.drawn = np.zeros(len(keys), np.uint64)  # which z lies there; 0: none
        self.z: np.ndarray | None = None  # made when it is first needed

    @classmethod
    def of(cls, rows: Sequence[tuple[str, torch.Tensor, tuple[int, int]]]) -> "Kept | None":
        """Return what keeps z of these tensors, or None if they are too many or not float32."""
        sizes = [tensor.numel() for _, tensor, _ in rows]
        if sum(sizes) > cls.MOST or any(tensor.dtype != torch.float32 for _, tensor, _ in rows):
            return None
        return cls([key for *_, key in rows], sizes)


class Rows(tuple):
    """The (name, tensor, key) of tensors that are moved together, again and again.

    What a launch needs to know of them is worked out once, and again if a tensor lies elsewhere.
    Make a new one if a tensor's dtype, shape or strides may have changed.
    """

    launches: "list[_Launch] | None" = None
    addresses: list[int] | None = None
    kept: Kept | None = None


class _Launch(NamedTuple):
    """Tensors of one kind among `Rows`."""

    module: Any  # the kernels that move them all at once; None: one by one
    which: list[int]  # their places among all
    gathered: Any  # what the kernels know of them


def apply_all_(
    rows: Sequence[tuple[str, torch.Tensor, tuple[int, int]]],
    moves: Sequence[Move] | Sequence[Sequence[Move]] | np.ndarray,
    *,
    distribution: str = "gaussian",
) -> None:
    """Call `apply_` for many whole tensors in one launch, with the same bits.

    Args:
        rows: (name, tensor, key) of different tensors, of any dtypes and devices. DTensors, and
            tensors that the kernels do not support, are moved one by one. Give `Rows` if the same
            tensors are moved again and again.
        moves: Moves for all tensors, or one sequence of moves per tensor, all of equal length.
        distribution: The name of one of `DISTRIBUTIONS`.
    """
    if not len(moves):
        return
    if isinstance(moves, np.ndarray) or isinstance(moves[0], Move):
        tables = np.array(moves, _TABLE, ndmin=2)
    else:
        tables = np.stack([table(own) for own in moves])  # type: ignore[arg-type]
    launches = getattr(rows, "launches", None)
    if launches is None or [one[1].data_ptr() for one in rows] != rows.addresses:  # type: ignore
        launches = _launches(rows)
    for module, which, gathered in launches:
        own = tables[which] if len(tables) > 1 else tables
        if module is not None:
            module.apply_all_(gathered, own, distribution)
            continue
        for i, each in zip(which, np.broadcast_to(own, (len(which), own.shape[1])), strict=True):
            _, tensor, key = rows[i]
            apply_(tensor, key, each, distribution=distribution)


def moved_all(
    rows: Rows, moves: np.ndarray, *, distribution: str = "gaussian"
) -> list[torch.Tensor]:
    """Return `rows` after the moves, which are the same for all, in new tensors.

    A row that is not contiguous keeps its strides, as torch.empty_like does.
    """
    launches, addresses = rows.launches, [one[1].data_ptr() for one in rows]
    if launches is None or addresses != rows.addresses:
        launches = _launches(rows)
    for module, which, gathered in launches[:1]:
        if len(which) == len(rows) and hasattr(module, "moved_all"):
            return module.moved_all(gathered, moves.reshape(1, -1), distribution)
    outs = [torch.empty_like(one[1], requires_grad=False) for one in rows]
    for out, (_, tensor, key) in zip(outs, rows, strict=True):
        apply_(out, key, moves, distribution=distribution, source=tensor.detach())
    return outs


def aside(rows: Rows) -> Any:
    """Return copies of all of these tensors (cpu.Aside), or None where that is not possible.

    It takes tensors of one dtype, contiguous and on a CPU with its kernel, that lie where they did.
    """
    launches = rows.launches
    if launches is None or [one[1].data_ptr() for one in rows] != rows.addresses:
        launches = _launches(rows)
    if len(launches) != 1 or not hasattr(launches[0].module, "Aside"):
        return None
    module, which, gathered = launches[0]
    return module.Aside(gathered, [one[1] for one in rows]) if len(which) == len(rows) else None


def _launches(rows: Sequence[tuple]) -> list[_Launch]:
    """Sort tensors by what moves them; `Rows` remember it."""
    groups: dict[Any, list[int]] = {}
    for i, (_, tensor, _) in enumerate(rows):
        if not tensor.numel():
            continue
        kind = (tensor.device, tensor.dtype) if tensor.is_contiguous() else None
        groups.setdefault(None if shards.is_sharded(tensor) else kind, []).append(i)
    launches = []
    for kind, which in groups.items():
        module = _kernel(kind[0].type) if kind else None
        if module is None or not module.takes(*kind):
            launches.append(_Launch(None, which, None))
            continue
        tensors, keys = [rows[i][1] for i in which], [rows[i][2] for i in which]
        gathered = module.gather(tensors, keys, 0)
        if (kept := getattr(rows, "kept", None)) is not None and hasattr(module, "keep"):
            gathered = module.keep(gathered, keys, kept)
        launches.append(_Launch(module, which, gathered))
    if isinstance(rows, Rows) and not any(shards.is_sharded(one[1]) for one in rows):
        rows.launches, rows.addresses = launches, [one[1].data_ptr() for one in rows]
    return launches


def _apply_in_pieces(tensor, key, moves, distribution, offset) -> None:
    for piece, start in pieces(tensor, DISTRIBUTIONS[distribution].group):
        piece.copy_(_moved(piece, key, moves, distribution, offset + start))


def _moved(piece, key, moves, distribution: str, start: int) -> torch.Tensor:
    """Return the elements from `start` on after the moves, in float32 (or float64)."""
    dtype, span = piece.dtype, (start, start + piece.numel())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, drawn = piece.to(wide), None
    for step, probe, scale, coefficient, rounding in moves.tolist():
        where = {"step": step, "probe": probe, "device": piece.device}
        if drawn != (step, probe):
            z = draw(key, *span, distribution=distribution, **where).to(wide).view(x.shape)
            drawn = step, probe
        x = x * scale + z * coefficient
        if dtype == wide or rounding == KEEP:
            continue
        if rounding == NEAREST:
            x = x.to(dtype).to(wide)
        else:
            bits = rounding_bits(key, *span, stream=rounding, **where).view(x.shape)
            x = round_stochastically(x, bits, dtype).to(wide)
    return x


def pieces(tensor: torch.Tensor, group: int, least: int = 0):
    """Yield views of consecutive elements in row-major order, each with its first element's index.

    A view has at least `least` elements, or more if that is better for drawing them.
    """
    size = max(_PIECE.get(tensor.device.type, _PIECE["other"]), group, least)
    if tensor.dim() == 0 or tensor.is_contiguous():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), size):
            yield flat[start : start + size], start
    else:
        row = tensor[0].numel()
        rows = max(1, size // max(row, 1))
        for first in range(0, tensor.shape[0], rows):
            yield tensor[first : first + rows], first * row
