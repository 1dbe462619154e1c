"""Random words and z, 256 blocks at a time, as numba functions that cpu.py puts together.

Philox runs in lanes of 64 bits, so that a product of two words is one instruction. The loops are
written for LLVM's vectorizer: numbers of 32 bits are cast after every operation, since numba widens
them to 64, and floats are looked at as integers by casts of their bits.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mezo.noise import definition

LANES = definition.LANES
ROW = 4 * LANES  # elements that 256 blocks make: normals, signs of one bit, bits of one half word
_M0, _M1 = (np.uint64(m) for m in definition._MULTIPLIERS)
_W0, _W1 = (np.uint64(w) for w in definition._WEYL)
_MASK = np.uint64(definition._MASK)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7 = (np.float32(c) for c in definition._Q)
_S0, _S1, _S2, _S3 = (np.float32(c) for c in definition._S)
_C0, _C1, _C2, _C3 = (np.float32(c) for c in definition._C)
_LN2, _ONE, _MINUS_TWO = np.float32(definition._LN2), np.float32(1), np.float32(-2)
_STEP_U = np.float32(2.0**-24)
_A, _B, _D = (np.float32(c) for c in (definition._A, definition._B, definition._D))
_PARTS = (
    8  # of 256 blocks, between which memory is asked for: a core can wait for few lines at once
)
_EIGHTH = np.float32(0.125)
_EXPONENT = np.int32(0x47000000)  # of 2^15: a float32 whose last place is 2^-8
_CENTRE = np.float32(2**15 + definition.SUM_CENTRE / 256)
_BYTE, _SEVEN = np.int32(0x00FF00FF), np.int32(0x00FE00FE)  # of both halves of a word


def _bitcast(source, target, llvm_type):
    @intrinsic
    def cast(typingctx, value):
        def codegen(context, builder, signature, args):
            return builder.bitcast(args[0], llvm_type)

        return target(source), codegen

    return cast


float_bits = _bitcast(types.float32, types.int32, ir.IntType(32))
bits_float = _bitcast(types.int32, types.float32, ir.FloatType())


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


wide: Any = intrinsic(_prefer_wide)


def _prefetch(typingctx, array, index):
    """The memory at array[index] is on its way to the cache; it may lie behind the array's end."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, *(ir.Constant(word, n) for n in (1, 2, 1))])
        return context.get_dummy_value()

    return types.none(array, types.int64), codegen


prefetch: Any = intrinsic(_prefetch)


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
    bits = float_bits(u)
    exponent = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    f = bits_float(np.int32(bits - np.int32(exponent << np.int32(23)))) - _ONE
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
    across, up = float_bits(across) ^ negative, float_bits(up) ^ below
    return bits_float(np.int32(across)), bits_float(np.int32(up))


@numba.njit(nogil=True, cache=True)
def words_of(words, block, step, probe, k0, k1, ahead, lanes):
    """The 256 x 4 words of one group: 1,024 normals, 32,768 signs, or 2,048 times 16 bits.

    Only the first `lanes` of 256 blocks have to be drawn: short tensors need no more. Meanwhile the
    memory of `ahead`, which is to be moved next, comes into the cache: drawing keeps the processor
    busy and leaves the memory idle, which would be half of the time otherwise.
    """
    wide()
    a, b, c, d = (
        words[:LANES],
        words[LANES : 2 * LANES],
        words[2 * LANES : 3 * LANES],
        words[-LANES:],
    )
    lines = -(-ahead.size * ahead.itemsize // 64)
    parts = min(_PARTS, -(-lanes // (LANES // _PARTS)))
    for part in range(parts):
        for line in range(part * lines // parts, (part + 1) * lines // parts):
            prefetch(ahead, line * (64 // ahead.itemsize))
        for lane in range(part * (LANES // _PARTS), (part + 1) * (LANES // _PARTS)):
            w0, w1, w2, w3 = _philox(block + np.uint64(lane), step, probe, k0, k1)
            a[lane], b[lane], c[lane], d[lane] = (
                np.int32(w0),
                np.int32(w1),
                np.int32(w2),
                np.int32(w3),
            )


@numba.njit(nogil=True, cache=True)
def gaussian(z, words, count):
    """The first `count` of 1,024 normals, or more. (From Philox's 64 bits it takes 1.3 times.)"""
    wide()
    lanes = min(LANES, count)
    for half in range(0, min(ROW, count), 2 * LANES):
        here, word = z[half : half + 2 * LANES], words[half : half + 2 * LANES]
        for lane in range(lanes):
            r, (c, s) = _radius(word[lane]), _angle(word[lane + LANES])
            here[lane], here[lane + LANES] = r * c, r * s


@numba.njit(inline="always")
def _polynomial(bits):
    """gaussian16 of 2^15 + the sum of bytes / 256, in the bits of float32."""
    y = bits_float(bits) - _CENTRE
    v = y * y + _B
    return (y * (v * _EIGHTH + _A)) * (v * v + _D)


@numba.njit(nogil=True, cache=True)
def gaussian16(z, words, count):
    """The first `count` of 2,048 numbers, or more; a word's two halves are summed together."""
    wide()
    low, high = z[:ROW], z[ROW : 2 * ROW]
    for j in range(min(ROW, count)):
        word = words[j]
        first, second = word & _SEVEN, np.int32(word >> np.int32(4)) & _BYTE
        third = np.int32(word >> np.int32(8)) & _BYTE
        total = np.int32(np.int32(first + second) + third)
        low[j] = _polynomial(np.int32((total & np.int32(0xFFFF)) | _EXPONENT))
        high[j] = _polynomial(np.int32((total >> np.int32(16)) | _EXPONENT))
