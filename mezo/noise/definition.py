"""The noise contract: z(seed, name, step, probe; element), defined here in plain torch.

    key(seed, name)   = the first 64 bits of SHA-256("mezo/noise/1", 0, seed, name)
    counter           = (block, step, stream and probe), 128 bits
    words             = Philox4x32-10(key, counter): four 32-bit words a block
    z                 = Box-Muller of two words (gaussian), a sign a bit (rademacher), or a
                        polynomial in a sum of three bytes of a half word (gaussian16)

A counter-based generator has no state: any element of z is computed from its index alone, so the
order of parameters, a shard, a stride, a thread count or a device changes nothing. Every operation
on floats below is one that IEEE 754 rounds identically everywhere (add, multiply, square root, one
at a time: no fused multiply-add), so kernels in other languages can be, and are, equal to the bit.
docs/noise.md specifies the same in words. What is here is frozen: another distribution may be
added, a change to one needs a new contract version.
"""

import hashlib
from functools import lru_cache
from typing import ClassVar

import torch

from mezo.errors import InputError

CONTRACT = 1
LANES = 256  # blocks are taken 256 at a time, so that neighbours in memory are neighbours in a lane
MAX_STEP, MAX_PROBE = 2**32, 2**24
ROUNDING_GROUP = 8 * LANES  # 16 bits an element: a word serves two
DIRECTION, ROUND_UPDATE, ROUND_PERTURBED = 0, 1, 2  # streams: z; bits of stochastic rounding

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# ln(1 + f) = f + f^2 Q(f) on [sqrt(1/2) - 1, sqrt(2) - 1], relative error 3e-8 before rounding
_LN2 = 0.6931471824645996
_Q = (
    -0.49999991059303284,
    0.3333396315574646,
    -0.2500181794166565,
    0.19961564242839813,
    -0.16568467020988464,
    0.1492171585559845,
    -0.14325451850891113,
    0.08746795356273651,
)
# sin(pi/2 t) = t S(t^2), cos(pi/2 t) = C(t^2) on [-1/2, 1/2], relative error 3e-8
_S = (1.5707963705062866, -0.6459634900093079, 0.07968003302812576, -0.00460165785625577)
_C = (0.9999999403953552, -1.233696699142456, 0.25359493494033813, -0.02039858140051365)
# gaussian16: z = y (v/8 + A) (v^2 + D) with v = y^2 + B. Over the 2^16 halves of a word the mean is
# 0 and the moments 2, 4 and 6 are 1, 3 and 15 to 3e-8 (python -m benchmarks.gaussian16 finds them).
SUM_CENTRE = 382  # y = (the sum of three bytes - 382) / 256
_A, _B, _D = 0.4452029764652252, -1.755717158317566, 4.947836875915527


@lru_cache(maxsize=2**16)
def canonical_name(name: str) -> str:
    """Return a parameter's name without what wrappers (DDP, torch.compile, FSDP) add to it."""
    parts = name.removeprefix("module.").split(".")
    return ".".join(p for p in parts if p not in ("_orig_mod", "_fsdp_wrapped_module"))


@lru_cache(maxsize=2**16)
def tensor_key(seed: int, name: str) -> tuple[int, int]:
    """Return Philox's key for one tensor of one run; `name` is the tensor's canonical name.

    Raises InputError unless `seed` is in [0, 2^64).
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be in [0, 2^64), got {seed}")
    digest = hashlib.sha256(b"mezo/noise/1\0" + seed.to_bytes(8, "little") + name.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counter, key: tuple[int, int]):
    """Philox4x32-10 (Salmon et al., 2011): map four words, int64 in [0, 2^32), to four."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low0, high0 = _multiply(c0, _MULTIPLIERS[0])
        low1, high1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a, b: int):
    product = a * b  # of two 32-bit numbers, kept in an int64 that wraps: its bits are right
    return product & _MASK, (product >> 32) & _MASK


class Distribution:
    """How z is made of random words: a value of `DISTRIBUTIONS`, which options and logs name.

    Attributes:
        name: Its name in options and logs.
        code: Its number in the kernels.
        group: The number of elements that 256 blocks make.
        signs: Whether z is +1 or -1, so that z^2 is 1 and need not be drawn.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    group: ClassVar[int]
    signs: ClassVar[bool] = False

    def from_words(self, words: list[torch.Tensor], count: int) -> torch.Tensor:
        """Return z in float32, of which the caller needs the first `count` elements.

        `words` are w0 .. w3 of whole groups, each int64 of shape (groups, LANES). The result has
        the groups in its first dimension, and is row-major in the order of the elements.
        """
        raise NotImplementedError


class Gaussian(Distribution):
    """Standard normals, two of every two words, by Box and Muller."""

    name, code, group = "gaussian", 0, 4 * LANES

    def from_words(self, words, count):
        halves = [*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])]
        return torch.stack(halves, dim=1)  # (groups, 4, LANES)


class Rademacher(Distribution):
    """Random signs, one of every bit."""

    name, code, group, signs = "rademacher", 1, 128 * LANES, True

    def from_words(self, words, count):
        needed = min(32, -(-count // (4 * LANES)))  # bits of a word, low ones first
        four = torch.stack(words, dim=1)
        bits = torch.stack([(four >> k) & 1 for k in range(needed)], dim=1)
        return (1 - 2 * bits).float()  # (groups, bits, 4, LANES)


class Gaussian16(Distribution):
    """Nearly normal numbers, one of every half word."""

    name, code, group = "gaussian16", 2, 8 * LANES

    def from_words(self, words, count):
        four = torch.stack(words, dim=1)
        halves = torch.stack([four & 0xFFFF, four >> 16], dim=1)  # (groups, 2, 4, LANES)
        return _from_16_bits(halves)


DISTRIBUTIONS: dict[str, Distribution] = {
    one.name: one for one in (Gaussian(), Rademacher(), Gaussian16())
}


def draw(
    key: tuple[int, int],
    start: int,
    stop: int,
    *,
    step: int,
    probe: int = 0,
    distribution: str = "gaussian",
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return elements [start, stop) of z in the tensor's row-major order, in float32.

    The range is widened to whole groups (1,024 elements for gaussian, 2,048 for gaussian16, 32,768
    for rademacher), and temporaries take about 100 bytes per element, so draw long tensors in
    pieces.
    """
    drawn = DISTRIBUTIONS[distribution]
    first, last = start // drawn.group, -(-stop // drawn.group)
    words = _words(key, first, last, step, DIRECTION << 24 | probe, device)
    begin = first * drawn.group
    return drawn.from_words(words, stop - begin).reshape(-1)[start - begin : stop - begin]


