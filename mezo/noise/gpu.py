"""The noise contract as Triton kernels: z is drawn in registers and used at once.

Bit-equal to definition.py: launched with enable_fp_fusion=False, so that a multiplication and an
addition stay two roundings, with the square root that IEEE rounds (`sqrt_rn`), and subnormals kept,
which is Triton's default. The two fused operations in `_from_16_bits` have exact products.

A program takes a span: pairs of rows of 1,024 elements, which are 4 words of 256 lanes each. It
keeps them in registers for all the moves and writes them once (gpu_draws.py). Pointers are 64 bits
wide, the index inside a program 32, and what lies outside of the tensor is masked. Loads and stores
are 128 bits wide wherever the address allows it; that is a constant of the compiled kernel, which
the launch chooses, so that it never depends on what Triton guesses from an argument's value.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from mezo.noise import definition, live
from mezo.noise.gpu_draws import _ANEW, _FIELDS, _LANES, _NEAREST, _ROW, _moved, _moved_both

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_PLACE = tl.constexpr(7)  # address, elements, offset, key, first span, first program, stride
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}  # no fused multiply-add


if torch.cuda.is_available():
    triton.runtime.driver.active.get_current_target()  # fails here, not later, if nothing compiles


@triton.jit
def _index(PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    """The index of each element in its span. A thread has WIDTH neighbours: it draws words once."""
    row = tl.arange(0, PAIRS)[:, None, None, None] * 2 + tl.arange(0, 2)[None, :, None, None]
    lane = tl.arange(0, _LANES)[None, None, None, :]
    i = row * _ROW + tl.arange(0, 4)[None, None, :, None] * _LANES + lane
    return tl.max_contiguous(i, [1, 1, 1, WIDTH])


@triton.jit(do_not_specialize=["n", "offset", "key", "count"])
def _kernel(
    out,  # elements `offset` and on of a tensor
    source,
    rows,  # of the parameter, which the tensor's are, or None
    n: tl.int64,  # elements; with rows, of each
    offset: tl.int64,
    key: tl.uint64,
    table,
    count,  # of moves
    DISTRIBUTION: tl.constexpr,
    PAIRS: tl.constexpr,
    MANY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,  # addresses, lengths and offsets are multiples of 16: wide loads
):
    dtype: tl.constexpr = out.dtype.element_ty
    SPAN: tl.constexpr = PAIRS * 2 * _ROW
    span = tl.program_id(0).to(tl.int64)
    if rows is not None:  # each of n elements, anywhere in the parameter
        offset = tl.load(rows + span) * n
        out, source = out + span * n, source + span * n
        span = tl.program_id(1).to(tl.int64)
    span += offset // SPAN
    start = span * SPAN - offset  # in the tensor; below 0 where it begins inside the span
    first, last = tl.maximum(-start, 0).to(tl.int32), tl.minimum(n - start, SPAN).to(tl.int32)
    out, source = out + start, source + start
    if ALIGNED:
        out, source = tl.multiple_of(out, 16), tl.multiple_of(source, 16)
        first, last = tl.multiple_of(first, 16), tl.multiple_of(last, 16)
    i = _index(PAIRS, WIDTH)
    inside = (i >= first) & (i < last)
    x = tl.load(source + i, mask=inside).to(tl.float32)
    x = _moved(x, span, key, table, count, dtype, DISTRIBUTION, PAIRS, MANY, STOCHASTIC)
    tl.store(out + i, x.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["n", "key"])
def _kernel_both(
    both,  # two tensors of n elements, one after the other
    source,
    n: tl.int64,
    key: tl.uint64,
    table,
    DISTRIBUTION: tl.constexpr,
    PAIRS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    dtype: tl.constexpr = both.dtype.element_ty
    SPAN: tl.constexpr = PAIRS * 2 * _ROW
    span = tl.program_id(0).to(tl.int64)
    start, i = span * SPAN, _index(PAIRS, WIDTH)
    last, source = tl.minimum(n - start, SPAN).to(tl.int32), source + start
    first, second = both + start, both + n + start
    if ALIGNED:
        source, last = tl.multiple_of(source, 16), tl.multiple_of(last, 16)
        first, second = tl.multiple_of(first, 16), tl.multiple_of(second, 16)
    inside = i < last
    x = tl.load(source + i, mask=inside).to(tl.float32)
    plus, minus = _moved_both(x, span, key, table, dtype, DISTRIBUTION, PAIRS, STOCHASTIC)
    tl.store(first + i, plus, mask=inside)
    tl.store(second + i, minus, mask=inside)


@triton.jit(do_not_specialize=["count", "each"])
def _kernel_all(
    owners,  # of each program: the number of its tensor
    tensors,  # of each tensor: the _PLACE fields below
    table,
    count,
    each,  # fields of `table` that a tensor has of its own: 0 where all make the same moves
    dtype: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    PAIRS: tl.constexpr,
    MANY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,  # spans that lie inside their tensor, at multiples of 16 bytes
):
    SPAN: tl.constexpr = PAIRS * 2 * _ROW
    owner = tl.load(owners + tl.program_id(0)).to(tl.int64)
    tensors, table = tensors + owner * _PLACE, table + owner * each
    key = tl.load(tensors + 3).to(tl.uint64, bitcast=True)
    span = tl.load(tensors + 4) + (tl.program_id(0) - tl.load(tensors + 5)) * tl.load(tensors + 6)
    start, i = span * SPAN - tl.load(tensors + 2), _index(PAIRS, WIDTH)
    p = tl.load(tensors).to(tl.pointer_type(dtype)) + start
    if WHOLE:  # most: no masks, and wide loads however long the tensor is
        p = tl.multiple_of(p, 16)
        x = tl.load(p + i).to(tl.float32)
        x = _moved(x, span, key, table, count, dtype, DISTRIBUTION, PAIRS, MANY, STOCHASTIC)
        tl.store(p + i, x.to(dtype))
    else:
        last = tl.minimum(tl.load(tensors + 1) - start, SPAN).to(tl.int32)
        inside = (i >= tl.maximum(-start, 0).to(tl.int32)) & (i < last)
        x = tl.load(p + i, mask=inside).to(tl.float32)
        x = _moved(x, span, key, table, count, dtype, DISTRIBUTION, PAIRS, MANY, STOCHASTIC)
        tl.store(p + i, x.to(dtype), mask=inside)


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels move contiguous tensors of this kind."""
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and device.type == "cuda" and torch.version.hip is None  # AMD's: not looked at


