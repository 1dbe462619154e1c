"""The noise contract: known answers, twins, bits, moments."""

import hashlib
import math
import signal

import numpy as np
import pytest
import reference
import torch
from noise_checks import plain

from mezo import noise
from mezo.errors import InputError
from mezo.forms.rounding import update_
from mezo.interrupts import held
from mezo.noise import Move, definition

DISTRIBUTIONS = noise.DISTRIBUTIONS
KEY = noise.tensor_key(7, "model.layers.0.weight")
MOVES = [  # two directions and every rounding
    Move(9, 2, 1.0, 1e-3, noise.KEEP),
    Move(9, 2, 1.0, -2e-3),
    Move(9, 1, 0.999, -3.7e-5, noise.ROUND_PERTURBED),
    Move(4, 1, 1.0, 1e-3, noise.KEEP),
    Move(4, 1, 1.0, 2e-6, noise.ROUND_UPDATE),
]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's kat_vectors, philox4x32 10
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    found = definition.philox([torch.tensor([c]) for c in counter], tuple(key))
    assert " ".join(f"{int(word):08x}" for word in found) == words


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_elements_follow_the_specification(distribution):
    """An element-wise twin in Python integers and doubles; float32 arithmetic is within 2e-6."""
    z = noise.draw(KEY, 0, 70_000, step=5, probe=3, distribution=distribution)
    for i in [*range(0, 70_000, 997), 255, 256, 1023, 1024, 32767, 32768]:
        twin = reference.element(7, "model.layers.0.weight", 5, 3, i, distribution)
        assert abs(float(z[i]) - twin) <= (0 if distribution == "rademacher" else 2e-6)


def test_first_numbers_are_frozen():
    """Frozen for good: every run log depends on these bits."""
    z = noise.draw(noise.tensor_key(0, "w"), 0, 4, step=0)
    assert [float(v).hex() for v in z] == FROZEN_GAUSSIAN
    signs = noise.draw(noise.tensor_key(0, "w"), 0, 16, step=0, distribution="rademacher")
    assert "".join("+" if s > 0 else "-" for s in signs) == FROZEN_SIGNS
    z = noise.draw(noise.tensor_key(0, "w"), 0, 1026, step=0, distribution="gaussian16")
    assert [float(v).hex() for v in (*z[:4], *z[1024:])] == FROZEN_GAUSSIAN16


def test_every_number_of_16_bits_is_frozen():
    """All 2^16 numbers that a half word makes, and what they are by construction."""
    z = definition._from_16_bits(torch.arange(2**16))
    digest = hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "fc7420b745d1e0e511cf4f4a281cd2c1e6dfeb89f4c8347274d6b1846c659c7d"
    assert torch.equal(z, -z.flip(0))  # the complement of a word is the opposite number
    for power, moment in ((2, 1), (4, 3), (6, 15)):
        assert abs(float((z.double() ** power).mean()) / moment - 1) < 3e-8
    assert 103.7 < float((z.double() ** 8).mean()) < 105  # a normal's
    values, counts = z.unique(return_counts=True)
    assert len(values) == 749
    below = (counts.cumsum(0) - counts) / 2**16  # the distribution function on both sides of a jump
    normal = 0.5 * torch.erfc(-values.double() / math.sqrt(2))
    worst = max((below - normal).abs().max(), (below + counts / 2**16 - normal).abs().max())
    assert 0.0018 < worst < 0.0020


FROZEN_GAUSSIAN = [
    "0x1.07cc540000000p+1",
    "0x1.57bfd40000000p-1",
    "-0x1.8906b60000000p-1",
    "-0x1.938b0a0000000p+1",
]
FROZEN_GAUSSIAN16 = [
    "0x1.5d6d280000000p-2",
    "0x1.d01ed60000000p-5",
    "0x1.d0e6280000000p-3",
    "0x1.9633460000000p-4",
    "-0x1.4ec34a0000000p-2",
    "0x1.bd98440000000p+0",
]
FROZEN_SIGNS = "+++-++++-+---+--"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "span", [(0, 1), (5, 1024), (1000, 40_000), (32_767, 32_769), (66_000, 66_001)]
)
def test_any_range_is_a_slice_of_the_whole(distribution, span):
    whole = noise.draw(KEY, 0, 70_000, step=2, distribution=distribution)
    part = noise.draw(KEY, *span, step=2, distribution=distribution)
    assert torch.equal(part, whole[span[0] : span[1]])