def _words(key: tuple[int, int], first: int, last: int, step: int, probe_word: int, device):
    """Return the words w0 .. w3 of the groups [first, last), each of shape (groups, LANES)."""
    blocks = torch.arange(first * LANES, last * LANES, device=device)
    constant = [torch.full_like(blocks, word) for word in (step, probe_word)]
    words = philox((blocks & _MASK, blocks >> 32, *constant), key)
    return [word.view(-1, LANES) for word in words]


def rounding_bits(
    key: tuple[int, int],
    start: int,
    stop: int,
    *,
    step: int,
    probe: int = 0,
    stream: int = ROUND_UPDATE,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return elements [start, stop) of the bits for stochastic rounding, int32 in [0, 2^16)."""
    first, last = start // ROUNDING_GROUP, -(-stop // ROUNDING_GROUP)
    words = torch.stack(_words(key, first, last, step, stream << 24 | probe, device), dim=1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=1)  # (groups, 2, 4, LANES)
    begin = first * ROUNDING_GROUP
    return halves.reshape(-1)[start - begin : stop - begin].int()


def round_stochastically(x: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 `x` to bfloat16 or float16, up or down, so that the mean over `bits` is x.

    The bits are added below the last place that is kept, and the rest is cut off. This uses integer
    operations only, so that it is the same everywhere. The mean is x to 2^-16 of a unit in the last
    place; for float16, numbers below 2^-30 become 0.
    """
    number = x.view(torch.int32)
    magnitude, sign = number & 0x7FFFFFFF, (number >> 16) & 0x8000
    if dtype == torch.bfloat16:
        half, not_a_number = (magnitude + bits) >> 16, 0x7FC0
    else:
        normal = (magnitude - (112 << 23) + (bits >> 3)) >> 13
        cut = (126 - (magnitude >> 23)).clamp(14, 29)  # places, for a number below 2^-14
        below = (bits << (cut - 14)) >> 2  # as many bits, of which the first 16 are random
        small = ((magnitude & 0x7FFFFF | 0x800000) + below) >> cut
        small = torch.where(magnitude < (97 << 23), 0, small)
        half = torch.where(magnitude < (113 << 23), small, normal).clamp(max=0x7C00)
        half, not_a_number = torch.where(magnitude >= (143 << 23), 0x7C00, half), 0x7E00
    half = torch.where(magnitude > 0x7F800000, not_a_number, half | sign)
    return half.to(torch.int16).view(dtype)


def _box_muller(radius_word, angle_word):
    """Return two independent standard normals, r cos(a) and r sin(a) with r = sqrt(-2 ln u)."""
    u = (2 * (radius_word >> 9) + 1).float() * 2.0**-24  # odd / 2^24: exact, in (0, 1)
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # u = 2^exponent m, m in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    log = exponent.float() * _LN2 + (f + (f * f) * _horner(_Q, f))
    # at most 5.77. In double, then rounded: torch's float32 square root on a CPU is not IEEE's (it
    # is off by one in 0.6 % of cases), and the rounded double is, even if itself off by one.
    r = torch.sqrt((-2.0 * log).double()).float()
    quadrant = angle_word >> 30
    t = (2 * ((angle_word >> 7) & 0x7FFFFF) + 1 - 2**23).float() * 2.0**-24  # in (-1/2, 1/2)
    square = t * t
    sine, cosine = t * _horner(_S, square), _horner(_C, square)
    odd = (quadrant & 1).bool()  # the angle is pi/2 (quadrant + t)
    across, up = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    across = torch.where(((quadrant + 1) & 2).bool(), -across, across)
    up = torch.where((quadrant & 2).bool(), -up, up)
    return r * across, r * up


def _from_16_bits(half):
    """Return a nearly normal number from each half word, by a polynomial in a sum of three bytes.

    The bytes overlap (bits 1 to 7, 4 to 11, 8 to 15), so that their sum is already close to a
    normal; the polynomial of degree 7 stretches its tails.
    """
    total = (half & 0xFE) + ((half >> 4) & 0xFF) + (half >> 8)
    y = (total - SUM_CENTRE).float() * 2.0**-8  # exact, as is y * y
    v = y * y + _B
    return (y * (v * 0.125 + _A)) * (v * v + _D)


def _horner(coefficients, x):
    value = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c  # a multiplication, rounded, then an addition, rounded
    return value
