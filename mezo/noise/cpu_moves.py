"""The moves of tensors as numba kernels, which cpu.py calls.

z is drawn into a buffer of 16 KB and used at once, or into memory that keeps it for the next move.
No fused multiply-add can occur: numba lets LLVM contract only under fastmath, which stays off.
"""

import numba
import numpy as np
from numba import types
from numba.extending import overload

from mezo.noise.cpu_draws import (
    LANES,
    ROW,
    bits_float,
    float_bits,
    gaussian,
    gaussian16,
    wide,
    words_of,
)
from mezo.noise.cpu_halves import float_to_half, float_to_half_by, half_to_float

GAUSSIAN, RADEMACHER, GAUSSIAN16 = range(3)  # their codes
_NEAREST = 3  # of the roundings in mezo.noise, the one that takes no bits


def _working(x, out):
    """Where the numbers are worked on: float32 in `out` itself, chosen when it is compiled."""


@overload(_working)
def _choose_working(x, out):
    if out.dtype == types.float32:
        return lambda x, out: out
    return lambda x, out: x


@numba.njit(nogil=True, cache=True)
def _load(x, source, kind):
    wide()
    if kind == 0:
        for j in range(x.size):
            x[j] = source[j]
    elif kind == 1:
        for j in range(x.size):
            x[j] = half_to_float(1, source[j])
    else:
        for j in range(x.size):
            x[j] = half_to_float(2, source[j])


@numba.njit(nogil=True, cache=True)
def _store(out, x, kind):
    wide()
    if kind == 1:
        for j in range(x.size):
            out[j] = float_to_half(1, x[j])
    elif kind == 2:
        for j in range(x.size):
            out[j] = float_to_half(2, x[j])