def test_far_elements_use_the_high_counter_word():
    """Element 2^42 lies in block 2^40, beyond 32 bits."""
    z = noise.draw(KEY, 2**42, 2**42 + 1, step=1)
    twin = reference.element(7, "model.layers.0.weight", 1, 0, 2**42, "gaussian")
    assert abs(float(z) - twin) < 2e-6


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1, 33_000])
def test_the_kernel_has_the_bits_of_the_definition(distribution, dtype, offset):
    start = (torch.randn(70_001, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    results = []
    for apply_ in (noise.apply_, plain):
        p = start.clone()
        apply_(p, KEY, MOVES, distribution=distribution, offset=offset)
        results.append(p)
    assert torch.equal(*results)
    assert not torch.equal(results[0], start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_rounds_16_bits_as_torch_does(dtype):
    """Every 16-bit number in, and float32 numbers of every magnitude out."""
    every = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(dtype)
    wide = [math.ldexp(1.0, e) for e in range(-30, 20)]
    for coefficient in [0.0, *wide, 65_519.9, 65_520.0]:
        results = []
        for apply_ in (noise.apply_, plain):
            p = every.clone()
            move = Move(0, 0, 1.0, coefficient)
            apply_(p, KEY, [move], distribution="rademacher")
            results.append(p)
        assert torch.equal(results[0].isnan(), results[1].isnan())
        good = ~results[0].isnan()
        assert torch.equal(*(r[good].view(torch.uint16).int() for r in results))


def test_strides_do_not_matter():
    p = torch.zeros(300, 701)
    q = torch.zeros(701, 300).t()
    for tensor in (p, q):
        noise.apply_(tensor, KEY, [Move(0, 0, 1.0, 1.0)])
    assert torch.equal(p, q)
    assert torch.equal(p.view(-1), noise.draw(KEY, 0, p.numel(), step=0))


def test_the_number_of_threads_does_not_matter():
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            p = torch.zeros(300_000)
            noise.apply_(p, KEY, [Move(0, 0, 1.0, 1.0)])
            results.append(p)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_float64_tensors_are_moved_in_float64():
    p = torch.zeros(1000, dtype=torch.float64)
    noise.apply_(p, KEY, [Move(0, 0, 1.0, 0.1)])
    assert torch.equal(p, noise.draw(KEY, 0, 1000, step=0).double() * 0.1)


def test_scalars_and_empty_tensors_work():
    p = torch.zeros(())
    noise.apply_(p, KEY, [Move(0, 0, 1.0, 1.0)])
    assert p == noise.draw(KEY, 0, 1, step=0)[0]
    noise.apply_(torch.zeros(0), KEY, [Move(0, 0, 1.0, 1.0)])
    noise.apply_(torch.zeros(0, 3).t(), KEY, [Move(0, 0, 1.0, 1.0)])


def test_gaussian_moments_tails_and_shape():
    """n = 4 M: mean, variance, skewness, kurtosis, tails inside 5 sigma; Kolmogorov-Smirnov."""
    n = 2**22
    z = noise.draw(KEY, 0, n, step=11).double().numpy()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) < 5 * math.sqrt(variance / n)
    for bound in (1, 2, 3, 4):
        tail = math.erfc(bound / math.sqrt(2))
        assert abs((abs(z) > bound).mean() - tail) < 5 * math.sqrt(tail / n)
    assert abs(z).max() < 5.8  # sqrt(-2 ln 2^-24)
    distance = abs(
        np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in np.sort(z)[:: n // 4096]])
        - np.arange(0, n, n // 4096) / n
    ).max()
    assert distance < 2.5 / math.sqrt(n)  # P < 1e-5 under the hypothesis


def test_gaussian16_moments_and_tails():
    """n = 4 M draws have the distribution of the 2^16 numbers: within 5 sigma of its moments."""
    n = 2**22
    z = noise.draw(KEY, 0, n, step=11, distribution="gaussian16").double()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 94.8)):
        assert abs(float((z**power).mean()) - expected) < 5 * math.sqrt(variance / n)
    every = definition._from_16_bits(torch.arange(2**16))
    for bound in (1, 2, 3, 3.8):
        tail = float((every.abs() > bound).double().mean())
        assert abs(float((z.abs() > bound).double().mean()) - tail) < 5 * math.sqrt(tail / n)
        assert abs(tail / math.erfc(bound / math.sqrt(2)) - 1) < 0.16  # a normal's
    assert z.abs().max() == every.max()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_directions_are_uncorrelated(distribution):
    """Steps, probes, seeds, names and shifts: every pair inside 5 sigma of 0."""
    n = 2**18

    def z(seed=1, name="a", step=0, probe=0, start=0):
        key = noise.tensor_key(seed, name)
        where = {"step": step, "probe": probe, "distribution": distribution}
        return noise.draw(key, start, start + n, **where).double()

    others = [
        z(seed=2),
        z(name="b"),
        z(step=1),
        z(probe=1),
        z(start=1),
        z(start=256),
        z(start=1024),
    ]
    for other in [*others, z(step=2**32 - 1), z(probe=2**24 - 1)]:
        assert abs(float((z() * other).mean())) < 5 / math.sqrt(n)


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        ("module.layers.0.weight", "layers.0.weight"),
        ("_orig_mod.layers.0.weight", "layers.0.weight"),
        ("module._orig_mod.layers._fsdp_wrapped_module.0.weight", "layers.0.weight"),
        ("layers.module.weight", "layers.module.weight"),
    ],
)
def test_wrappers_do_not_rename_a_parameter(wrapped, name):
    assert noise.canonical_name(wrapped) == name


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(InputError, match=r"seed must be in \[0, 2\^64\), got -1"):
        noise.tensor_key(-1, "w")


