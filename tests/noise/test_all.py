"""Many tensors in one launch: the bits of `apply_` one by one."""

import copy
from contextlib import nullcontext

import pytest
import torch
from noise_checks import without_kernels

from mezo import noise
from mezo.noise import KEEP, ROUND_PERTURBED, ROUND_UPDATE, Move

SIZES = [(3, 5), (0,), (), (2048,), (70_001,), (1,), (300, 701), (16_384,)]
MOVES = [
    Move(9, 2, 1.0, 1e-3, KEEP),
    Move(9, 2, 1.0, -2e-3),
    Move(9, 1, 0.999, -3.7e-5, ROUND_PERTURBED),
    Move(4, 1, 1.0, 2e-6, ROUND_UPDATE),
]


def tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, generator=generator) * 0.02).to(dtype) for size in SIZES]


def rows(weights):
    names = [f"layers.{i}.weight" for i in range(len(weights))]
    keys = [noise.tensor_key(3, name) for name in names]
    return list(zip(names, weights, keys, strict=True))


def one_by_one(weights, moves, distribution):
    for i, (_, tensor, key) in enumerate(rows(weights)):
        noise.apply_(tensor, key, moves[i], distribution=distribution)


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_many_tensors_have_the_bits_of_one_after_the_other(distribution, dtype, threads):
    """Empty ones, scalars, and long ones that threads share; the same moves or one's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for alike in (True, False):
            expected = tensors(dtype)
            own = [
                [m._replace(coefficient=m.coefficient * (i + 1)) for m in MOVES] for i in range(8)
            ]
            moves = [MOVES] * 8 if alike else own
            found = copy.deepcopy(expected)
            one_by_one(expected, moves, distribution)
            noise.apply_all_(rows(found), MOVES if alike else moves, distribution=distribution)
            assert all(map(torch.equal, found, expected))
            assert not torch.equal(found[4], tensors(dtype)[4])
    finally:
        torch.set_num_threads(before)


def test_tensors_of_several_kinds_are_moved_together():
    """Dtypes, one that is not contiguous, parameters that require a gradient, and no kernel."""
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bfloat16]
    for kernels in (nullcontext, without_kernels):
        expected = [torch.full((50, 60), 0.02, dtype=dtype) for dtype in kinds]
        expected.append(torch.full((60, 50), 0.02).t())
        expected.append(torch.nn.Parameter(torch.full((50, 60), 0.02)))
        found = copy.deepcopy(expected)
        one_by_one([p.detach() for p in expected], [MOVES] * 7, "gaussian16")
        with kernels():
            noise.apply_all_(rows(found), noise.table(MOVES), distribution="gaussian16")
        assert all(map(torch.equal, found, expected))


def test_no_moves_and_no_tensors_are_allowed():
    weights = torch.ones(5)
    noise.apply_all_(rows([weights]), [])
    noise.apply_all_([], MOVES)
    assert torch.equal(weights, torch.ones(5))


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_tensors_on_the_device_have_the_bits_of_the_definition(distribution, dtype):
    """Views that begin anywhere, too: wide loads want an address that is a multiple of 16."""
    expected = [*tensors(dtype), torch.full((9001,), 0.02, dtype=dtype)]
    found = [p.cuda() for p in expected]
    found[-1] = torch.full((9002,), 0.02, dtype=dtype, device="cuda")[1:]
    for moves in (MOVES[:1], MOVES[2:3], MOVES, [[m] * 2 for m in MOVES * 3][:9]):
        own = moves if isinstance(moves[0], list) else [moves] * 9
        one_by_one(expected, own, distribution)
        noise.apply_all_(rows(found), moves, distribution=distribution)
        assert all(torch.equal(f.cpu(), e) for f, e in zip(found, expected, strict=True))
