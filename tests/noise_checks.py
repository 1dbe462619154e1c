"""What the GPU kernel is checked with: moves, weights, and the definition of what comes of them."""

from contextlib import contextmanager

import numpy as np
import torch

from mezo import noise
from mezo.noise import KEEP, NEAREST, ROUND_PERTURBED, ROUND_UPDATE, Move

KEY = noise.tensor_key(7, "model.layers.0.weight")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = 2**32 - 3, 2**24 - 1  # step and probe
WALK = [Move(*LAST, 1.0, c) for c in (1e-3, -2e-3, 1e-3)]
MANY = [  # nine moves along four directions, with every rounding after every other
    Move(*LAST, 1.0, 1e-3, ROUND_PERTURBED),
    Move(*LAST, 1.0, -2e-3, ROUND_UPDATE),
    Move(*LAST, 1.0, 1e-3, KEEP),
    Move(2**32 - 3, 0, 0.999, -3.7e-5, KEEP),
    Move(0, 0, 1.0, 3e-5, NEAREST),
    Move(0, 0, 1.0, -1e-5, NEAREST),
    Move(0, 0, 0.5, 1.0, ROUND_UPDATE),
    Move(*LAST, 1.0, 1e-3, NEAREST),
    Move(*LAST, 1.0, -7e-4, ROUND_PERTURBED),
]


def normal(*shape, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def every_number(dtype):
    """Each number of 16 bits: subnormals, infinities and those that are none."""
    return torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(dtype)


def outcome(apply_, weights, moves, *, device="cpu", in_place=True, **where):
    """What `apply_` makes of the weights; they stay as they are where they are only read."""
    weights = weights.clone().to(device)
    if in_place:
        apply_(weights, KEY, moves, **where)
        return weights.cpu()
    before, out = weights.clone(), torch.full_like(weights, 7)
    apply_(out, KEY, moves, source=weights, **where)
    check_equal(weights, before)
    return out.cpu()


def check_equal(found, expected):
    """Bit by bit; what is not a number may be any of them."""
    good = ~expected.isnan()
    assert torch.equal(found.isnan(), ~good)
    bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    assert torch.equal(found[good].view(bits), expected[good].view(bits))


@contextmanager
def without_kernels():
    """Within, plain torch draws: the definition's bits."""
    kernel, noise._kernel = noise._kernel, lambda device: None
    try:
        yield
    finally:
        noise._kernel = kernel


def plain(tensor, key, moves, **where):
    with without_kernels():
        noise.apply_(tensor, key, moves, **where)


def check_part(apply_, weights, moves, **where):
    """In place, since a copy would begin at another address."""
    expected = outcome(plain, weights, moves, **where)
    apply_(weights, KEY, moves, **where)
    check_equal(weights, expected)


def check(apply_, weights, moves, device="cpu", **where):
    expected = outcome(plain, weights, moves, **where)
    check_equal(outcome(apply_, weights, moves, device=device, **where), expected)


# What the interpreter is asked for, in a process of its own: TRITON_INTERPRET counts at import


def interpreted(tensor, key, moves, *, distribution="gaussian", offset=0, source=None, rows=None):
    from mezo.noise import gpu

    gpu.apply_(tensor, key, noise.table(moves), distribution, offset, source, rows)


def check_moves(distribution):
    """One move or many, of a part of a tensor that begins anywhere; in place and from another."""
    where = {"distribution": distribution}
    far = {"offset": 2**42 + 8190, "in_place": False} | where
    for dtype in DTYPES:
        check(interpreted, normal(1, dtype=dtype), WALK[:1], **where)
        check(interpreted, normal(1025, dtype=dtype), WALK, offset=32_000, **where)
        check(interpreted, normal(1500, dtype=dtype), MANY, offset=1, **where)
        check(interpreted, normal(900, dtype=dtype), MANY[3:5], **far)
        # ends of 11 and 9 elements go apart; then nothing can be loaded in wide words
        ended = normal(5000, dtype=dtype)[5:4505]
        check_part(interpreted, ended, WALK[:1], offset=5, **where)
        check_part(interpreted, ended, WALK[:1], offset=6, **where)


def check_lookups(distribution):
    """Rows that begin anywhere, repeated and out of order; of parameters as long as any."""
    short, far = (77, [39, 0, 39]), (3000, [2**33, 1])
    for dtype, (width, rows) in (
        (torch.float32, short),
        (torch.bfloat16, short),
        (torch.bfloat16, far),
    ):
        weights, index = normal(len(rows), width, dtype=dtype), torch.tensor(rows)
        check(interpreted, weights, MANY[:2], rows=index, distribution=distribution)


def check_rounding(dtype):
    """Into subnormals, over the largest number, and of all that a tensor can hold."""
    numbers = every_number(dtype)[::32].clone()
    numbers[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    move = Move(*LAST, 1.0, 65_519.9, ROUND_PERTURBED)
    check(interpreted, numbers, [move])
    for exponent in (-40, -28, -24, -20, -13, 15, 127):
        move = Move(*LAST, 1.0, 2.0**exponent, ROUND_UPDATE)
        check(interpreted, numbers, [move])
    check(interpreted, numbers, [move._replace(scale=1.7, coefficient=0.0)])


def check_many(distribution):
    """Whole spans and parts of them, at any address and offset; the same moves, or one's own."""
    from mezo.noise import gpu

    sizes = 4096, 5, 2048, 1000, 4100, 9000
    offsets = np.array([0, 1, 2048, 64, 0, 4160])  # the last one has ends and whole spans
    keys = [noise.tensor_key(7, f"{i}") for i in range(6)]
    own = [[move._replace(coefficient=move.coefficient * i)] for i, move in enumerate(MANY[:6])]
    for dtype, moves in ((torch.float32, own), (torch.bfloat16, [MANY[:3]]), (torch.bfloat16, own)):
        found = [normal(size + 1, dtype=dtype)[size % 8 == 5 :][:size] for size in sizes]
        expected = [p.clone() for p in found]
        tables = np.stack([noise.table(one) for one in moves])
        gpu.apply_all_(gpu.gather(found, keys, offsets), tables, distribution)
        for i, p in enumerate(expected):
            where = {"offset": int(offsets[i]), "distribution": distribution}
            plain(p, keys[i], moves[i % len(moves)], **where)
            check_equal(found[i], p)


def interpreted_both(distribution):
    """Both signs of one draw have the bits of one call for each, whole spans or not."""
    from mezo.noise import gpu

    for dtype, rounding in ((torch.float32, NEAREST), (torch.bfloat16, ROUND_PERTURBED)):
        for n in (1, 2049, 4096):
            move, weights = Move(*LAST, 1.0, 1e-3, rounding), normal(n, dtype=dtype)
            both = torch.empty(2, n, dtype=dtype)
            gpu.apply_both_(both, KEY, noise.table([move]), distribution, weights)
            check_both(both, weights, move, distribution)


def check_both(both, weights, move, distribution):
    for sign, found in zip((1, -1), both, strict=True):
        expected = weights.clone()
        opposite = move._replace(coefficient=sign * move.coefficient)
        plain(expected, KEY, [opposite], distribution=distribution)
        check_equal(found, expected)


def check_one_copy():
    """The moves go to the device once, not with every tensor."""
    from mezo.noise import gpu

    gpu._on_device.cache_clear()
    for _ in range(3):
        interpreted(torch.zeros(3), KEY, WALK)
    interpreted(torch.zeros(3), KEY, WALK[:1])
    assert gpu._on_device.cache_info().misses == 2
