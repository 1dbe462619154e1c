"""The noise contract as a Triton kernel: z is drawn in registers and used at once.

Bit-equal to definition.py: launched with enable_fp_fusion=False, so that a multiplication and an
addition stay two roundings, with the square root that IEEE rounds (`sqrt_rn`), and subnormals kept,
which is Triton's default. A program takes whole rows (1,024 elements: 4 words of 256 lanes), keeps
them in registers for all the moves, and writes them once. Pointers are 64 bits wide, the index
inside a program 32, and what lies outside of the tensor is masked.
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
_NEAREST = tl.constexpr(3)  # of the roundings in mezo.noise; 0 keeps, 1 and 2 are stochastic
_ANEW = tl.constexpr(4)  # added to a move's rounding where its direction is not the last one's
_FIELDS = tl.constexpr(5)  # of a move on the device: step, probe, scale, coefficient, that sum
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}  # 4 lanes a thread; no fused multiply-add

_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7 = (tl.constexpr(c) for c in definition._Q)
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in definition._S)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in definition._C)
_LN2 = tl.constexpr(definition._LN2)
_STEP_U = tl.constexpr(2.0**-24)


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
def _sign(word, k):
    """1 - 2 * (bit k of word), in the bits of float32."""
    return (((word >> k) << 31) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _words(key, block, step, probe):
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(key, low, high, step, probe)


@triton.jit
def _draw(key, block, bit, step, probe, RADEMACHER: tl.constexpr):
    """z: a tensor for each word of the blocks."""
    w0, w1, w2, w3 = _words(key, block, step, probe)
    if RADEMACHER:
        return _sign(w0, bit), _sign(w1, bit), _sign(w2, bit), _sign(w3, bit)
    else:
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        return z0, z1, z2, z3


@triton.jit
def _nearest(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _stochastic(x, word, shift, dtype: tl.constexpr):
    """definition.round_stochastically with 16 bits of a word, and back to float32."""
    bits = (word >> shift) & 0xFFFF
    number = x.to(tl.int32, bitcast=True)
    magnitude = number & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        rounded = ((number + bits.to(tl.int32)) & -0x10000).to(tl.float32, bitcast=True)
    else:
        exponent = magnitude >> 23
        cut = tl.minimum(tl.maximum(126 - exponent, 13), 29)  # places; 13 from 2^-14 on
        below = ((bits << (cut - 13).to(tl.uint32)) >> 3).to(tl.int32)
        half = ((magnitude & 0x7FFFFF | 0x800000) + below) >> cut
        half += tl.maximum(exponent - 113, 0) << 10
        half = tl.where(exponent < 97, 0, tl.minimum(half, 0x7C00)) | ((number >> 16) & 0x8000)
        rounded = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(magnitude > 0x7F800000, x, rounded)  # what is not a number stays so


@triton.jit
def _place(out, source, rows, n, offset, SPAN: tl.constexpr):
    """Both pointers at the program's span of elements, its number, and what of it is asked for."""
    span = tl.program_id(0).to(tl.int64)
    if rows is not None:  # each of n elements, anywhere in the parameter
        offset = tl.load(rows + span) * n
        out, source = out + span * n, source + span * n
        span = tl.program_id(1).to(tl.int64)
    span += offset // SPAN
    start = span * SPAN - offset  # in the tensor; below 0 where it begins inside the span
    first = tl.maximum(-start, 0).to(tl.int32)
    last = tl.minimum(n - start, SPAN).to(tl.int32)
    return out + start, source + start, span, first, last


@triton.jit
def _read(p, i, first, last):
    return tl.load(p + i, mask=(i >= first) & (i < last)).to(tl.float32)


