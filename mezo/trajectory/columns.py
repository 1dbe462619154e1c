"""The columns of a compact log: from floats to small integers, planes of bytes, and xz; and back.

Every function has its inverse beside it. What is read back comes from a file that anybody may have
written: any codes give numbers, and the bytes of an xz stream are counted before they are made.
"""

import lzma

import numpy as np

from mezo.trajectory.header import Damage

BLOCK = 2**12  # projected gradients that share a q
EXPONENTS = range(-64, 128)  # q: float32 losses from 1/2 to 1 are multiples of 2^-24
ORDERS = range(5)  # of the differences of learning rates
_MEMORY = 2**24  # bytes that a decoder of xz may take


def bits(numbers: np.ndarray) -> np.ndarray:
    """The bit patterns of floats, as unsigned integers of their size."""
    return np.ascontiguousarray(numbers).view(f"<u{numbers.itemsize}")


def codes_of_grads(grads: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(codes, exceptions, each block's q): a number is exact by its code, or the next exception.

    grads = k 2^-q / (2 eps) has the code zigzag(k) + 1; the code of an exception is 0.
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
    """The grads, but for the exceptions, which are 0."""
    grads = np.zeros(len(codes), "<f8")
    for i, q in enumerate(exponents):
        block = slice(i * BLOCK, (i + 1) * BLOCK)
        known = np.maximum(codes[block], np.uint64(1)) - np.uint64(1)
        grads[block] = _quotient(_unzigzag(known), q, eps)
    return grads


def _integers(grads: np.ndarray, q: int | np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The integers k of which `grads` are k 2^-q / (2 eps), and where they are, to the bit."""
    with np.errstate(all="ignore"):
        k = np.rint(np.ldexp(grads * (2.0 * eps), q))
        k = np.where(np.abs(k) < 2.0**52, k, 0.0).astype("<i8")  # NaN is not below
    return k, bits(_quotient(k, q, eps)) == bits(grads)


def _quotient(k: np.ndarray, q: int | np.ndarray, eps: float) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.ldexp(k.astype("<f8"), -q) / (2.0 * eps)


def _costs(k: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """About the bits that a block takes, for each q."""
    return np.where(exact, np.log2(2.0 * np.abs(k) + 2), 72).sum(1)


def _zigzag(k: np.ndarray) -> np.ndarray:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    return ((k << 1) ^ (k >> 63)).view("<u8")


def _unzigzag(codes: np.ndarray) -> np.ndarray:
    return (codes >> np.uint64(1)).view("<i8") ^ -(codes & np.uint64(1)).view("<i8")


def codes_of_lrs(lrs: np.ndarray) -> tuple[np.ndarray, int]:
    """(codes, order): differences of that order of the bits, from step to step, group by group.

    A schedule is smooth: a linear one has no second differences, but at powers of 2.
    """
    differences, found = bits(lrs.T), []
    for order in ORDERS:
        codes = _zigzag(differences.view("<i8")).reshape(-1)
        found.append((float(np.log2(codes + 1.0).sum()), order, codes))
        differences = np.diff(differences, prepend=np.uint64(0))
    _, order, codes = min(found, key=lambda row: row[:2])
    return codes, order


def lrs_of_codes(codes: np.ndarray, order: int, steps: int) -> np.ndarray:
    """(steps, groups), from the codes of all groups, one after the other."""
    groups = len(codes) // max(steps, 1)
    differences = _unzigzag(codes).view("<u8").reshape(groups, steps)
    for _ in range(order):
        differences = np.cumsum(differences, 1, "<u8")  # modulo 2^64
    return np.ascontiguousarray(differences.T).view("<f8")


def planes_of(values: np.ndarray) -> tuple[int, bytes]:
    """(planes, xz stream): planes of bytes, lowest first, as many as the largest value needs."""
    planes = (int(values.max(initial=0)).bit_length() + 7) // 8
    if not planes:
        return 0, b""
    data = values.astype("<u8").view(np.uint8).reshape(-1, 8).T[:planes].tobytes()
    return planes, packed(data, lc=0, pb=0)  # a byte tells nothing of the next, whatever its place


def values_of(stream: bytes, count: int, planes: int) -> np.ndarray:
    """`count` unsigned integers from that many planes. Raises Damage."""
    data = unpacked(stream, count * planes) if count * planes else b""
    values = np.zeros((count, 8), np.uint8)
    values[:, :planes] = np.frombuffer(data, np.uint8).reshape(planes, count).T
    return values.view("<u8").reshape(-1)


def packed(data: bytes, **options: int) -> bytes:
    """An xz stream; a decoder needs little more memory than the dictionary's 1 MiB."""
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**20}
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=[lzma2 | options])


def unpacked(stream: bytes, expected: int) -> bytes:
    """The `expected` bytes that an xz stream holds. Damage if it holds others, or wants memory."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY)
    try:
        found = decoder.decompress(stream, expected + 1)
    except lzma.LZMAError as error:
        raise Damage(f"an xz stream that cannot be read ({error})") from None
    if len(found) != expected or not decoder.eof or decoder.unused_data:
        raise Damage(f"an xz stream that does not hold {expected} bytes")
    return found
