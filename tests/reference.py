"""Algorithm 1 as naively as possible: the whole z stored, every line of the paper one line here."""

import hashlib
import math
import struct

import torch

MULTIPLIERS, WEYL, MASK = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF

BYTE_SUMS = [
    0,
    2,
    4,
    8,
    17,
    34,
    68,
    136,
    17,
    34,
    68,
    136,
    16,
    32,
    64,
    128,
]  # of a bit in three bytes


def philox(counter, key):
    """Philox4x32-10 on Python integers, after Salmon et al. (2011), figure 1."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
        c = [(q >> 32) ^ c[1] ^ k[0], q & MASK, (p >> 32) ^ c[3] ^ k[1], p & MASK]
        k = [(k[0] + WEYL[0]) & MASK, (k[1] + WEYL[1]) & MASK]
    return c


def key(seed: int, name: str) -> tuple[int, ...]:
    text = b"mezo/noise/1\x00" + struct.pack("<Q", seed) + name.encode()
    return struct.unpack("<II", hashlib.sha256(text).digest()[:8])


def element(seed: int, name: str, step: int, probe: int, i: int, distribution: str) -> float:
    """One element of z in double precision: the specification of docs/noise.md, element-wise."""
    group, inside = divmod(
        i, {"gaussian": 1024, "rademacher": 32768, "gaussian16": 2048}[distribution]
    )
    row, lane = divmod(inside, 256)
    block = group * 256 + lane
    words = philox((block & MASK, block >> 32, step, probe), key(seed, name))
    if distribution == "gaussian16":
        bits = words[row % 4] // 65536 if row >= 4 else words[row % 4] % 65536
        total = sum(bits >> k & 1 and weight for k, weight in enumerate(BYTE_SUMS))
        y = (total - 382) / 256
        v = y**2 - 1.755717158317566
        return y * (v / 8 + 0.4452029764652252) * (v**2 + 4.947836875915527)
    if distribution == "rademacher":
        return 1.0 - 2.0 * (words[row % 4] >> (row // 4) & 1)
    first, second = words[row // 2 * 2 : row // 2 * 2 + 2]
    radius = math.sqrt(-2 * math.log((2 * (first >> 9) + 1) / 2**24))
    quadrant, t = second >> 30, (2 * ((second >> 7) & 0x7FFFFF) + 1 - 2**23) / 2**24
    angle = math.pi / 2 * (quadrant + t)
    return radius * (math.sin(angle) if row % 2 else math.cos(angle))


def mezo(named, loss_of, draw, *, steps, lr, eps, weight_decay=0.0, num_samples=1):
    """Algorithm 2 (n = 1: Algorithm 1) on a dict of tensors, out of place; returns the losses.

    `loss_of(tensors)` is a number, `draw(name, step, probe)` the whole z of one tensor.
    """
    losses = []
    for step in range(steps):
        moved, seen = dict(named), []
        for probe in range(num_samples):
            z = {name: draw(name, step, probe) for name in named}
            plus = loss_of({name: p + eps * z[name] for name, p in named.items()})
            minus = loss_of({name: p - eps * z[name] for name, p in named.items()})
            g = (plus - minus) / (2 * eps)
            seen += [plus, minus]
            for name in named:
                moved[name] = moved[name] - lr / num_samples * g * z[name]
        losses.append(sum(seen) / len(seen))
        for name, p in named.items():
            named[name] = moved[name] - lr * weight_decay * p
    return losses


def quadratic(dimension: int, seed: int = 0):
    """(A, b, loss) of L(x) = x' A x / 2 + b' x in float64, A positive definite."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    a = root @ root.T / dimension + torch.eye(dimension, dtype=torch.float64)
    b = torch.randn(dimension, generator=generator, dtype=torch.float64)
    return a, b, lambda x: float(x @ a @ x / 2 + b @ x)
