"""The Triton kernel against the definition: interpreted, compiled for sm_90, and on a device."""

import copy
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest
import torch
from noise_checks import (
    DTYPES,
    KEY,
    LAST,
    MANY,
    WALK,
    check,
    check_both,
    check_equal,
    every_number,
    normal,
    plain,
)
from processes import SEARCHED

from mezo import noise
from mezo.noise import NEAREST, ROUND_PERTURBED, ROUND_UPDATE, Move


def test_the_interpreted_kernel_has_the_bits_of_the_definition():
    """numpy rounds every operation of float32 by itself, keeps subnormals and has IEEE's root.

    Triton's interpreter wrongly rounds float32 to bfloat16: half goes up, and a carry out of the
    significand is lost. torch's conversions take the place of that one function.
    """
    pytest.importorskip("triton")
    program = """
        import numpy as np
        import torch
        from triton.runtime import interpreter

        def convert(data, source, target, rounding):
            bits = torch.from_numpy(np.array(data))
            if str(source) == "bf16":
                return bits.view(torch.bfloat16).float().numpy()
            return bits.to(torch.bfloat16).view(torch.uint16).numpy()

        interpreter._convert_float = convert
        torch.set_num_threads(1)

        from noise_checks import (
            check_lookups,
            check_many,
            check_moves,
            check_one_copy,
            check_rounding,
            interpreted_both,
        )

        from mezo.noise import DISTRIBUTIONS

        for distribution in DISTRIBUTIONS:
            check_moves(distribution)
            check_lookups(distribution)
            check_many(distribution)
            interpreted_both(distribution)
            print(distribution, "equal")
        for dtype in (torch.bfloat16, torch.float16):
            check_rounding(dtype)
        check_one_copy()
        print("equal")
    """
    path = os.pathsep.join([SEARCHED, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    equal = [f"{name} equal" for name in noise.DISTRIBUTIONS]
    assert done.stdout.splitlines() == [*equal, "equal"], done.stderr


KINDS = [  # dtype, moves, instructions an element at most: gaussian, rademacher, gaussian16
    ("fp32", WALK[:1], (60, 14, 25)),
    ("bf16", WALK[:1], (60, 14, 25)),  # at 28 T a second, 25 are as fast as an H200's memory
    ("bf16", MANY[:1], (70, 22, 34)),
    ("fp16", MANY[:3], (400, 300, 300)),  # rounded stochastically after any move
]


QUICK = [("gaussian", 0), ("rademacher", 1), ("gaussian16", 2)]  # each one and each kind of 32, 16


@pytest.mark.parametrize(
    ("distribution", "dtype", "moves", "most"),
    [
        pytest.param(
            *(distribution, *kind),
            # by nature: Triton's compiler, ptxas and a disassembler, twice, 2 s each
            marks=[] if (distribution, place) in QUICK else pytest.mark.slow,
            id=f"{distribution}-{kind[0]}-{place}",
        )
        for distribution in noise.DISTRIBUTIONS
        for place, kind in enumerate(KINDS)
    ],
)
def test_the_compiled_kernel_rounds_where_the_contract_does(
    distribution, dtype, moves, most, monkeypatch, tmp_path
):
    """No fused, approximate or flushing instruction but for exact products; no needless draw.

    Triton 3.2 flushes the subnormal radicands of a square root: there are none, since the logarithm
    of the largest uniform number is -2^-24. Its code is up to 20 % longer.
    """
    triton = pytest.importorskip("triton")
    from benchmarks import sass

    old = triton.__version__.startswith("3.2.")
    root = "sqrt.rn.ftz.f32" if old else "sqrt.rn.f32"

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = sass.compiled(dtype, distribution, moves)
    found = Counter(re.findall(r"^\s*(?:@\S+\s+)?([a-z][\w.]*) ", kernel.asm["ptx"], re.MULTILINE))
    signs = distribution == "rademacher"
    pairs = 2 if signs and len(moves) == 1 else 1  # of rows: four rows of signs share their words
    elements = 64 * pairs  # of a thread
    assert found["fma.rn.f32"] == (2 * elements if distribution == "gaussian16" else 0)
    exact = {"fma.rn.f32", root}
    assert not [n for n in found if re.search(r"fma|mad.*\.f|approx|ftz", n) and n not in exact]
    assert not [n for n in found if re.match(r"(add|sub|mul|sqrt).*\.f", n) and ".rn." not in n]
    assert found[root] == (elements // 2 if distribution == "gaussian" else 0)
    assert found["mul.rn.f32"] >= elements
    assert found["add.rn.f32"] >= elements
    blocks = elements // {"gaussian": 4, "rademacher": 8 * pairs, "gaussian16": 8}[distribution]
    if dtype != "fp32" and moves[0].rounding != NEAREST:
        blocks += elements // 8
    products = found["mul.wide.u32"] + found["mul.hi.u32"]
    assert 0 < products <= 20 * blocks + 8  # two a round, and a few of addresses
    wide = 4 if dtype == "fp32" else 8  # elements of a thread at a time
    kernels = (
        [kernel] if dtype == "fp16" else [kernel, sass.compiled_all(dtype, distribution, moves)]
    )
    for each in kernels:
        for access in ("ld", "st"):  # wide where whole spans are aligned, whatever their number
            assert each.asm["ptx"].count(f"{access}.global.v4.b32") == elements // wide
        counted = sum(sass.instructions(each).values()) / elements
        bound = most[noise.DISTRIBUTIONS[distribution].code] + (each is not kernel)  # a search
        assert counted <= bound * (1.2 if old else 1)


def test_wide_loads_are_used_where_addresses_allow_them_and_every_element_is_taken_once():
    """A wide load at an odd address fails on the device; a part that is left out is silent."""
    pytest.importorskip("triton")
    from mezo.noise import gpu

    for dtype in DTYPES:
        size = torch.empty(0, dtype=dtype).element_size()
        for begin in (0, 1, 5, 8, 16):
            for offset in (0, 1, 5, 16, 33_000):
                for n in (1, 40, 5000, 4096):
                    x = torch.empty(begin + n, dtype=dtype)[begin:]
                    runs = gpu._runs(n, offset, x)
                    ends = [0, *(stop for _, stop, _ in runs)]
                    assert [start for start, _, _ in runs] == ends[:-1]
                    assert ends[-1] == n
                    for start, stop, wide in runs:
                        places = start + offset, stop + offset, (x.data_ptr() + start * size)
                        assert not wide or not any(place % 16 for place in places)
                    even = (x.data_ptr() + (-offset % 16) * size) % 16 == 0
                    assert any(wide for *_, wide in runs) or not even or n < 2048


def test_every_span_of_many_tensors_has_one_program():
    """Whole spans at wide addresses are launched without masks, and all others with them."""
    pytest.importorskip("triton")
    from mezo.noise import gpu

    span, size = 2048, 2
    rows = [(0, 5 * span, 0), (2, 5 * span, 0), (64, 4096, 32), (0, 7, 0), (0, 40, 2040)]
    rows += [(10, 4 * span, 5), (64, 3000, 32), (0, 2 * span + 8, 0), (0, span + 8, 2040)]
    places = np.array([(*row, 0) for row in rows], np.int64)
    seen = []
    for whole in (True, False):
        owners, known = gpu._programs(places.tobytes(), span, size, whole, torch.device("cpu"), 0)
        for program, owner in enumerate(owners.tolist()):
            address, n, offset, _, first, begin, stride = known[owner].tolist()
            at = first + (program - begin) * stride
            seen.append((owner, at))
            inside = at * span >= offset and (at + 1) * span <= offset + n
            assert not whole or (inside and (address + (at * span - offset) * size) % 16 == 0)
    spans = [
        (i, at)
        for i, (_, n, offset) in enumerate(rows)
        for at in range(offset // span, -(-(offset + n) // span))
    ]
    assert sorted(seen) == spans


def test_without_triton_plain_torch_draws(monkeypatch, caplog):
    """The same bits, and one line in the log however many tensors follow."""
    caplog.set_level("INFO", "mezo")
    monkeypatch.setitem(sys.modules, "mezo.noise.gpu", None)
    noise._kernel.cache_clear()
    noise._tell.cache_clear()
    try:
        assert noise._kernel("cuda") is None
        assert noise._kernel("cuda") is None
        assert noise._kernel("meta") is None
    finally:
        noise._kernel.cache_clear()
    line, _ = caplog.messages  # the other one is of meta
    assert line.startswith("noise is drawn by plain torch, slower: the kernel for cuda cannot be")


# What needs a device: python -m pytest -m gpu tests/test_noise_gpu.py


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 33_000, 2**42 + 5])
def test_the_kernel_on_the_device_has_the_bits_of_the_definition(distribution, dtype, offset):
    """Kernel and plain torch on the device, against the definition on the CPU."""
    assert noise._kernel("cuda") is not None
    where = {"distribution": distribution, "offset": offset}
    for moves in (WALK[:1], WALK, MANY):
        for apply_ in (noise.apply_, plain):
            check(apply_, normal(70_001, dtype=dtype), moves, "cuda", **where)
    check(noise.apply_, normal(3000, dtype=dtype), MANY * 20, "cuda", in_place=False, **where)


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [77, 3000, 4096])
def test_rows_of_an_embedding_on_the_device_have_the_bits_of_the_definition(
    distribution, dtype, width
):
    """More of them than a grid has programs along any axis but the first."""
    index = torch.arange(70_000 if width == 77 else 300).flip(0) * 7 % 50_000
    where = {"rows": index.cuda(), "distribution": distribution}
    found = normal(len(index), width, dtype=dtype).cuda()
    expected = found.clone()
    noise.apply_(found, KEY, MANY[:3], **where)
    for i in (0, 1, len(index) - 1):
        row = expected[i].cpu().clone()
        plain(row, KEY, MANY[:3], offset=int(index[i]) * width, distribution=distribution)
        check_equal(found[i].cpu(), row)
    if width > 77:
        plain(expected, KEY, MANY[:3], **where)
        check_equal(found.cpu(), expected.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", [NEAREST, ROUND_UPDATE, ROUND_PERTURBED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_device_rounds_16_bits_as_the_cpu_does(dtype, rounding):
    """Every 16-bit number in, and float32 numbers of every magnitude out."""
    every = every_number(dtype)
    for coefficient in [0.0, *(2.0**e for e in range(-40, 20)), 65_519.9, 65_520.0, 3e38]:
        for scale in (1.0, 0.7):
            move = Move(0, 0, scale, coefficient, rounding)
            check(noise.apply_, every, [move], "cuda", distribution="rademacher")


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_sixteen_million_elements_are_the_same_on_both_devices(distribution):
    """2^24 elements meet most of the 2^23 radii and angles; torch and kernel, CUDA and CPU."""
    z, size = torch.zeros(2**24), 2**20
    noise.apply_(z, KEY, [Move(3, 0, 1.0, 1.0)], distribution=distribution)
    p = torch.zeros(2**24, device="cuda")
    noise.apply_(p, KEY, [Move(3, 0, 1.0, 1.0)], distribution=distribution)
    assert torch.equal(p.cpu(), z)
    for start in range(0, 2**24, size):
        where = {"step": 3, "distribution": distribution, "device": "cuda"}
        drawn = noise.draw(KEY, start, start + size, **where)
        assert torch.equal(drawn.cpu(), z[start : start + size])


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 70_001, 2**20])
def test_both_signs_of_one_draw_on_the_device_have_the_bits_of_two(distribution, dtype, n):
    weights = normal(n, dtype=dtype)
    for rounding in (NEAREST, ROUND_PERTURBED):
        move, both = Move(*LAST, 1.0, 1e-3, rounding), torch.empty(2, n, dtype=dtype, device="cuda")
        tables = [noise.table([move._replace(coefficient=c)]) for c in (1e-3, -1e-3)]
        how = {"source": weights.cuda(), "distribution": distribution}
        noise.apply_both_(both, KEY, *tables, **how)
        check_both(both.cpu(), weights, move, distribution)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", [NEAREST, ROUND_UPDATE])
