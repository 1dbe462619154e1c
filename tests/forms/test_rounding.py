"""Updates smaller than a 16-bit weight's last place."""

import copy
import math
import random
from fractions import Fraction

import pytest
import torch
from models import Regression, weights
from noise_checks import plain

from mezo import MeZO, noise, trajectory
from mezo.forms.rounding import ROUNDINGS, last_rounding, update_
from mezo.noise import KEEP, NEAREST, ROUND_PERTURBED, ROUND_UPDATE, Move, definition

KEY = noise.tensor_key(3, "w")
HALF = [torch.bfloat16, torch.float16]


def numbers(dtype, count=4096):
    """Weights as models have them, and the corners: 0, subnormal, large, negative."""
    made = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02
    made[::5] *= 1e-4
    made[::7] *= 1e3
    made[::11] = 0
    return made.to(dtype)


def neighbours(x, dtype):
    """The numbers of `dtype` next below and above each of x, in float64."""
    near = x.to(dtype)
    low, high = near.clone(), near.clone()
    away = torch.full_like(near, torch.inf)
    over, under = near.double() > x.double(), near.double() < x.double()
    low[over] = torch.nextafter(near, -away)[over]
    high[under] = torch.nextafter(near, away)[under]
    return low.double(), high.double()


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_goes_to_a_neighbour_as_often_as_it_is_near(dtype):
    """Over all 2^16 bit patterns the mean is exact to 2^-16 of the neighbours' distance."""
    bits = torch.arange(2**16, dtype=torch.int32)
    edge = 2.0**-14 if dtype == torch.float16 else 1.0  # below it float16 has fewer places
    for value in [0.0123, -1.0001, 3.3e-5, -6e-8, 1e-7, 2e-9 * edge, 65_000.1, edge * 0.99999]:
        x = torch.full((2**16,), value)
        rounded = definition.round_stochastically(x, bits, dtype)
        low, high = neighbours(x[:1], dtype)
        assert set(rounded.double().unique().tolist()) <= {float(low), float(high)}
        error = float(rounded.double().mean() - x[0].double())
        assert abs(error) <= float(high - low) * 2.0**-16 + (2.0**-30 if value < 1e-8 else 0)