def test_drawing_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    noise.apply_(torch.zeros(5000), KEY, [Move(0, 0, 1.0, 1.0)])
    assert torch.equal(before, torch.get_rng_state())


def test_falling_back_to_plain_torch_is_told_once(caplog):
    """float64, strides, a device without a kernel: a line each; the bits are the definition's."""
    noise._tell.cache_clear()
    caplog.set_level("INFO", "mezo")
    moves, key = [noise.Move(0, 0, 1.0, 1.0)], (1, 2)
    for _ in range(2):
        noise.apply_(torch.zeros(4, dtype=torch.float64), key, moves)
        noise.apply_(torch.zeros(4, 4)[:, ::2], key, moves)
        noise.apply_(torch.zeros(4, device="meta"), key, []) or noise._kernel("meta")
    found = [record.message.split("slower: ")[1] for record in caplog.records]
    assert found == [
        "the kernel takes no float64 tensor",
        "the kernel takes no float32 tensor that is not contiguous",
        "there is no kernel for meta",
    ]


@pytest.mark.parametrize("rounding", [None, "compensated"])
def test_an_interrupt_within_a_tensor_comes_when_it_is_whole(rounding, monkeypatch):
    """Ctrl-C in any piece that plain torch moves: all pieces are moved once, then it is raised."""
    dtype = torch.float64 if rounding is None else torch.bfloat16
    before = torch.linspace(-1, 1, 150_000, dtype=torch.float64).to(dtype)
    moves, original = [Move(0, 0, 0.9, 1e-2), Move(1, 0, 1.0, 1e-2)], noise.draw

    def moved(tensor):
        state = {}
        if rounding is None:
            noise.apply_(tensor, KEY, moves)
        else:
            update_(tensor, KEY, moves, rounding, "gaussian", state)
        return state

    expected = before.clone()
    kept = moved(expected)
    monkeypatch.setattr(noise, "_kernel", lambda device: None)
    for fails_at in range(1, 7):
        found, calls = before.clone(), []

        def draw(*args, calls=calls, fails_at=fails_at, **kwargs):
            calls.append(1)
            if len(calls) == fails_at:
                signal.raise_signal(signal.SIGINT)
            return original(*args, **kwargs)

        monkeypatch.setattr(noise, "draw", draw)
        with pytest.raises(KeyboardInterrupt), held():
            moved(found)
        monkeypatch.setattr(noise, "draw", original)
        assert torch.equal(found, expected)
    assert len(calls) == 6
    assert rounding is None or kept["compensation"].any()