@numba.njit(nogil=True, cache=True)
def _round(x, kind, rounding, row, words, step, probe, k0, k1):
    """Numbers of row `row` and on, to 16 bits and back."""
    wide()
    if rounding == _NEAREST:
        for j in range(x.size):
            x[j] = half_to_float(kind, float_to_half(kind, x[j]))
        return
    probe = probe | (np.uint64(rounding) << np.uint64(24))
    for begin in range(0, x.size, ROW):
        if begin == 0 or (row + begin // ROW) % 2 == 0:
            block = np.uint64((row + begin // ROW) // 2) * np.uint64(LANES)
            words_of(words, block, step, probe, k0, k1, x[:0], LANES)
        shift = np.int32(16 * ((row + begin // ROW) % 2))  # & 31: LLVM may take 32 bits for it
        part = x[begin : begin + ROW]
        for j in range(ROW):
            bits = np.int32(words[j] >> (shift & np.int32(31))) & np.int32(0xFFFF)
            part[j] = half_to_float(kind, float_to_half_by(kind, part[j], bits))


@numba.njit(nogil=True, cache=True)
def _add_normals(
    x, ahead, z, words, short, begin, row, scale, coefficient, drawn, step, probe, k0, k1
):
    """x <- x * scale + coefficient * z, element `begin` of row `row` on; `drawn`: z is there.

    `short`: a number takes 16 bits, and words make two rows, of which `row` is the first.
    `ahead` is what will be moved after x.
    """
    wide()
    if not drawn:
        made = 2 * ROW if short else ROW
        for k in range(0, z.size, made):
            group = np.uint64((row + k // ROW) // 2 if short else row + k // ROW)
            block, need = group * np.uint64(LANES), begin + x.size - k
            words_of(words, block, step, probe, k0, k1, ahead[k : k + made], need)
            if short:
                gaussian16(z[k : k + made], words, need)
            else:
                gaussian(z[k : k + made], words, need)
    noise = z[begin : begin + x.size]
    for j in range(x.size):
        x[j] = x[j] * scale + coefficient * noise[j]


@numba.njit(nogil=True, cache=True)
def _add_signs(x, ahead, words, begin, row, scale, coefficient, group, step, probe, k0, k1):
    """Do the same with signs; `words` belong to `group`. Return the group of the new words."""
    wide()
    if row // 32 != group:
        group = row // 32
        block, need = np.uint64(group) * np.uint64(LANES), begin + x.size
        words_of(words, block, step, probe, k0, k1, ahead, need)
    bits, i = float_bits(coefficient), 0
    while i < x.size:
        part = x[i : min(x.size, i + ROW - begin)]
        word = words[begin : begin + part.size]
        shift = np.int32(31 - row % 32)
        for j in range(part.size):  # the mask tells LLVM that 32 bits are enough for the shift
            sign = np.int32(word[j] << (shift & np.int32(31))) & np.int32(-(2**31))
            part[j] = part[j] * scale + bits_float(np.int32(bits ^ sign))
        i, row, begin = i + part.size, row + 1, 0
    return group


@numba.njit(nogil=True, cache=True)
def apply(out, source, kind, in_place, offset, distribution, moves, k0, k1):
    """out <- moves of source, elements `offset` and on of a tensor.

    float32 (kind 0), or the bits of bfloat16 (1) or float16 (2) as uint16. Some rows at a time are
    kept in the cache for all the moves: four (a word rounds two), or all that the words of a
    rademacher direction make, if it is not the only direction.
    """
    wide()
    rademacher, short = distribution == RADEMACHER, distribution == GAUSSIAN16
    alone = True
    for m in range(1, moves.size):
        alone &= moves[m].step == moves[0].step and moves[m].probe == moves[0].probe
    chunk = 4 if alone or not rademacher else 32
    x, z = np.empty(chunk * ROW, np.float32), np.empty(chunk * ROW, np.float32)
    words, bits = np.empty(ROW, np.int32), np.empty(ROW, np.int32)
    i, n, group = 0, out.size, -1
    while i < n:
        count = min(chunk * ROW - (offset + i) % (chunk * ROW), n - i)
        row, begin = (offset + i) // ROW, (offset + i) % ROW
        if short and row % 2:
            row, begin = row - 1, begin + ROW
        made = 2 * ROW if short else ROW
        size = -(-(begin + count) // made) * made
        ahead = source[i + count : i + count + chunk * ROW]
        part = _working(x[begin : begin + count], out[i : i + count])
        if kind != 0 or not in_place:
            _load(part, source[i : i + count], kind)
        for m in range(moves.size):
            move = moves[m]
            step, probe = np.uint64(move.step), np.uint64(move.probe)
            scale, coefficient = np.float32(move.scale), np.float32(move.coefficient)
            same = m and move.step == moves[m - 1].step and move.probe == moves[m - 1].probe
            how, where = (scale, coefficient), (step, probe, k0, k1)
            if rademacher:
                group = group if alone or same else -1
                group = _add_signs(part, ahead, words, begin, row, *how, group, *where)
            else:
                _add_normals(part, ahead, z[:size], words, short, begin, row, *how, same, *where)
            if kind != 0 and move.rounding != 0:
                _round(x[:size], kind, move.rounding, row, bits, step, probe, k0, k1)
        _store(out[i : i + count], part, kind)
        i += count


@numba.njit(nogil=True, cache=True)
def apply_rows(out, rows, kind, distribution, moves, k0, k1):
    """out[k] is row rows[k] of a tensor."""
    wide()
    for k in range(rows.size):
        apply(out[k], out[k], kind, True, rows[k] * out.shape[1], distribution, moves, k0, k1)


@numba.njit(nogil=True, cache=True)
def draw(out, offset, short, step, probe, k0, k1):
    """Elements `offset` and on of z, normals or numbers of 16 bits (short)."""
    wide()
    made = 2 * ROW if short else ROW
    z, words, i = np.empty(made, np.float32), np.empty(ROW, np.int32), 0
    while i < out.size:
        group, begin = (offset + i) // made, (offset + i) % made
        count = min(made - begin, out.size - i)
        words_of(
            words, np.uint64(group) * np.uint64(LANES), step, probe, k0, k1, z[:0], begin + count
        )
        if short:
            gaussian16(z, words, begin + count)
        else:
            gaussian(z, words, begin + count)
        out[i : i + count] = z[begin : begin + count]
        i += count


@numba.njit(nogil=True, cache=True)
def add_kept(out, z, scale, coefficient):
    wide()
    for j in range(out.size):
        out[j] = out[j] * scale + coefficient * z[j]


@numba.njit(nogil=True, cache=True)
def add_kept_to(out, source, z, scale, coefficient):
    """The same of another array; one array under both names would not be vectorised."""
    wide()
    for j in range(out.size):
        out[j] = source[j] * scale + coefficient * z[j]


@numba.njit(nogil=True, cache=True)
def copy(out, source):
    wide()
    for j in range(out.size):
        out[j] = source[j]
