"""The device functions of gpu.py: random words, z, stochastic rounding, and the moves of a span.

Each returns exactly the bits of definition.py. Numbers and words are tensors [pairs, 2, 4, 256], of
which a thread has all but the last dimension: whatever a block of words makes stays in its thread.
"""

import triton
import triton.language as tl

from mezo.noise import definition

_LANES = tl.constexpr(definition.LANES)
_ROW = tl.constexpr(4 * definition.LANES)
_GAUSSIAN, _RADEMACHER, _GAUSSIAN16 = (tl.constexpr(i) for i in range(3))  # their codes
_NEAREST = tl.constexpr(3)  # of the roundings in mezo.noise; 0 keeps, 1 and 2 are stochastic
_ANEW = tl.constexpr(4)  # added to a move's rounding where its direction is not the last one's
_FIELDS = tl.constexpr(5)  # of a move on the device: step, probe, scale, coefficient, that sum

_M0, _M1 = (tl.constexpr(m) for m in definition._MULTIPLIERS)
_W0, _W1 = (tl.constexpr(w) for w in definition._WEYL)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7 = (tl.constexpr(c) for c in definition._Q)
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in definition._S)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in definition._C)
_LN2 = tl.constexpr(definition._LN2)
_STEP_U = tl.constexpr(2.0**-24)
_A, _B, _D = (tl.constexpr(c) for c in (definition._A, definition._B, definition._D))
_CENTRE = tl.constexpr(2**15 + definition.SUM_CENTRE / 256)


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
def _moved_both(
    x,
    span,
    key,
    table,
    dtype: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    PAIRS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """The span's numbers after one move and after its opposite, of one z and the same words."""
    step = tl.load(table).to(tl.uint32, bitcast=True)
    probe = tl.load(table + 1).to(tl.uint32, bitcast=True)
    x = x * tl.load(table + 2).to(tl.float32, bitcast=True)
    c = tl.load(table + 3).to(tl.float32, bitcast=True)
    z = _draw(key, span, step, probe, c, DISTRIBUTION, PAIRS)
    plus, minus = x + z, x - z  # -c times z is minus c times z: rounding is symmetric
    if STOCHASTIC:
        half = tl.arange(0, 2)[None, :, None, None].to(tl.uint32)
        stream = (tl.load(table + 4) % _ANEW).to(tl.uint32) << 24
        word = _pair_words(key, span, step, probe | stream, PAIRS)
        return _stochastic(plus, word, half, dtype), _stochastic(minus, word, half, dtype)
    else:
        return plus.to(dtype), minus.to(dtype)
