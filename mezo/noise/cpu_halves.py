"""bfloat16 and float16 as numba functions: their bits to float32 and back, with either rounding.

`kind` is 1 for bfloat16 and 2 for float16. Integers do the work, the same in every program.
"""

import numba
import numpy as np

from mezo.noise.cpu_draws import bits_float, float_bits


@numba.njit(inline="always")
def half_to_float(kind, half):
    h = np.int32(half)
    if kind == 1:  # bfloat16: the upper half of a float32
        return bits_float(np.int32(h << np.int32(16)))
    magnitude = np.int32(h & np.int32(0x7FFF))
    bits = float_bits(bits_float(np.int32(magnitude << np.int32(13))) * np.float32(2.0**112))
    if magnitude >= 0x7C00:  # infinity and NaN
        bits = np.int32(np.int32(0x7F800000) | np.int32(magnitude << np.int32(13)))
    return bits_float(np.int32(bits | np.int32((h & np.int32(0x8000)) << np.int32(16))))


@numba.njit(inline="always")
def float_to_half(kind, value):
    """Rounded to nearest, ties to even, as torch and IEEE do."""
    bits = float_bits(value)
    magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
    sign = np.int32((bits >> np.int32(16)) & np.int32(0x8000))
    nan = magnitude > 0x7F800000
    if kind == 1:
        odd = np.int32((magnitude >> np.int32(16)) & np.int32(1))
        half = np.int32((magnitude + np.int32(0x7FFF) + odd) >> np.int32(16))
        return np.uint16(np.int32(0x7FC0) if nan else half | sign)
    odd = np.int32((magnitude >> np.int32(13)) & np.int32(1))
    normal = np.int32((magnitude - np.int32(112 << 23) + np.int32(0xFFF) + odd) >> np.int32(13))
    small = float_bits(bits_float(magnitude) + np.float32(0.5))  # the sum rounds at 2^-24
    half = np.int32(small - np.int32(0x3F000000)) if magnitude < (113 << 23) else normal
    half = np.int32(0x7C00) if magnitude >= (143 << 23) else half
    return np.uint16(np.int32(0x7E00) if nan else half | sign)


@numba.njit(inline="always")
def float_to_half_by(kind, value, bits):
    """Rounded stochastically: definition.round_stochastically."""
    number = float_bits(value)
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