@triton.jit
def _write(p, i, first, last, x):
    tl.store(p + i, x.to(p.dtype.element_ty), mask=(i >= first) & (i < last))


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
    RADEMACHER: tl.constexpr,
    ROWS: tl.constexpr,  # 2: rounding may be stochastic, and a word has bits for both
):
    dtype: tl.constexpr = out.dtype.element_ty
    out, source, span, first, last = _place(out, source, rows, n, offset, ROWS * _ROW)
    line, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, _LANES)[None, :]
    row = span * ROWS + line
    block = (span * ROWS // 32 if RADEMACHER else row) * _LANES + lane
    pair = span * _LANES + lane
    bit, shift = (row % 32).to(tl.uint32), (line * 16).to(tl.uint32)
    # 8 numbers of 16 bits a thread would spread rows over warps, and both would draw their words
    i0 = tl.max_contiguous(line * _ROW + lane, [1, 4])
    i1, i2, i3 = i0 + _LANES, i0 + 2 * _LANES, i0 + 3 * _LANES
    x0, x1 = _read(source, i0, first, last), _read(source, i1, first, last)
    x2, x3 = _read(source, i2, first, last), _read(source, i3, first, last)
    z0 = tl.zeros([ROWS, _LANES], tl.float32)
    z1, z2, z3 = z0, z0, z0
    for _ in range(count):
        step = tl.load(table).to(tl.uint32, bitcast=True)
        probe = tl.load(table + 1).to(tl.uint32, bitcast=True)
        scale = tl.load(table + 2).to(tl.float32, bitcast=True)
        c = tl.load(table + 3).to(tl.float32, bitcast=True)
        what = tl.load(table + 4)
        table += _FIELDS
        if what >= _ANEW:
            z0, z1, z2, z3 = _draw(key, block, bit, step, probe, RADEMACHER)
        x0, x1 = x0 * scale + z0 * c, x1 * scale + z1 * c
        x2, x3 = x2 * scale + z2 * c, x3 * scale + z3 * c
        rounding = what % _ANEW
        if dtype != tl.float32:
            if rounding == _NEAREST:
                x0, x1 = _nearest(x0, dtype), _nearest(x1, dtype)
                x2, x3 = _nearest(x2, dtype), _nearest(x3, dtype)
            elif ROWS == 2 and rounding != 0:
                w0, w1, w2, w3 = _words(key, pair, step, probe | rounding.to(tl.uint32) << 24)
                x0, x1 = _stochastic(x0, w0, shift, dtype), _stochastic(x1, w1, shift, dtype)
                x2, x3 = _stochastic(x2, w2, shift, dtype), _stochastic(x3, w3, shift, dtype)
    _write(out, i0, first, last, x0)
    _write(out, i1, first, last, x1)
    _write(out, i2, first, last, x2)
    _write(out, i3, first, last, x3)


def supports(tensor: torch.Tensor) -> bool:
    known = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    device = tensor.device.type == "cuda" and torch.version.hip is None  # AMD's bits: not looked at
    return device and known and tensor.is_contiguous()


@lru_cache(maxsize=8)
def _on_device(moves: bytes, fields: np.dtype, device, stream) -> tuple[torch.Tensor, bool]:
    """The moves as the kernel reads them, and whether one of them rounds stochastically.

    Kept, since the tensors of a model make the same moves one after the other. A stream has its
    own, which the allocator does not give away before the stream is done with it.
    """
    given = np.frombuffer(moves, fields)
    step, probe, rounding = given["step"], given["probe"], given["rounding"]
    table = np.empty((len(given), _FIELDS.value), np.uint32)
    with np.errstate(over="ignore"):  # an infinity, as in torch
        numbers = [given[name].astype(np.float32) for name in ("scale", "coefficient")]
    anew = np.full(len(given), _ANEW.value, np.uint32)
    anew[1:][(step[1:] == step[:-1]) & (probe[1:] == probe[:-1])] = 0
    columns = [step, probe, *(number.view(np.uint32) for number in numbers), rounding + anew]
    for i, column in enumerate(columns):
        table[:, i] = column
    stochastic = (rounding > 0) & (rounding < _NEAREST.value)
    return torch.from_numpy(table.view(np.int32)).to(device), bool(stochastic.any())


def apply_(tensor, key, moves, distribution, offset, source, rows) -> None:
    """As `mezo.noise.apply_`, for tensors that `supports` accepts."""
    out, n, rademacher = tensor.detach(), tensor.numel(), distribution == "rademacher"
    stream = out.is_cuda and torch.cuda.current_stream(out.device).cuda_stream
    table, stochastic = _on_device(moves.tobytes(), moves.dtype, out.device, stream)
    if stochastic and out.dtype != torch.float32:
        span_rows = 2
    else:  # signs of four rows are of the same words
        span_rows = 4 if rademacher and rows is None else 1
    span = span_rows * _ROW.value
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
            RADEMACHER=rademacher,
            ROWS=span_rows,
            **OPTIONS,
        )
