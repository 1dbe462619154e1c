"""The noise contract as a numba kernel: z is drawn into a buffer of 16 KB and used at once.

Bit-equal to definition.py, and about as fast as the memory allows. No fused multiply-add can occur:
numba lets LLVM contract only under fastmath, which stays off. The kernels hold no Python lock, so
`apply_` splits a long tensor over torch's number of threads; a numba parallel loop would bring a
second thread pool that aborts when two Python threads meet in it.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from mezo.noise import definition

_LANES = definition.LANES
_M0, _M1 = (np.uint64(m) for m in definition._MULTIPLIERS)
_W0, _W1 = (np.uint64(w) for w in definition._WEYL)
_MASK = np.uint64(definition._MASK)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7 = (np.float32(c) for c in definition._Q)
_S0, _S1, _S2, _S3 = (np.float32(c) for c in definition._S)
_C0, _C1, _C2, _C3 = (np.float32(c) for c in definition._C)
_LN2, _ONE, _MINUS_TWO = np.float32(definition._LN2), np.float32(1), np.float32(-2)
_STEP_U = np.float32(2.0**-24)
_ROW = 4 * _LANES  # elements that 256 blocks make: normals, signs of one bit, bits of one half word
_NEAREST = 3  # of the roundings in mezo.noise, the one that takes no bits
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


def _prefer_wide(typingctx):
    """The function it is called in gets vectors of 512 bits where the processor has them.

    LLVM by itself takes 256: normals take 1.6 times as long.
    """

    def codegen(context, builder, signature, args):
        attributes = builder.function.attributes
        if isinstance(attributes, set):  # its own `add` knows LLVM's older attributes alone
            set.add(attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), codegen


_wide: Any = intrinsic(_prefer_wide)


@numba.njit(inline="always")
def _philox(block, step, probe, k0, k1):
    c0, c1, c2, c3 = block & _MASK, block >> np.uint64(32), step & _MASK, probe & _MASK
    k0, k1 = k0 & _MASK, k1 & _MASK  # known to be 32 bits: products of 64 cost three times as much
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@numba.njit(inline="always")
def _radius(word):
    mantissa = np.int32(word >> np.int32(9)) & np.int32(0x7FFFFF)
    u = np.float32(np.int32(np.int32(mantissa) * np.int32(2) + np.int32(1))) * _STEP_U
    bits = _float_bits(u)
    exponent = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    f = _bits_float(np.int32(bits - np.int32(exponent << np.int32(23)))) - _ONE
    q = ((((((_Q7 * f + _Q6) * f + _Q5) * f + _Q4) * f + _Q3) * f + _Q2) * f + _Q1) * f + _Q0
    log = np.float32(exponent) * _LN2 + (f + (f * f) * q)
    return np.sqrt(_MINUS_TWO * log)


@numba.njit(inline="always")
def _angle(word):
    """cos and sin of the angle, in the bits of int32: a sign is an exclusive or."""
    mantissa = np.int32(np.int32(word >> np.int32(7)) & np.int32(0x7FFFFF))
    t = np.float32(np.int32(np.int32(2) * mantissa + np.int32(1 - 2**23))) * _STEP_U
    x = t * t
    sine = t * (((_S3 * x + _S2) * x + _S1) * x + _S0)
    cosine = ((_C3 * x + _C2) * x + _C1) * x + _C0
    quadrant = np.int32(np.int32(word >> np.int32(30)) & np.int32(3))
    swap = (quadrant & np.int32(1)) != 0
    across, up = (sine, cosine) if swap else (cosine, sine)
    negative = np.int32(np.int32(np.int32(quadrant + np.int32(1)) & np.int32(2)) << np.int32(30))
    below = np.int32(np.int32(quadrant & np.int32(2)) << np.int32(30))
    across, up = _float_bits(across) ^ negative, _float_bits(up) ^ below
    return _bits_float(np.int32(across)), _bits_float(np.int32(up))


@numba.njit(nogil=True, cache=True)
def _words(words, block, step, probe, k0, k1):
    """The 256 x 4 words of one group: 1,024 normals, 32,768 signs, or 2,048 times 16 bits."""
    _wide()
    for lane in range(_LANES):
        w0, w1, w2, w3 = _philox(block + np.uint64(lane), step, probe, k0, k1)
        words[lane], words[lane + _LANES] = np.int32(w0), np.int32(w1)
        words[lane + 2 * _LANES], words[lane + 3 * _LANES] = np.int32(w2), np.int32(w3)


@numba.njit(nogil=True, cache=True)
def _gaussian(z, words):
    """1,024 normals of one group's words. (From Philox's 64 bits it takes 1.3 times as long.)"""
    _wide()
    for half in range(0, _ROW, 2 * _LANES):
        here, word = z[half : half + 2 * _LANES], words[half : half + 2 * _LANES]
        for lane in range(_LANES):
            r, (c, s) = _radius(word[lane]), _angle(word[lane + _LANES])
            here[lane], here[lane + _LANES] = r * c, r * s


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


@numba.njit(inline="always")
def _float_to_half_by(kind, value, bits):
    """Rounded stochastically: definition.round_stochastically."""
    number = _float_bits(value)
    magnitude = np.int32(number & np.int32(0x7FFFFFFF))
    sign = np.int32((number >> np.int32(16)) & np.int32(0x8000))
    nan = magnitude > 0x7F800000
    if kind == 1:
        half = np.int32(np.int32(magnitude + bits) >> np.int32(16))
        return np.uint16(np.int32(0x7FC0) if nan else half | sign)
    half = np.int32(
        np.int32(magnitude - np.int32(112 << 23) + (bits >> np.int32(3))) >> np.int32(13)
    )
    if magnitude < (113 << 23):
        cut = min(np.int32(np.int32(126) - (magnitude >> np.int32(23))), np.int32(29))
        below = np.int32(np.int32(bits << np.int32(cut - np.int32(14))) >> np.int32(2))
        mantissa = np.int32((magnitude & np.int32(0x7FFFFF)) | np.int32(0x800000))
        half = np.int32(np.int32(mantissa + below) >> cut)
        half = np.int32(0) if magnitude < (97 << 23) else half
    half = np.int32(0x7C00) if magnitude >= (143 << 23) else min(half, np.int32(0x7C00))
    return np.uint16(np.int32(0x7E00) if nan else half | sign)


def _working(x, out):
    """Where the numbers are worked on: float32 in `out` itself, chosen when it is compiled."""


@overload(_working)
def _choose_working(x, out):
    if out.dtype == types.float32:
        return lambda x, out: out
    return lambda x, out: x


@numba.njit(nogil=True, cache=True)
def _load(x, source, kind):
    _wide()
    if kind == 0:
        for j in range(x.size):
            x[j] = source[j]
    elif kind == 1:
        for j in range(x.size):
            x[j] = _half_to_float(1, source[j])
    else:
        for j in range(x.size):
            x[j] = _half_to_float(2, source[j])


@numba.njit(nogil=True, cache=True)
def _store(out, x, kind):
    _wide()
    if kind == 1:
        for j in range(x.size):
            out[j] = _float_to_half(1, x[j])
    elif kind == 2:
        for j in range(x.size):
            out[j] = _float_to_half(2, x[j])


@numba.njit(nogil=True, cache=True)
def _round(x, kind, rounding, row, words, step, probe, k0, k1):
    """Numbers of row `row` and on, to 16 bits and back."""
    _wide()
    if rounding == _NEAREST:
        for j in range(x.size):
            x[j] = _half_to_float(kind, _float_to_half(kind, x[j]))
        return
    probe = probe | (np.uint64(rounding) << np.uint64(24))
    for begin in range(0, x.size, _ROW):
        if begin == 0 or (row + begin // _ROW) % 2 == 0:
            block = np.uint64((row + begin // _ROW) // 2) * np.uint64(_LANES)
            _words(words, block, step, probe, k0, k1)
        shift = np.int32(16 * ((row + begin // _ROW) % 2))  # & 31: LLVM may take 32 bits for it
        part = x[begin : begin + _ROW]
        for j in range(_ROW):
            bits = np.int32(words[j] >> (shift & np.int32(31))) & np.int32(0xFFFF)
            part[j] = _half_to_float(kind, _float_to_half_by(kind, part[j], bits))


@numba.njit(nogil=True, cache=True)
def _add_normals(x, z, words, begin, row, scale, coefficient, drawn, step, probe, k0, k1):
    """x <- x * scale + coefficient * z, element `begin` of row `row` on; `drawn`: z is there."""
    _wide()
    if not drawn:
        for k in range(0, z.size, _ROW):
            block = np.uint64(row + k // _ROW) * np.uint64(_LANES)
            _words(words, block, step, probe, k0, k1)
            _gaussian(z[k : k + _ROW], words)
    noise = z[begin : begin + x.size]
    for j in range(x.size):
        x[j] = x[j] * scale + coefficient * noise[j]


@numba.njit(nogil=True, cache=True)
def _add_signs(x, words, begin, row, scale, coefficient, group, step, probe, k0, k1):
    """The same with signs. `words` are of group `group`; returns of which they are now."""
    _wide()
    if row // 32 != group:
        group = row // 32
        _words(words, np.uint64(group) * np.uint64(_LANES), step, probe, k0, k1)
    bits, i = _float_bits(coefficient), 0
    while i < x.size:
        part = x[i : min(x.size, i + _ROW - begin)]
        word = words[begin : begin + part.size]
        shift = np.int32(31 - row % 32)
        for j in range(part.size):  # the mask tells LLVM that 32 bits are enough for the shift
            sign = np.int32(word[j] << (shift & np.int32(31))) & np.int32(-(2**31))
            part[j] = part[j] * scale + _bits_float(np.int32(bits ^ sign))
        i, row, begin = i + part.size, row + 1, 0
    return group


@numba.njit(nogil=True, cache=True)
def _apply(out, source, kind, in_place, offset, rademacher, moves, k0, k1):
    """out <- moves of source, elements `offset` and on of a tensor.

    float32 (kind 0), or the bits of bfloat16 (1) or float16 (2) as uint16. Some rows at a time are
    kept in the cache for all the moves: four (a word rounds two), or all that the words of a
    rademacher direction make, if it is not the only direction.
    """
    _wide()
    alone = True
    for m in range(1, moves.size):
        alone &= moves[m].step == moves[0].step and moves[m].probe == moves[0].probe
    chunk = 4 if alone or not rademacher else 32
    x, z = np.empty(chunk * _ROW, np.float32), np.empty(chunk * _ROW, np.float32)
    words, bits = np.empty(_ROW, np.int32), np.empty(_ROW, np.int32)
    i, n, group = 0, out.size, -1
    while i < n:
        count = min(chunk * _ROW - (offset + i) % (chunk * _ROW), n - i)
        row, begin = (offset + i) // _ROW, (offset + i) % _ROW
        size = -(-(begin + count) // _ROW) * _ROW
        part = _working(x[begin : begin + count], out[i : i + count])
        if kind != 0 or not in_place:
            _load(part, source[i : i + count], kind)
        for m in range(moves.size):
            move = moves[m]
            step, probe = np.uint64(move.step), np.uint64(move.probe)
            scale, coefficient = np.float32(move.scale), np.float32(move.coefficient)
            same = m and move.step == moves[m - 1].step and move.probe == moves[m - 1].probe
            how = scale, coefficient
            if rademacher:
                group = group if alone or same else -1
                group = _add_signs(part, words, begin, row, *how, group, step, probe, k0, k1)
            else:
                _add_normals(part, z[:size], words, begin, row, *how, same, step, probe, k0, k1)
            if kind != 0 and move.rounding != 0:
                _round(x[:size], kind, move.rounding, row, bits, step, probe, k0, k1)
        _store(out[i : i + count], part, kind)
        i += count


@numba.njit(nogil=True, cache=True)
def _apply_rows(out, rows, kind, rademacher, moves, k0, k1):
    """out[k] is row rows[k] of a tensor."""
    _wide()
    for k in range(rows.size):
        _apply(out[k], out[k], kind, True, rows[k] * out.shape[1], rademacher, moves, k0, k1)


def supports(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in _KIND and tensor.is_contiguous()


def apply_(tensor, key, moves, distribution, offset, source, rows) -> None:
    """As `mezo.noise.apply_`, for tensors that `supports` accepts."""
    kind, out = _KIND[tensor.dtype], _array(tensor)
    how = (distribution == "rademacher", moves, np.uint64(key[0]), np.uint64(key[1]))
    if rows is None:
        out, given = out.reshape(-1), (out if source is None else _array(source)).reshape(-1)

        def run(begin: int, end: int) -> None:
            whole = out[begin:end], given[begin:end], kind, source is None, offset + begin
            _apply(*whole, *how)

        return _in_parallel(run, out.size, _SPLIT)
    out, index = out.reshape(len(rows), -1), rows.numpy()

    def run_rows(begin: int, end: int) -> None:
        _apply_rows(out[begin:end], index[begin:end], kind, *how)

    _in_parallel(run_rows, len(rows), -(-_SPLIT // out.shape[1]))


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy()


def _in_parallel(run, count: int, quantum: int) -> None:
    """run(begin, end) over [0, count), split over threads where there is enough to do."""
    threads = min(torch.get_num_threads(), -(-count // quantum))
    if threads <= 1:
        return run(0, count)
    size = -(-count // (threads * quantum)) * quantum
    spans = [(start, min(start + size, count)) for start in range(0, count, size)]
    pool = _pool(os.getpid(), threads)
    futures = [pool.submit(run, *span) for span in spans]
    for future in futures:
        future.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool a process: a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mezo-noise")
