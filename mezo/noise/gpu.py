"""The noise contract as Triton kernels: z is drawn in registers and used at once.

Bit-equal to definition.py: launched with enable_fp_fusion=False, so that a multiplication and an
addition stay two roundings, with the square root that IEEE rounds (`sqrt_rn`), and subnormals kept,
which is Triton's default. The two fused operations in `_from_16_bits` have exact products.

A program takes a span: pairs of rows of 1,024 elements, which are 4 words of 256 lanes each. It
keeps them in registers for all the moves and writes them once. Numbers and words are tensors
[pairs, 2, 4, 256], of which a thread has all but the last dimension: whatever a block of words
makes stays in its thread. Pointers are 64 bits wide, the index inside a program 32, and what lies
outside of the tensor is masked.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from mezo.noise import definition

_LANES = tl.constexpr(definition.LANES)
_ROW = tl.constexpr(4 * definition.LANES)
_GAUSSIAN, _RADEMACHER, _GAUSSIAN16 = (tl.constexpr(i) for i in range(3))  # as in DISTRIBUTIONS
_NEAREST = tl.constexpr(3)  # of the roundings in mezo.noise; 0 keeps, 1 and 2 are stochastic
_ANEW = tl.constexpr(4)  # added to a move's rounding where its direction is not the last one's
_FIELDS = tl.constexpr(5)  # of a move on the device: step, probe, scale, coefficient, that sum
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}  # no fused multiply-add

_M0, _M1 = (tl.constexpr(m) for m in definition._MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in definition._WEYL)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7 = (tl.constexpr(c) for c in definition._Q)
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in definition._S)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in definition._C)
_LN2 = tl.constexpr(definition._LN2)
_STEP_U = tl.constexpr(2.0**-24)
_A, _B, _D = (tl.constexpr(c) for c in (definition._A, definition._B, definition._D))
_CENTRE = tl.constexpr(2**15 + definition.SUM_CENTRE / 256)


if torch.cuda.is_available():
    triton.runtime.driver.active.get_current_target()  # fails here, not later, if nothing compiles


@triton.jit
def _radius(word):
    u = ((word >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * _STEP_U
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    q = ((((((_Q7 * f + _Q6) * f + _Q5) * f + _Q4) * f + _Q3) * f + _Q2) * f + _Q1) * f + _Q0
    log = exponent.to(tl.float32) * _LN2 + (f + (f * f) * q)
    return tl.sqrt_rn(log * -2.0)


@triton.jit
def _box_muller(radius_word, angle_word):
    r = _radius(radius_word)
    mantissa = ((angle_word >> 7) & 0x7FFFFF).to(tl.int32)
    t = (mantissa * 2 + (1 - 2**23)).to(tl.float32) * _STEP_U
    x = t * t
    sine = t * (((_S3 * x + _S2) * x + _S1) * x + _S0)
    cosine = ((_C3 * x + _C2) * x + _C1) * x + _C0
    quadrant = (angle_word >> 30).to(tl.int32)
    odd = (quadrant & 1) != 0  # the angle is pi/2 (quadrant + t)
    across = tl.where(odd, sine, cosine).to(tl.int32, bitcast=True)
    up = tl.where(odd, cosine, sine).to(tl.int32, bitcast=True)
    across ^= ((quadrant + 1) & 2) << 30  # signs
    up ^= (quadrant & 2) << 30
    return r * across.to(tl.float32, bitcast=True), r * up.to(tl.float32, bitcast=True)


@triton.jit
def _from_16_bits(word, half):
    """gaussian16 of a half of each word. The sums of bytes of both halves are made together."""
    total = (word & 0x00FE00FE) + ((word >> 4) & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    bits = tl.where(half == 0, total & 0xFFFF, total >> 16) | 0x47000000  # 2^15 + total / 256
    y = bits.to(tl.float32, bitcast=True) - _CENTRE
    v = tl.fma(y, y, _B)  # y * y and v / 8 are exact: fused or not, the same bits
    return (y * tl.fma(v, 0.125, _A)) * (v * v + _D)


@triton.jit
def _signed(word, k, c):
    """c times the sign of bit k of each word."""
    sign = (word << (31 - k)) & 0x80000000
    return (sign ^ c.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _words(key, block, step, probe):
    """Philox. `tl.philox` takes twice the multiplications: the halves of a product one by one."""
    c0, c1, c2, c3 = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32), step, probe
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, _W0, sanitize_overflow=False)
        k1 = tl.add(k1, _W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _four(a, b, c, d):
    """[P, H, LANES] four times to [P, H, 4, LANES]. One tensor: Triton keeps it in one layout."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    flat = tl.reshape(joined, [a.shape[0], a.shape[1], a.shape[2], 4])
    return tl.permute(flat, [0, 1, 3, 2])