def supports(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and takes(tensor.device, tensor.dtype)


@lru_cache(maxsize=8)
def _on_device(moves: bytes, fields: np.dtype, each: int, device, stream) -> torch.Tensor:
    """The moves as the kernel reads them, `each` for a tensor.

    Kept, since the tensors of a model make the same moves one after the other. A stream has its
    own, which the allocator does not give away before the stream is done with it.
    """
    given = np.frombuffer(moves, fields).reshape(-1, each)
    return torch.from_numpy(_encoded(given)).to(device)


def _encoded(moves: np.ndarray) -> np.ndarray:
    """Return the moves as the kernels read them: five numbers each. A row is one tensor's."""
    given = moves.reshape(-1)
    step, probe = given["step"], given["probe"]
    table = np.empty((len(given), _FIELDS.value), np.uint32)
    with np.errstate(over="ignore"):  # an infinity, as in torch
        numbers = [given[name].astype(np.float32) for name in ("scale", "coefficient")]
    anew = np.full(len(given), _ANEW.value, np.uint32)
    anew[1:][(step[1:] == step[:-1]) & (probe[1:] == probe[:-1])] = 0
    anew[:: moves.shape[-1]] = _ANEW.value
    columns = [step, probe, *(number.view(np.uint32) for number in numbers)]
    for i, column in enumerate([*columns, given["rounding"] + anew]):
        table[:, i] = column
    return table.view(np.int32)


def _launch(moves: np.ndarray, dtype, distribution: str, pairs: int = 0) -> dict:
    """What the kernels are compiled for; `pairs` of rows a program, by default what is best."""
    rounded = (moves["rounding"] > 0) & (moves["rounding"] < _NEAREST.value)
    alone = moves.shape[-1] == 1 and (rounded.all() or not rounded.any())  # known when compiled
    signs = definition.DISTRIBUTIONS[distribution].signs  # those of four rows share their words
    return OPTIONS | {
        "DISTRIBUTION": definition.DISTRIBUTIONS[distribution].code,
        "PAIRS": pairs or (2 if signs and alone else 1),
        "MANY": not alone,
        "STOCHASTIC": bool(alone and dtype != torch.float32 and rounded.any()),
        "WIDTH": 8 // OPTIONS["num_warps"],
    }


def apply_(tensor, key, moves, distribution, offset, source, rows) -> None:
    """Do what `mezo.noise.apply_` does, for tensors that `supports` accepts."""
    out, n = tensor.detach(), tensor.numel()
    source = out if source is None else source.detach()
    table = _table(moves, out)
    launch = _launch(moves, out.dtype, distribution, 1 if rows is not None else 0)
    span, word = launch["PAIRS"] * 2 * _ROW.value, key[0] | key[1] << 32
    even = (out.data_ptr() | source.data_ptr()) % 16 == 0
    with torch.cuda.device_of(out):  # Triton launches on the current device
        if rows is not None:
            rows, width = rows.to(out.device).contiguous(), n // len(rows)
            grid: tuple = (
                len(rows),
                -(-(width + span - math.gcd(width, span)) // span),
            )  # wherever it is
            even = even and width % 16 == 0
            given: tuple = out, source, rows, width, 0, word, table
            _kernel[grid](*given, len(moves), ALIGNED=even, **launch)
            return
        out, source = out.view(-1), source.view(-1)
        for start, stop, even in _runs(n, offset, out, source):
            first, end = offset + start, offset + stop
            given = out[start:stop], source[start:stop], None, stop - start, first, word, table
            grid = (-(-end // span) - first // span,)
            _kernel[grid](*given, len(moves), ALIGNED=even, **launch)


def apply_both_(both, key, moves: np.ndarray, distribution: str, source) -> None:
    """Do what `mezo.noise.apply_both_` does with one move, for supported tensors."""
    source, n = source.detach(), source.numel()
    launch = _launch(moves, both.dtype, distribution)
    launch.pop("MANY")
    even = (both.data_ptr() | source.data_ptr()) % 16 == 0 and n % 16 == 0
    given = both, source, n, key[0] | key[1] << 32, _table(moves, both)
    with torch.cuda.device_of(both):
        _kernel_both[(-(-n // (launch["PAIRS"] * 2 * _ROW.value)),)](*given, ALIGNED=even, **launch)


def _table(moves: np.ndarray, out: torch.Tensor) -> torch.Tensor:
    """Return one tensor's moves on its device; in a capture, a table that is kept up to date."""
    if (tables := live.current()) is not None:
        return tables.on_device(moves, _encoded, out.device)
    stream = out.is_cuda and torch.cuda.current_stream(out.device).cuda_stream
    return _on_device(moves.tobytes(), moves.dtype, len(moves), out.device, stream)


def _runs(n: int, offset: int, *tensors: torch.Tensor) -> list[tuple[int, int, bool]]:
    """Split n elements into (start, stop, whether wide loads can take them).

    Wide loads take 16 bytes, or 16 elements where a mask decides: up to 15 elements at either end
    of a long tensor go apart. No matrix of a usual model has such ends.
    """
    head = -offset % 16
    wide = all((x.data_ptr() + head * x.element_size()) % 16 == 0 for x in tensors)
    tail = (offset + n) % 16
    if wide and not head and not tail:
        return [(0, n, True)]
    if not wide or n < 2 * _ROW.value:
        return [(0, n, False)]
    runs = [(0, head, False), (head, n - tail, True), (n - tail, n, False)]
    return [run for run in runs if run[0] < run[1]]


def gather(tensors, keys, offsets) -> tuple:
    """Return what `apply_all_` takes, for supported tensors of one dtype and device."""
    return tensors, keys, offsets


def apply_all_(gathered: tuple, moves: np.ndarray, distribution: str) -> None:
    """Do what `mezo.noise.apply_all_` does, for what was gathered.

    Two launches: one of the spans that need no masks, and one of all others, if there are any.
    """
    tensors, keys, offsets = gathered
    device, dtype = tensors[0].device, tensors[0].dtype
    stream = tensors[0].is_cuda and torch.cuda.current_stream(device).cuda_stream
    launch = _launch(moves, dtype, distribution)
    each = 0 if len(moves) == 1 else moves.shape[1]
    table = _on_device(moves.tobytes(), moves.dtype, moves.shape[1], device, stream)
    places = np.empty((len(tensors), 4), np.int64)
    places[:, 0] = [tensor.data_ptr() for tensor in tensors]
    places[:, 1] = [tensor.numel() for tensor in tensors]
    places[:, 2] = offsets
    places[:, 3] = np.array([k0 | k1 << 32 for k0, k1 in keys], np.uint64).view(np.int64)
    span, size = launch["PAIRS"] * 2 * _ROW.value, tensors[0].element_size()
    for whole in (True, False):
        owners, rows = _programs(places.tobytes(), span, size, whole, device, stream)
        if not len(owners):
            continue
        with torch.cuda.device_of(tensors[0]):
            _kernel_all[(len(owners),)](
                *(owners, rows, table, moves.shape[1], each * _FIELDS.value),
                dtype=_DTYPES[dtype],
                WHOLE=whole,
                **launch,
            )


@lru_cache(maxsize=16)
def _programs(places: bytes, span: int, size: int, whole: bool, device, stream):
    """(the tensor of each program, what the kernel knows of each tensor); kept as moves are.

    `whole` asks for the spans that need no masks. The others are the first and the last span of a
    tensor where it does not fill them, and all spans of a tensor at an odd address.
    """
    rows = np.frombuffer(places, np.int64).reshape(-1, 4)
    address, n, offset, _ = rows.T
    first, end = offset // span, -(-(offset + n) // span)
    inner = -(-offset // span), (offset + n) // span  # from the first whole span to the last one
    even = (address - (offset % span) * size) % 16 == 0
    even &= inner[0] < inner[1]
    known = np.empty((len(rows), _PLACE.value), np.int64)
    known[:, :4] = rows
    if whole:
        known[:, 4], known[:, 6] = inner[0], 1
        programs = np.where(even, inner[1] - inner[0], 0)
    else:
        head, tail = first < inner[0], inner[1] < end  # what is left of a tensor of whole spans
        known[:, 4] = np.where(even & ~head, inner[1], first)
        known[:, 6] = np.where(even, np.maximum(end - 1 - first, 1), 1)
        programs = np.where(even, head.astype(np.int64) + tail, end - first)
    known[:, 5] = programs.cumsum() - programs
    numbers = torch.arange(len(rows), dtype=torch.int32, device=device)
    owners = numbers.repeat_interleave(torch.from_numpy(programs).to(device))
    return owners, torch.from_numpy(known).to(device)
