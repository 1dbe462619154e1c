"""The noise contract as a numba kernel: z is drawn into a buffer of 4 KB and used at once.

Bit-equal to definition.py, and about as fast as the memory allows. No fused multiply-add can occur:
numba lets LLVM contract only under fastmath, which stays off. The kernels hold no Python lock, so
`apply_` splits a long tensor over torch's number of threads; a numba parallel loop would bring a
second thread pool that aborts when two Python threads meet in it.
"""

import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..errors import Held
from . import definition

_LANES = definition.LANES
_M0, _M1 = (np.uint64(m) for m in definition._MULTIPLIERS)
_W0, _W1 = (np.uint64(w) for w in definition._WEYL)
_MASK = np.uint64(definition._MASK)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7 = (np.float32(c) for c in definition._Q)
_S0, _S1, _S2, _S3 = (np.float32(c) for c in definition._S)
_C0, _C1, _C2, _C3 = (np.float32(c) for c in definition._C)
_LN2, _ONE, _MINUS_TWO = np.float32(definition._LN2), np.float32(1), np.float32(-2)
_STEP_U = np.float32(2.0**-24)
_SPLIT = 2**16  # elements below which a second thread costs more than it brings
_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _bitcast(source, target, llvm_type):
    @intrinsic
    def cast(typingctx, value):
        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], llvm_type)

        return target(source), codegen

    return cast


_float_bits = _bitcast(types.float32, types.int32, ir.IntType(32))
_bits_float = _bitcast(types.int32, types.float32, ir.FloatType())


@numba.njit(inline="always")
def _philox(block, step, probe, k0, k1):
    c0, c1, c2, c3 = block & _MASK, block >> np.uint64(32), step, probe
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@numba.njit(inline="always")
def _radius(word):
    u = np.float32(np.int32((word >> np.uint64(9)) * np.uint64(2) + np.uint64(1))) * _STEP_U
    bits = _float_bits(u)
    exponent = np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23)
    f = _bits_float(np.int32(bits - np.int32(exponent << np.int32(23)))) - _ONE
    q = ((((((_Q7 * f + _Q6) * f + _Q5) * f + _Q4) * f + _Q3) * f + _Q2) * f + _Q1) * f + _Q0
    log = np.float32(exponent) * _LN2 + (f + (f * f) * q)
    return np.sqrt(_MINUS_TWO * log)


@numba.njit(inline="always")
def _angle(word):
    """cos and sin of the angle, in the bits of int32: a sign is an exclusive or."""
    mantissa = np.int32((word >> np.uint64(7)) & np.uint64(0x7FFFFF))
    t = np.float32(np.int32(2) * mantissa + np.int32(1 - 2**23)) * _STEP_U
    x = t * t
    sine = t * (((_S3 * x + _S2) * x + _S1) * x + _S0)
    cosine = ((_C3 * x + _C2) * x + _C1) * x + _C0
    quadrant = np.int32(word >> np.uint64(30))
    swap = np.int32(-(quadrant & np.int32(1)))  # all ones where sine and cosine change places
    s, c = _float_bits(sine), _float_bits(cosine)
    across, up = (s & swap) | (c & ~swap), (c & swap) | (s & ~swap)
    across ^= np.int32(((quadrant + np.int32(1)) & np.int32(2)) << np.int32(30))
    up ^= np.int32((quadrant & np.int32(2)) << np.int32(30))
    return _bits_float(np.int32(across)), _bits_float(np.int32(up))


@numba.njit(nogil=True, cache=True)
def _gaussian(z, block, step, probe, k0, k1):
    """One group of 1,024 normals into `z`, from the 256 blocks that start at `block`."""
    for lane in range(_LANES):
        w0, w1, w2, w3 = _philox(block + np.uint64(lane), step, probe, k0, k1)
        r, (c, s) = _radius(w0), _angle(w1)
        z[lane], z[lane + _LANES] = r * c, r * s
        r, (c, s) = _radius(w2), _angle(w3)
        z[lane + 2 * _LANES], z[lane + 3 * _LANES] = r * c, r * s


@numba.njit(nogil=True, cache=True)
def _words(words, block, step, probe, k0, k1):
    """The 256 x 4 words of one rademacher group of 32,768 elements."""
    for lane in range(_LANES):
        w0, w1, w2, w3 = _philox(block + np.uint64(lane), step, probe, k0, k1)
        words[lane], words[lane + _LANES] = np.int32(w0), np.int32(w1)
        words[lane + 2 * _LANES], words[lane + 3 * _LANES] = np.int32(w2), np.int32(w3)


@numba.njit(nogil=True, cache=True)
def _signs(z, words, k):
    for i in range(4 * _LANES):
        z[i] = np.float32(np.int32(1) - np.int32(2) * ((words[i] >> np.int32(k)) & np.int32(1)))


