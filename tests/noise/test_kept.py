"""z that is kept from one move along it to the next has the bits of z that is drawn each time."""

import pytest
import torch

from mezo import noise
from mezo.noise import Move

pytestmark = pytest.mark.skipif(noise._kernel("cpu") is None, reason="needs numba")
SIZES = (1, 31, 33, 255, 257, 1023, 1025, 2049, 70_001)
WALK = [[Move(3, 1, 1.0, 1e-2)], [Move(3, 1, 1.0, -2e-2)]]
HOME = [[Move(3, 1, 1.0, 1e-2), Move(3, 1, 0.9, 0.3)]]
OTHERS = [[Move(4, 1, 1.0, 0.5)], [Move(4, 2, 1.0, 0.5)], [Move(4, 1, 1.0, 1.0), Move(5, 0, 1, 1)]]


def rows(tensors):
    return noise.Rows((str(i), x, noise.tensor_key(1, str(i))) for i, x in enumerate(tensors))


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_walk_along_a_kept_z_has_the_bits_of_one_that_draws_it_anew(distribution, threads):
    """Then other steps, other directions and several at once, which must not meet the old z."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kept, plain = ([torch.linspace(-1, 1, n) for n in SIZES] for _ in range(2))
        known, expected = rows(kept), rows(plain)
        known.kept = noise.Kept.of(known)
        for moves in [*WALK, *HOME, *OTHERS, *WALK]:
            noise.apply_all_(known, moves, distribution=distribution)
            noise.apply_all_(expected, moves, distribution=distribution)
            assert all(map(torch.equal, kept, plain))
    finally:
        torch.set_num_threads(before)


def test_a_part_of_the_tensors_shares_what_is_kept_for_all():
    """As bundles do: some of the tensors have the new z, and others still the old one."""
    kept, plain = ([torch.linspace(-1, 1, n) for n in SIZES] for _ in range(2))
    known, expected = rows(kept), rows(plain)
    some = noise.Rows(known[3:6])
    known.kept = some.kept = noise.Kept.of(known)
    for which, moves in ((known, WALK[0]), (some, OTHERS[0]), (known, OTHERS[0]), (some, WALK[1])):
        noise.apply_all_(which, moves)
        noise.apply_all_(expected if which is known else expected[3:6], moves)
        assert all(map(torch.equal, kept, plain))


def test_another_distribution_of_the_same_step_is_drawn_anew():
    """What lies there is told by its step, its direction and its distribution."""
    kept, plain = torch.ones(5000), torch.ones(5000)
    known, expected = rows([kept]), rows([plain])
    known.kept = noise.Kept.of(known)
    for distribution in ("gaussian", "gaussian16", "gaussian"):
        noise.apply_all_(known, WALK[0], distribution=distribution)
        noise.apply_all_(expected, WALK[0], distribution=distribution)
        assert torch.equal(kept, plain)


def test_what_is_too_large_or_not_float32_is_not_kept():
    """Eight megabytes at most; other dtypes draw bits of rounding besides."""
    large, half = torch.empty(noise.Kept.MOST + 1), torch.empty(3, dtype=torch.bfloat16)
    assert noise.Kept.of(rows([large])) is None
    assert noise.Kept.of(rows([torch.empty(3), half])) is None
    assert noise.Kept.of(rows([torch.empty(3)])) is not None