@pytest.mark.parametrize("dtype", HALF)
def test_what_needs_no_rounding_is_kept_and_what_is_no_number_stays_so(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = noise.draw(KEY, 0, 2**16, step=0).abs().mul(1e4).int() % 2**16
    found = definition.round_stochastically(every.float(), bits, dtype)
    number = ~every.isnan()
    assert torch.equal(found[number].view(torch.int16), every[number].view(torch.int16))
    assert found[~number].isnan().all()


def test_the_bits_for_rounding_are_uniform_and_of_their_own_stream():
    n = 2**18
    streams = [definition.rounding_bits(KEY, 0, n, step=1, stream=s) for s in (1, 2)]
    for bits in streams:
        assert (int(bits.min()), int(bits.max())) == (0, 2**16 - 1)
        counts = torch.bincount(bits, minlength=2**16).double()
        chi2 = float(((counts - n / 2**16) ** 2 / (n / 2**16)).sum())
        assert abs(chi2 - 2**16) < 5 * (2 * 2**16) ** 0.5
    assert float((streams[0] == streams[1]).double().mean()) < 2 * 2.0**-16 + 5 * n**-0.5 / 256
    part = definition.rounding_bits(KEY, 1000, 5000, step=1)
    assert torch.equal(part, streams[0][1000:5000])


def test_rounding_bits_are_frozen():
    """Frozen as z is: a run log of a 16-bit model depends on them (docs/noise.md has them too)."""
    key = noise.tensor_key(0, "w")
    assert definition.rounding_bits(key, 0, 4, step=0).tolist() == [0xD6F, 0x7399, 0x9103, 0x7CD9]
    assert definition.rounding_bits(key, 1024, 1026, step=0).tolist() == [0x46E, 0xAAD0]
    other = definition.rounding_bits(key, 0, 4, step=0, stream=2)
    assert other.tolist() == [0xFE90, 0xE1D0, 0xC4F7, 0x247A]


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_is_the_specification_in_whole_numbers(dtype):
    """A twin on fractions: down to the grid, of the number plus what the bits are worth."""
    places, smallest = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}[dtype]
    generator = random.Random(0)
    for _ in range(2000):
        value = math.ldexp(generator.uniform(1, 2), generator.randrange(-29, 15))
        value = float(torch.tensor(value))
        bits = generator.randrange(2**16)
        unit = Fraction(2) ** (max(math.frexp(value)[1] - 1, smallest) - places)
        cut = 16 if dtype == torch.bfloat16 else 13  # places of float32 that go
        if value < 2.0**smallest:
            cut += smallest - (math.frexp(value)[1] - 1)
        lowest = unit / 2**cut  # what a bit below is worth
        added = (bits >> (16 - cut)) if cut <= 16 else bits << (cut - 16)
        expected = (Fraction(value) + added * lowest) // unit * unit
        x = torch.tensor([value, -value])
        found = definition.round_stochastically(x, torch.tensor([bits, bits]).int(), dtype)
        assert found.double().tolist() == [float(expected), -float(expected)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_how_much_of_small_updates_is_kept(dtype, rounding):
    """1,000 updates of a tenth of a unit: all of it in the mean, all of it, or nothing.

    The first element of every pair is at 1.0. stochastic: the sum of 1,000 roundings has a standard
    deviation of at most 0.5 sqrt(1000) units; the mean over 2,048 weights is within 5 / sqrt(2048)
    of that. compensated: two 16-bit numbers, at most one unit of the second off a step. master: the
    float32 sum, rounded once.
    """
    unit = torch.finfo(dtype).eps
    weight, state, steps, n = torch.ones(2048, dtype=dtype), {}, 1000, 2048
    exact = torch.ones(n, dtype=torch.float64)
    for step in range(steps):
        moves = [Move(step, 0, 1.0, 0.1 * unit, last_rounding(rounding))]
        update_(weight, KEY, moves, rounding, "rademacher", state)
        noise.apply_(exact, KEY, moves, distribution="rademacher")
    off = (weight.double() - exact) / unit
    if rounding == "nearest":
        assert torch.equal(weight, torch.ones(n, dtype=dtype))
    elif rounding == "stochastic":
        assert abs(float(off.mean())) < 5 * 0.5 * (steps / n) ** 0.5
        assert 1 < float(off.abs().max()) < 5 * 0.5 * steps**0.5
    else:
        slack = steps * unit if rounding == "compensated" else steps * 2.0**-24 / unit
        assert float(off.abs().max()) <= 0.5 + slack


@pytest.mark.parametrize("dtype", HALF)
def test_a_master_is_the_float32_run(dtype):
    weight, state = numbers(dtype), {}
    wide = weight.float()
    for step in range(20):
        moves = [Move(step, 1, 1.0, 1e-5, KEEP), Move(step, 0, 0.999, -3e-5, NEAREST)]
        update_(weight, KEY, moves, "master", "gaussian", state)
        noise.apply_(wide, KEY, moves)
    assert torch.equal(state["master"], wide)
    assert torch.equal(weight, wide.to(dtype))


def test_float32_weights_know_nothing_of_rounding():
    results = []
    for rounding in ROUNDINGS:
        weight, state = numbers(torch.float32), {}
        update_(
            weight,
            KEY,
            [Move(0, 0, 1.0, 1e-3, last_rounding(rounding))],
            rounding,
            "gaussian",
            state,
        )
        results.append(weight)
        assert not state
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_half_precision_run_replays_to_the_bit(tmp_path, dtype, rounding, num_samples):
    model = Regression(dtype)
    base = copy.deepcopy(model)
    options = {"rounding": rounding, "num_samples": num_samples, "weight_decay": 0.1}
    optimizer = MeZO(model.named_parameters(), lr=1e-3, seed=4, **options)
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        for i in range(30):
            optimizer.step(model if i != 7 else lambda: float("nan"))
    header = trajectory.read(tmp_path / "run.mezo").header
    assert (header["perturbation"], header["rounding"]) == ("scratch", rounding)
    assert not torch.equal(weights(base), weights(model))
    trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(base), weights(model))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_resumed_half_precision_run_is_the_uninterrupted_run(rounding):
    """The buffers are in the state_dict; torch casts what it loads to the weight's dtype."""
    model, twin = Regression(torch.bfloat16), Regression(torch.bfloat16)
    optimizer = MeZO(model.named_parameters(), lr=1e-4, seed=9, rounding=rounding)
    for _ in range(5):
        optimizer.step(model)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    other = MeZO(twin.named_parameters(), lr=1.0, seed=0, rounding=rounding)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        optimizer.step(model)
        other.step(twin)
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize(
    ("rounding", "elements"), [("stochastic", 0), ("compensated", 1), ("master", 1)]
)
def test_buffers_are_what_the_documentation_says(rounding, elements):
    model = Regression(torch.bfloat16)
    optimizer = MeZO(model.named_parameters(), lr=1e-3, seed=1, rounding=rounding)
    optimizer.step(model)
    kept = [t for state in optimizer.state.values() for t in state.values()]
    assert sum(t.numel() for t in kept) == elements * weights(model).numel()
    assert {t.dtype for t in kept} <= {torch.float32 if rounding == "master" else torch.bfloat16}


@pytest.mark.parametrize("stream", [ROUND_UPDATE, ROUND_PERTURBED])
@pytest.mark.parametrize("dtype", HALF)
def test_the_kernel_rounds_stochastically_as_the_definition_does(dtype, stream):
    """Every number of the dtype, moved by far less and far more than its last place."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for coefficient in (0.0, 1e-9, 1e-6, 1e-3, 1.0, 6e4):
        results = []
        for apply_ in (noise.apply_, plain):
            p = every.clone()
            apply_(p, KEY, [Move(0, 0, 1.0, coefficient, stream)])
            results.append(p)
        number = ~results[0].isnan()
        assert torch.equal(number, ~results[1].isnan())
        assert torch.equal(*(r[number].view(torch.int16) for r in results))
