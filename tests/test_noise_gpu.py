"""The Triton kernel against the definition: interpreted, compiled for sm_90, and on a device."""

import copy
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_mezo import Regression, weights

from mezo import MeZO, noise, trajectory

KEY = noise.tensor_key(7, "model.layers.0.weight")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TERMS = [(1.0, 1e-3), (1.0, -2e-3), (1.0, 1e-3), (0.999, -3.7e-5), (0.5, 1.0)]  # two launches


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

        from mezo import noise
        from mezo.noise import gpu
        from test_noise_gpu import DTYPES, KEY, TERMS

        for distribution in noise.DISTRIBUTIONS:
            for dtype in DTYPES:
                for offset, size in ((0, 1), (1, 1500), (32_000, 1025), (2**42 + 8191, 1030)):
                    generator = torch.Generator().manual_seed(offset)
                    start = (torch.randn(size, generator=generator) * 0.02).to(dtype)
                    where = {"step": 2**32 - 3, "probe": 2**24 - 1, "offset": offset}
                    where["distribution"] = distribution
                    found, expected = start.clone(), start.clone()
                    gpu.apply_(found, KEY, TERMS, **where)
                    noise.apply_(expected, KEY, TERMS, kernel=False, **where)
                    assert torch.equal(found, expected), (where, dtype)
                    assert size == 1 or not torch.equal(found, start)
        print("equal")
    """
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal\n", done.stderr


def compiled(dtype, distribution, pairs):
    """PTX instructions for sm_90, each with its count in one row of 16 elements a thread."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from mezo.noise import gpu

    types = {"p": f"*{dtype}", "n": "i64", "offset": "i64", "key": "u64"}
    types |= {"step": "u32", "probe": "u32"}
    constants = {"PAIRS": pairs, "RADEMACHER": distribution == "rademacher"}
    constants["ROWS"] = gpu._ROWS[distribution]
    names = gpu._kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in names}
    multiple = {(i,): [["tt.divisibility", 16]] for i in range(3)}  # p, n, offset: as for weights
    source = triton.compiler.ASTSource(gpu._kernel, signature, constants, multiple)
    target = GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target, options=gpu.OPTIONS).asm["ptx"]
    return Counter(re.findall(r"^\s*(?:@\S+\s+)?([a-z][\w.]*) ", ptx, re.MULTILINE))


@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("pairs", [1, 4])
def test_the_compiled_kernel_rounds_where_the_contract_does(
    distribution, dtype, pairs, monkeypatch, tmp_path
):
    """No fused, approximate or flushing instruction; a 16-bit rounding an element and pair."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = compiled(dtype, distribution, pairs)
    assert not [name for name in found if re.search(r"fma|mad.*\.f|approx|ftz", name)]
    assert not [n for n in found if re.match(r"(add|sub|mul|sqrt).*\.f", n) and ".rn." not in n]
    assert found["sqrt.rn.f32"] == (8 if distribution == "gaussian" else 0)
    assert found["mul.rn.f32"] >= 2 * 16 * pairs
    assert found["add.rn.f32"] >= 16 * pairs
    wide = "v4" if dtype == "fp32" else "v2"  # 4 elements of a thread at a time
    assert found[f"ld.global.{wide}.b32"] == found[f"st.global.{wide}.b32"] == 4
    if dtype != "fp32":
        kind = dtype.replace("fp", "f")
        one, two = found[f"cvt.rn.{kind}.f32"], found[f"cvt.rn.{kind}x2.f32"]
        assert one + 2 * two == 16 * pairs


def test_without_triton_plain_torch_draws(monkeypatch, caplog):
    """The same bits, and one line in the log however many tensors follow."""
    caplog.set_level("INFO", "mezo")
    monkeypatch.setitem(sys.modules, "mezo.noise.gpu", None)
    noise._kernel.cache_clear()
    try:
        assert noise._kernel("cuda") is None
        assert noise._kernel("cuda") is None
        assert noise._kernel("meta") is None
    finally:
        noise._kernel.cache_clear()
    (line,) = caplog.messages
    assert line.startswith("noise on cuda is drawn by plain torch: ")


# What needs a device: python -m pytest -m gpu tests/test_noise_gpu.py


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 33_000, 2**42 + 5])
def test_the_kernel_on_the_device_has_the_bits_of_the_definition(distribution, dtype, offset):
    """Kernel and plain torch on the device, against the definition on the CPU."""
    assert noise._kernel("cuda") is not None
    start = (torch.randn(70_001, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    where = {"step": 2**32 - 3, "probe": 2**24 - 1, "distribution": distribution, "offset": offset}
    expected = start.clone()
    noise.apply_(expected, KEY, TERMS, kernel=False, **where)
    for kernel in (True, False):
        p = start.cuda()
        noise.apply_(p, KEY, TERMS, kernel=kernel, **where)
        assert torch.equal(p.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_device_rounds_16_bits_as_the_cpu_does(dtype):
    """Every 16-bit number in, and float32 numbers of every magnitude out."""
    every = torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(dtype)
    for coefficient in [0.0, *(2.0**e for e in range(-30, 20)), 65_519.9, 65_520.0]:
        found, expected = every.cuda(), every.clone()
        for p in (found, expected):
            noise.apply_(p, KEY, [(1.0, coefficient)], step=0, distribution="rademacher")
        found, good = found.cpu(), ~expected.isnan()
        assert torch.equal(found.isnan(), ~good)
        assert torch.equal(*(p[good].view(torch.uint16).int() for p in (found, expected)))


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
def test_sixteen_million_elements_are_the_same_on_both_devices(distribution):
    """2^24 elements meet most of the 2^23 radii and angles; torch and kernel, CUDA and CPU."""
    z, size = torch.zeros(2**24), 2**20
    noise.apply_(z, KEY, [(1.0, 1.0)], step=3, distribution=distribution)
    p = torch.zeros(2**24, device="cuda")
    noise.apply_(p, KEY, [(1.0, 1.0)], step=3, distribution=distribution)
    assert torch.equal(p.cpu(), z)
    for start in range(0, 2**24, size):
        where = {"step": 3, "distribution": distribution, "device": "cuda"}
        drawn = noise.draw(KEY, start, start + size, **where)
        assert torch.equal(drawn.cpu(), z[start : start + size])


@pytest.mark.gpu
def test_a_tensor_of_more_than_2_31_elements_is_moved_to_its_end():
    n = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("needs 6 GB of free device memory")
    p = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    noise.apply_(p, KEY, [(1.0, 1.0)], step=3)
    for start, stop in ((0, 5000), (2**31 - 5000, n)):
        assert torch.equal(p[start:stop].cpu(), noise.draw(KEY, start, stop, step=3).bfloat16())


@pytest.mark.gpu
def test_the_kernel_allocates_nothing():
    p = torch.zeros(2**20, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    noise.apply_(p, KEY, TERMS, step=0)
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", noise.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_on_the_device_replays_on_the_cpu(distribution, dtype, tmp_path):
    """50 steps; the losses are the device's own, the weights they lead to are not."""
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
        in_place=dtype == torch.bfloat16,
    )
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        for _ in range(50):
            optimizer.step(model)
    assert not torch.equal(weights(base), weights(model).cpu())
    trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(base), weights(model).cpu())