@numba.njit(nogil=True, cache=True)
def _fill(z, rademacher, row, words, step, probe, k0, k1):
    """Row `row` of z (elements 1,024 row and on) into `z`; `words` is kept between calls."""
    if not rademacher:
        _gaussian(z, np.uint64(row) * np.uint64(_LANES), step, probe, k0, k1)
        return
    if row % 32 == 0 or words[-1] == 0:
        _words(words, np.uint64(row // 32) * np.uint64(_LANES), step, probe, k0, k1)
        words[-1] = 1
    _signs(z, words, row % 32)


@numba.njit(inline="always")
def _half_to_float(kind, half):
    h = np.int32(half)
    if kind == 1:  # bfloat16: the upper half of a float32
        return _bits_float(np.int32(h << np.int32(16)))
    magnitude = np.int32(h & np.int32(0x7FFF))
    bits = _float_bits(_bits_float(np.int32(magnitude << np.int32(13))) * np.float32(2.0**112))
    if magnitude >= 0x7C00:  # infinity and NaN
        bits = np.int32(np.int32(0x7F800000) | np.int32(magnitude << np.int32(13)))
    return _bits_float(np.int32(bits | np.int32((h & np.int32(0x8000)) << np.int32(16))))


@numba.njit(inline="always")
def _float_to_half(kind, value):
    """Rounded to nearest, ties to even, as torch and IEEE do."""
    bits = _float_bits(value)
    magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
    sign = np.int32((bits >> np.int32(16)) & np.int32(0x8000))
    nan = magnitude > 0x7F800000
    if kind == 1:
        odd = np.int32((magnitude >> np.int32(16)) & np.int32(1))
        half = np.int32((magnitude + np.int32(0x7FFF) + odd) >> np.int32(16))
        return np.uint16(np.int32(0x7FC0) if nan else half | sign)
    odd = np.int32((magnitude >> np.int32(13)) & np.int32(1))
    normal = np.int32((magnitude - np.int32(112 << 23) + np.int32(0xFFF) + odd) >> np.int32(13))
    small = _float_bits(_bits_float(magnitude) + np.float32(0.5))  # the sum rounds at 2^-24
    half = np.int32(small - np.int32(0x3F000000)) if magnitude < (113 << 23) else normal
    half = np.int32(0x7C00) if magnitude >= (143 << 23) else half
    return np.uint16(np.int32(0x7E00) if nan else half | sign)


@numba.njit(nogil=True, cache=True)
def _apply(p, kind, offset, rademacher, step, probe, k0, k1, scales, coefficients):
    """p <- p * scale + coefficient * z for each pair, in order, in float32.

    `p` holds elements `offset` and on of a tensor: float32 (kind 0), or the bits of bfloat16 (1) or
    float16 (2) as uint16, rounded after each pair.
    """
    width = 4 * _LANES
    z = np.empty(width, np.float32)
    words = np.zeros(width + 1, np.int32)
    i, n = 0, p.size
    while i < n:
        row, begin = (offset + i) // width, (offset + i) % width
        count = min(width - begin, n - i)
        _fill(z, rademacher, row, words, step, probe, k0, k1)
        part, noise = p[i : i + count], z[begin : begin + count]
        for k in range(scales.size):
            scale, coefficient = scales[k], coefficients[k]
            if kind == 0:
                for j in range(count):
                    part[j] = part[j] * scale + coefficient * noise[j]
            else:
                for j in range(count):
                    value = _half_to_float(kind, part[j]) * scale + coefficient * noise[j]
                    part[j] = _float_to_half(kind, value)
        i += count


def supports(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in _KIND and tensor.is_contiguous()


def apply_(tensor, key, terms, *, step, probe, distribution, offset) -> None:
    """As `mezo.noise.apply_`, for a tensor that `supports` accepts."""
    kind = _KIND[tensor.dtype]
    flat = tensor.detach().view(-1)
    data = flat.numpy() if kind == 0 else flat.view(torch.uint16).numpy()
    scales, coefficients = (np.array(column, np.float32) for column in zip(*terms, strict=True))
    rademacher = distribution == "rademacher"
    words = [np.uint64(word) for word in (step, probe, *key)]

    def run(begin: int, end: int) -> None:
        part = data[begin:end]
        _apply(part, kind, offset + begin, rademacher, *words, scales, coefficients)  # type: ignore[call-arg]

    threads = min(torch.get_num_threads(), -(-data.size // _SPLIT))
    if threads <= 1:
        return run(0, data.size)
    size = -(-data.size // (threads * _SPLIT)) * _SPLIT
    starts = range(0, data.size, size)
    ends = [min(start + size, data.size) for start in starts]
    pool = _pool(os.getpid(), threads)
    futures = [pool.submit(run, *span) for span in zip(starts, ends, strict=True)]
    interrupt = Held()  # no tensor is left half moved
    while not all(future.done() for future in futures):
        with interrupt:
            wait(futures)
    interrupt.release()
    for future in futures:
        future.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool a process: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mezo-noise")
