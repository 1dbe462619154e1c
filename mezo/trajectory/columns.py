"""The codec of a compact log's columns: floats become small integers, planes of bytes, and xz.

Every function has its inverse beside it. The decoders read files that anybody may have written, so
they accept any codes, and limit the bytes that an xz stream may expand to.
"""

import lzma

import numpy as np

from mezo.trajectory.header import Damage

BLOCK = 2**12  # projected gradients that share an exponent q
EXPONENTS = range(-64, 128)  # q: float32 losses from 1/2 to 1 are multiples of 2^-24
ORDERS = range(5)  # of the differences of learning rates
_MEMORY = 2**24  # bytes of memory that the xz decoder may use


def bits(numbers: np.ndarray) -> np.ndarray:
    """Return the bit patterns of floats, as unsigned integers of the same size."""
    return np.ascontiguousarray(numbers).view(f"<u{numbers.itemsize}")


def codes_of_grads(grads: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Encode projected gradients as (codes, exceptions, one exponent q per block), without loss.

    A gradient that equals k 2^-q / (2 eps) for an integer k has the code zigzag(k) + 1. Any other
    has the code 0, and its bit pattern is the next of the exceptions.
    """
    codes, exceptions, exponents = [np.empty(0, "<u8")], [np.empty(0, "<u8")], []
    for first in range(0, len(grads), BLOCK):
        block = grads[first : first + BLOCK]
        costs = _costs(*_integers(block, np.array(EXPONENTS)[:, None], eps))
        q = EXPONENTS[int(np.argmin(costs))]
        k, exact = _integers(block, q, eps)
        codes.append(np.where(exact, _zigzag(k) + np.uint64(1), np.uint64(0)))
        exceptions.append(bits(block[~exact]))
        exponents.append(q)
    return np.concatenate(codes), np.concatenate(exceptions), exponents


def grads_of_codes(codes: np.ndarray, exponents: list[int], eps: float) -> np.ndarray:
    """Return the gradients of the codes; those of exceptions are 0 and remain to be filled in."""
    grads = np.zeros(len(codes), "<f8")
    for i, q in enumerate(exponents):
        block = slice(i * BLOCK, (i + 1) * BLOCK)
        zigzags = np.maximum(codes[block], np.uint64(1)) - np.uint64(1)
        grads[block] = _quotient(_unzigzag(zigzags), q, eps)
    return grads


def _integers(grads: np.ndarray, q: int | np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return integers k for which k 2^-q / (2 eps) is close to `grads`, and where it is equal."""
    with np.errstate(all="ignore"):
        k = np.rint(np.ldexp(grads * (2.0 * eps), q))
        k = np.where(np.abs(k) < 2.0**52, k, 0.0).astype("<i8")  # False for NaN, too
    return k, bits(_quotient(k, q, eps)) == bits(grads)


def _quotient(k: np.ndarray, q: int | np.ndarray, eps: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.ldexp(k.astype("<f8"), -q) / (2.0 * eps)


def _costs(k: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Estimate the number of bits that a block takes, for each q."""
    return np.where(exact, np.log2(2.0 * np.abs(k) + 2), 72).sum(1)


def _zigzag(k: np.ndarray) -> np.ndarray:
    """Map 0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    return ((k << 1) ^ (k >> 63)).view("<u8")


def _unzigzag(codes: np.ndarray) -> np.ndarray:
    return (codes >> np.uint64(1)).view("<i8") ^ -(codes & np.uint64(1)).view("<i8")


def codes_of_lrs(lrs: np.ndarray) -> tuple[np.ndarray, int]:
    """Encode learning rates (steps, groups) as (codes, order of differences), without loss.

    The codes are the differences of that order between the bit patterns of successive steps, one
    group after the other. A schedule is smooth: the second differences of a linear one vanish,
    except where the rate crosses a power of 2.
    """
    differences, candidates = bits(lrs.T), []
    for order in ORDERS:
        codes = _zigzag(differences.view("<i8")).reshape(-1)
        candidates.append((float(np.log2(codes + 1.0).sum()), order, codes))
        differences = np.diff(differences, prepend=np.uint64(0))
    _, order, codes = min(candidates, key=lambda row: row[:2])
    return codes, order


def lrs_of_codes(codes: np.ndarray, order: int, steps: int) -> np.ndarray:
    """Return the learning rates (steps, groups) from the codes of one group after the other."""
    groups = len(codes) // max(steps, 1)
    differences = _unzigzag(codes).view("<u8").reshape(groups, steps)
    for _ in range(order):
        differences = np.cumsum(differences, 1, "<u8")  # modulo 2^64
    return np.ascontiguousarray(differences.T).view("<f8")


def planes_of(values: np.ndarray) -> tuple[int, bytes]:
    """Split unsigned integers into byte planes, and return (number of planes, xz stream).

    The lowest bytes come first, and there are as many planes as the largest value needs.
    """
    planes = (int(values.max(initial=0)).bit_length() + 7) // 8
    if not planes:
        return 0, b""
    data = values.astype("<u8").view(np.uint8).reshape(-1, 8).T[:planes].tobytes()
    return planes, packed(data, lc=0, pb=0)  # a byte says nothing about the next


def values_of(stream: bytes, count: int, planes: int) -> np.ndarray:
    """Return `count` unsigned integers from their byte planes. Raises Damage for a bad stream."""
    data = unpacked(stream, count * planes) if count * planes else b""
    values = np.zeros((count, 8), np.uint8)
    values[:, :planes] = np.frombuffer(data, np.uint8).reshape(planes, count).T
    return values.view("<u8").reshape(-1)


def packed(data: bytes, **options: int) -> bytes:
    """Return an xz stream; decoding it takes little more memory than the dictionary's 1 MiB."""
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**20}
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=[lzma2 | options])


def unpacked(stream: bytes, expected: int) -> bytes:
    """Return the `expected` bytes that an xz stream holds.

    Raises Damage if it is malformed, has another length, or needs too much memory to decode.
    """
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY)
    try:
        data = decoder.decompress(stream, expected + 1)
    except lzma.LZMAError as error:
        raise Damage(f"an xz stream that cannot be read ({error})") from None
    if len(data) != expected or not decoder.eof or decoder.unused_data:
        raise Damage(f"an xz stream that does not hold {expected} bytes")
    return data
