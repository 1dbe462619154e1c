"""The noise contract as a Triton kernel: z is drawn in registers and used at once.

Bit-equal to definition.py: launched with enable_fp_fusion=False, so that a multiplication and an
addition stay two roundings, with the square root that IEEE rounds (`sqrt_rn`), and subnormals kept,
which is Triton's default. A program takes a span of whole rows (1,024 elements: 4 words of 256
lanes), the pointer is 64 bits wide and the index inside a span 32, and what lies outside of the
tensor is masked.
"""

import torch
import triton
import triton.language as tl

from . import definition

_LANES = tl.constexpr(definition.LANES)
_ROW = tl.constexpr(4 * definition.LANES)
_ROWS = {"gaussian": 1, "rademacher": 8}  # a program; of the 32 that a rademacher group has
_PAIRS = 4  # of scale and coefficient, a launch; a replayed step is three of the walk and an update
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
def _read(p, i, first, last):
    return tl.load(p + i, mask=(i >= first) & (i < last))


@triton.jit
def _write(p, i, first, last, x, z, s0, c0, s1, c1, s2, c2, s3, c3, PAIRS: tl.constexpr):
    """x <- x * scale + coefficient * z for each pair, rounded to p's type each time, into p."""
    x = (x.to(tl.float32) * s0 + z * c0).to(p.dtype.element_ty)
    if PAIRS > 1:
        x = (x.to(tl.float32) * s1 + z * c1).to(p.dtype.element_ty)
    if PAIRS > 2:
        x = (x.to(tl.float32) * s2 + z * c2).to(p.dtype.element_ty)
    if PAIRS > 3:
        x = (x.to(tl.float32) * s3 + z * c3).to(p.dtype.element_ty)
    tl.store(p + i, x, mask=(i >= first) & (i < last))


@triton.jit(do_not_specialize=["key", "step", "probe"])
def _kernel(
    p,  # elements `offset` and on of a tensor
    n: tl.int64,
    offset: tl.int64,
    key: tl.uint64,
    step: tl.uint32,
    probe: tl.uint32,
    s0: tl.float32,
    c0: tl.float32,
    s1: tl.float32,
    c1: tl.float32,
    s2: tl.float32,
    c2: tl.float32,
    s3: tl.float32,
    c3: tl.float32,
    PAIRS: tl.constexpr,  # that count; the others are passed over
    RADEMACHER: tl.constexpr,
    ROWS: tl.constexpr,
):
    span = tl.program_id(0).to(tl.int64) + offset // (ROWS * _ROW)
    start = span * (ROWS * _ROW) - offset  # of the span in p; below 0 where p begins inside it
    first = tl.maximum(-start, 0).to(tl.int32)
    last = tl.minimum(n - start, ROWS * _ROW).to(tl.int32)
    p += start
    lane = tl.arange(0, _LANES)
    group = span // (32 // ROWS) if RADEMACHER else span
    block = group * _LANES + lane
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, step.to(tl.uint32), probe.to(tl.uint32))
    bit = (span % (32 // ROWS) * ROWS).to(tl.uint32) if RADEMACHER else 0
    for row in range(ROWS):
        i0 = row * _ROW + lane
        i1, i2, i3 = i0 + _LANES, i0 + 2 * _LANES, i0 + 3 * _LANES
        x0, x1 = _read(p, i0, first, last), _read(p, i1, first, last)  # all before any is written
        x2, x3 = _read(p, i2, first, last), _read(p, i3, first, last)
        if RADEMACHER:
            k = bit + row
            z0, z1, z2, z3 = _sign(w0, k), _sign(w1, k), _sign(w2, k), _sign(w3, k)
        else:
            z0, z1 = _box_muller(w0, w1)
            z2, z3 = _box_muller(w2, w3)
        _write(p, i0, first, last, x0, z0, s0, c0, s1, c1, s2, c2, s3, c3, PAIRS)
        _write(p, i1, first, last, x1, z1, s0, c0, s1, c1, s2, c2, s3, c3, PAIRS)
        _write(p, i2, first, last, x2, z2, s0, c0, s1, c1, s2, c2, s3, c3, PAIRS)
        _write(p, i3, first, last, x3, z3, s0, c0, s1, c1, s2, c2, s3, c3, PAIRS)


def supports(tensor: torch.Tensor) -> bool:
    known = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    device = tensor.device.type == "cuda" and torch.version.hip is None  # AMD's bits: not looked at
    return device and known and tensor.is_contiguous()


def apply_(tensor, key, terms, *, step, probe, distribution, offset) -> None:
    """As `mezo.noise.apply_`, for a tensor that `supports` accepts."""
    flat = tensor.detach().view(-1)
    rows = _ROWS[distribution]
    span = rows * _ROW.value
    programs = -(-(offset + flat.numel()) // span) - offset // span
    where = (flat.numel(), offset, key[0] | key[1] << 32, step, probe)
    with torch.cuda.device_of(flat):  # Triton launches on the current device
        for i in range(0, len(terms), _PAIRS):
            pairs = terms[i : i + _PAIRS]
            unused = [(1.0, 0.0)] * (_PAIRS - len(pairs))
            numbers = [float(number) for pair in [*pairs, *unused] for number in pair]
            _kernel[(programs,)](
                flat,
                *where,
                *numbers,
                PAIRS=len(pairs),
                RADEMACHER=distribution == "rademacher",
                ROWS=rows,
                **OPTIONS,
            )