@triton.jit
def _pair_words(key, span, step, probe, PAIRS: tl.constexpr):
    """[PAIRS, 1, 4, LANES]: words of which each half has an element, for z or for rounding."""
    pair = span * PAIRS + tl.arange(0, PAIRS)[:, None, None]
    w0, w1, w2, w3 = _words(key, pair * _LANES + tl.arange(0, _LANES)[None, None, :], step, probe)
    return _four(w0, w1, w2, w3)


@triton.jit
def _draw(key, span, step, probe, c, DISTRIBUTION: tl.constexpr, PAIRS: tl.constexpr):
    """c z of the span's elements; for signs that is an exclusive or, for others a product."""
    half = tl.arange(0, 2)[None, :, None]
    row = (span * PAIRS + tl.arange(0, PAIRS)[:, None, None]) * 2 + half
    lane = tl.arange(0, _LANES)[None, None, :]
    if DISTRIBUTION == _RADEMACHER:
        w0, w1, w2, w3 = _words(key, (span * PAIRS // 16) * _LANES + lane, step, probe)
        return _signed(_four(w0, w1, w2, w3), (row % 32).to(tl.uint32)[:, :, None, :], c)
    elif DISTRIBUTION == _GAUSSIAN16:
        half16 = half.to(tl.uint32)[:, :, None, :]
        return _from_16_bits(_pair_words(key, span, step, probe, PAIRS), half16) * c
    else:
        w0, w1, w2, w3 = _words(key, row * _LANES + lane, step, probe)
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        return _four(z0, z1, z2, z3) * c


@triton.jit
def _stochastic(x, word, half, dtype: tl.constexpr):
    """definition.round_stochastically with 16 bits of a word."""
    bits = tl.where(half == 0, word & 0xFFFF, word >> 16).to(tl.int32)
    number = x.to(tl.int32, bitcast=True)
    if dtype == tl.bfloat16:
        rounded = tl.where(x != x, number | 0x400000, number + bits) >> 16
    else:
        magnitude = number & 0x7FFFFFFF
        exponent = magnitude >> 23
        cut = tl.minimum(tl.maximum(126 - exponent, 13), 29)  # places; 13 from 2^-14 on
        below = ((bits.to(tl.uint32) << (cut - 13).to(tl.uint32)) >> 3).to(tl.int32)
        rounded = ((magnitude & 0x7FFFFF | 0x800000) + below) >> cut
        rounded += tl.maximum(exponent - 113, 0) << 10
        rounded = tl.where(exponent < 97, 0, tl.minimum(rounded, 0x7C00))
        rounded = tl.where(x != x, 0x7E00, rounded | (number >> 16) & 0x8000)
    return rounded.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _moved(
    x,
    span,
    key,
    table,
    count,
    dtype: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    PAIRS: tl.constexpr,
    MANY: tl.constexpr,  # moves, of any roundings; else one, of a rounding known here:
    STOCHASTIC: tl.constexpr,
):
    """The span's numbers after the moves: float32, or `dtype` after a stochastic rounding."""
    half = tl.arange(0, 2)[None, :, None, None].to(tl.uint32)
    if not MANY:
        step = tl.load(table).to(tl.uint32, bitcast=True)
        probe = tl.load(table + 1).to(tl.uint32, bitcast=True)
        scale = tl.load(table + 2).to(tl.float32, bitcast=True)
        c = tl.load(table + 3).to(tl.float32, bitcast=True)
        x = x * scale + _draw(key, span, step, probe, c, DISTRIBUTION, PAIRS)
        if STOCHASTIC:
            stream = (tl.load(table + 4) % _ANEW).to(tl.uint32) << 24
            word = _pair_words(key, span, step, probe | stream, PAIRS)
            x = _stochastic(x, word, half, dtype)
        return x
    else:
        one = tl.full([], 1.0, tl.float32)
        z = tl.zeros([PAIRS, 2, 4, _LANES], tl.float32)
        for _ in range(count):
            step = tl.load(table).to(tl.uint32, bitcast=True)
            probe = tl.load(table + 1).to(tl.uint32, bitcast=True)
            scale = tl.load(table + 2).to(tl.float32, bitcast=True)
            c = tl.load(table + 3).to(tl.float32, bitcast=True)
            what = tl.load(table + 4)
            table += _FIELDS
            if what >= _ANEW:
                z = _draw(key, span, step, probe, one, DISTRIBUTION, PAIRS)
            x = x * scale + z * c
            rounding = what % _ANEW
            if dtype != tl.float32:
                if rounding == _NEAREST:
                    x = x.to(dtype).to(tl.float32)
                elif rounding != 0:
                    stream = rounding.to(tl.uint32) << 24
                    word = _pair_words(key, span, step, probe | stream, PAIRS)
                    x = _stochastic(x, word, half, dtype).to(tl.float32)
        return x


@triton.jit
def _index(PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    """Of an element in its span. WIDTH neighbours are one thread's: it draws its words once."""
    row = tl.arange(0, PAIRS)[:, None, None, None] * 2 + tl.arange(0, 2)[None, :, None, None]
    lane = tl.arange(0, _LANES)[None, None, None, :]
    i = row * _ROW + tl.arange(0, 4)[None, None, :, None] * _LANES + lane
    return tl.max_contiguous(i, [1, 1, 1, WIDTH])


@triton.jit(do_not_specialize=["key", "count"])
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
    i, first = _index(PAIRS, WIDTH), tl.maximum(-start, 0).to(tl.int32)
    inside = (i >= first) & (i < tl.minimum(n - start, SPAN).to(tl.int32))
    x = tl.load(source + start + i, mask=inside).to(tl.float32)
    x = _moved(x, span, key, table, count, dtype, DISTRIBUTION, PAIRS, MANY, STOCHASTIC)
    tl.store(out + start + i, x.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["count", "each"])
def _kernel_all(
    owners,  # of each program: the number of its tensor
    tensors,  # address, elements, offset, key, first program
    table,
    count,
    each,  # fields of `table` that a tensor has of its own: 0 where all make the same moves
    dtype: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    PAIRS: tl.constexpr,
    MANY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,  # addresses and offsets, to 16
):
    SPAN: tl.constexpr = PAIRS * 2 * _ROW
    owner = tl.load(owners + tl.program_id(0))
    tensors += owner.to(tl.int64) * 5
    address, n, offset = tl.load(tensors), tl.load(tensors + 1), tl.load(tensors + 2)
    key = tl.load(tensors + 3).to(tl.uint64, bitcast=True)
    span = tl.program_id(0) - tl.load(tensors + 4)
    p = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        p, offset = tl.multiple_of(p, 16), tl.multiple_of(offset, 16)
    span += offset // SPAN
    start, i = span * SPAN - offset, _index(PAIRS, WIDTH)
    p, table = p + start + i, table + owner.to(tl.int64) * each
    if (start >= 0) & (n - start >= SPAN):  # most: no masks, and wide loads whatever n is
        x = tl.load(p).to(tl.float32)
        x = _moved(x, span, key, table, count, dtype, DISTRIBUTION, PAIRS, MANY, STOCHASTIC)
        tl.store(p, x.to(dtype))
    else:
        first = tl.maximum(-start, 0).to(tl.int32)
        inside = (i >= first) & (i < tl.minimum(n - start, SPAN).to(tl.int32))
        x = tl.load(p, mask=inside).to(tl.float32)
        x = _moved(x, span, key, table, count, dtype, DISTRIBUTION, PAIRS, MANY, STOCHASTIC)
        tl.store(p, x.to(dtype), mask=inside)


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
    given = np.frombuffer(moves, fields)
    step, probe = given["step"], given["probe"]
    table = np.empty((len(given), _FIELDS.value), np.uint32)
    with np.errstate(over="ignore"):  # an infinity, as in torch
        numbers = [given[name].astype(np.float32) for name in ("scale", "coefficient")]
    anew = np.full(len(given), _ANEW.value, np.uint32)
    anew[1:][(step[1:] == step[:-1]) & (probe[1:] == probe[:-1])] = 0
    anew[::each] = _ANEW.value
    columns = [step, probe, *(number.view(np.uint32) for number in numbers)]
    for i, column in enumerate([*columns, given["rounding"] + anew]):
        table[:, i] = column
    return torch.from_numpy(table.view(np.int32)).to(device)


def _launch(moves: np.ndarray, dtype, distribution: str, pairs: int = 0) -> dict:
    """What the kernels are compiled for; `pairs` of rows a program, by default what is best."""
    rounded = (moves["rounding"] > 0) & (moves["rounding"] < _NEAREST.value)
    alone = moves.shape[-1] == 1 and (rounded.all() or not rounded.any())  # known when compiled
    signs = distribution == "rademacher"  # of four rows are of the same words
    return OPTIONS | {
        "DISTRIBUTION": definition.DISTRIBUTIONS.index(distribution),
        "PAIRS": pairs or (2 if signs and alone else 1),
        "MANY": not alone,
        "STOCHASTIC": bool(alone and dtype != torch.float32 and rounded.any()),
        "WIDTH": 8 // OPTIONS["num_warps"],
    }


def apply_(tensor, key, moves, distribution, offset, source, rows) -> None:
    """Do what `mezo.noise.apply_` does, for tensors that `supports` accepts."""
    out, n = tensor.detach(), tensor.numel()
    stream = out.is_cuda and torch.cuda.current_stream(out.device).cuda_stream
    table = _on_device(moves.tobytes(), moves.dtype, len(moves), out.device, stream)
    launch = _launch(moves, out.dtype, distribution, 1 if rows is not None else 0)
    span = launch["PAIRS"] * 2 * _ROW.value
    grid = [-(-(offset + n) // span) - offset // span]
    if rows is not None:
        rows = rows.to(out.device).contiguous()
        n //= len(rows)
        grid = [len(rows), -(-(n + span - math.gcd(n, span)) // span)]  # wherever a row begins
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _kernel[tuple(grid)](
            out,
            out if source is None else source.detach(),
            rows,
            n,
            offset,
            key[0] | key[1] << 32,
            table,
            len(moves),
            **launch,
        )


def apply_all_(tensors, keys, moves: np.ndarray, distribution: str, offsets) -> None:
    """Do what `mezo.noise.apply_all_` does, for supported tensors of one dtype and device."""
    device, dtype = tensors[0].device, tensors[0].dtype
    stream = tensors[0].is_cuda and torch.cuda.current_stream(device).cuda_stream
    launch = _launch(moves, dtype, distribution)
    each = 0 if len(moves) == 1 else moves.shape[1]
    table = _on_device(moves.tobytes(), moves.dtype, moves.shape[1], device, stream)
    places = np.empty((len(tensors), 5), np.int64)
    places[:, 0] = [tensor.data_ptr() for tensor in tensors]
    places[:, 1] = [tensor.numel() for tensor in tensors]
    places[:, 2] = offsets
    places[:, 3] = np.array([k0 | k1 << 32 for k0, k1 in keys], np.uint64).view(np.int64)
    aligned = (places[:, 0] % 16 == 0) & (places[:, 2] % 16 == 0)
    for even in (True, False):
        which = np.flatnonzero(aligned == even)
        if not which.size:
            continue
        span = launch["PAIRS"] * 2 * _ROW.value
        known = places[which].tobytes(), which.tobytes()
        owners, rows = _tensors_on_device(*known, span, device, stream)
        with torch.cuda.device_of(tensors[0]):
            _kernel_all[(len(owners),)](
                *(owners, rows, table, moves.shape[1], each * _FIELDS.value),
                dtype=_DTYPES[dtype],
                ALIGNED=even,
                **launch,
            )


@lru_cache(maxsize=16)
def _tensors_on_device(places: bytes, which: bytes, span: int, device, stream):
    """(the tensor of each program, what the kernel knows of each tensor); kept as moves are."""
    rows, number = np.frombuffer(places, np.int64).reshape(-1, 5), np.frombuffer(which, np.int64)
    programs = -(-(rows[:, 2] + rows[:, 1]) // span) - rows[:, 2] // span
    known = np.zeros((number[-1] + 1, 5), np.int64)
    known[number] = rows
    known[number, 4] = programs.cumsum() - programs
    counts = torch.from_numpy(programs).to(device)
    owners = torch.from_numpy(number.astype(np.int32)).to(device).repeat_interleave(counts)
    return owners, torch.from_numpy(known).to(device)