def test_a_tensor_of_more_than_2_31_elements_is_moved_to_its_end(rounding):
    n = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("needs 6 GB of free device memory")
    p, move = torch.zeros(n, dtype=torch.bfloat16, device="cuda"), Move(3, 0, 1.0, 1.0, rounding)
    noise.apply_(p, KEY, [move])
    for start, stop in ((0, 5000), (2**31 - 5000, n)):
        part = torch.zeros(stop - start, dtype=torch.bfloat16)
        plain(part, KEY, [move], offset=start)
        assert torch.equal(p[start:stop].cpu(), part)


@pytest.mark.gpu
def test_the_kernel_allocates_nothing_beside_its_moves():
    """20 bytes each, once for all tensors."""
    p, moves = torch.zeros(2**20, device="cuda"), [Move(12_345, 0, 1.0, 1e-3)]
    before = torch.cuda.memory_allocated()
    noise.apply_(p, KEY, moves)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    assert held <= before + 512  # what the allocator rounds up to
    for _ in range(3):
        noise.apply_(p, KEY, moves)
    assert torch.cuda.max_memory_allocated() == held


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_on_the_device_replays_on_the_cpu(distribution, dtype, tmp_path):
    """50 steps; the losses are the device's own, the weights they lead to are not."""
    from models import Regression, weights

    from mezo import MeZO, trajectory

    model = Regression(dtype)
    base = copy.deepcopy(model)
    model.cuda()
    model.x, model.y = model.x.cuda(), model.y.cuda()
    optimizer = MeZO(
        model.named_parameters(),
        lr=1e-2,
        weight_decay=0.1,
        num_samples=2,
        seed=6,
        distribution=distribution,
    )
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        for _ in range(50):
            optimizer.step(model)
    assert not torch.equal(weights(base), weights(model).cpu())
    trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(base), weights(model).cpu())
