"""Instructions an element of the Triton kernels, compiled for sm_90: no GPU is needed.

    python -m benchmarks.sass

The whole kernel is counted: addresses, masks, loads, random words, conversions and stores of one
program, divided by the elements that a thread moves. Pointers and lengths are multiples of 16, as
those of a model's matrices are. ptxas and cuobjdump come with Triton.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from mezo import noise
from mezo.noise import gpu

TARGET = GPUTarget("cuda", 90, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TYPES = {"table": "*i32", "n": "i64", "offset": "i64", "key": "u64", "count": "i32"}
ONE = [noise.Move(1, 0, 1.0, 1e-3)]
ROUNDED = [noise.Move(1, 0, 1.0, 1e-3, noise.ROUND_PERTURBED)]


def compiled(dtype: str, distribution: str, moves: list[noise.Move]) -> Any:
    """The kernel as `apply_` launches it for a whole tensor."""
    launch = gpu._launch(noise.table(moves), DTYPES[dtype], distribution)
    options = {name: launch.pop(name) for name in gpu.OPTIONS}
    constants = launch | {"rows": None}
    names = gpu._kernel.arg_names
    types = _TYPES | {"out": f"*{dtype}", "source": f"*{dtype}"}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    even = [names.index(n) for n in ("out", "source", "n", "offset")]
    source = triton.compiler.ASTSource(gpu._kernel, signature, constants, _multiples(even))
    return triton.compile(source, target=TARGET, options=options)


def _multiples(arguments: list[int]) -> Any:
    """What says that these arguments are multiples of 16; an object in triton 3.2."""
    former = getattr(triton.backends.compiler, "AttrsDescriptor", None)
    if former is not None:
        return former.from_hints(dict.fromkeys(arguments, 16))
    return {(i,): [["tt.divisibility", 16]] for i in arguments}


def compiled_all(dtype: str, distribution: str, moves: list[noise.Move]) -> Any:
    """The kernel of many tensors, whose addresses are multiples of 16."""
    launch = gpu._launch(noise.table(moves), DTYPES[dtype], distribution)
    options = {name: launch.pop(name) for name in gpu.OPTIONS}
    constants = launch | {"dtype": gpu._DTYPES[DTYPES[dtype]], "ALIGNED": True}
    types = {"owners": "*i32", "tensors": "*i64", "table": "*i32", "count": "i32", "each": "i32"}
    names = gpu._kernel_all.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    source = triton.compiler.ASTSource(gpu._kernel_all, signature, constants)
    return triton.compile(source, target=TARGET, options=options)


def instructions(kernel) -> Counter:
    """The device's instructions by name, each with its count; without the padding at the end."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.check_output([tool, "--dump-sass", file.name], text=True)
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)")
    return Counter(name for name in line.findall(told) if not name.startswith("NOP"))


def count(dtype: str, distribution: str, moves: list[noise.Move]) -> float:
    """Instructions an element."""
    launch = gpu._launch(noise.table(moves), DTYPES[dtype], distribution)
    elements = launch["PAIRS"] * 2048 / (32 * launch["num_warps"])
    return sum(instructions(compiled(dtype, distribution, moves)).values()) / elements


def counts() -> dict[str, float]:
    """By dtype, distribution and rounding; one move."""
    found = {}
    for dtype in ("bf16", "fp32"):
        for distribution in noise.DISTRIBUTIONS:
            found[f"{dtype}, {distribution}"] = count(dtype, distribution, ONE)
            if dtype != "fp32":
                name = f"{dtype}, {distribution}, rounded stochastically"
                found[name] = count(dtype, distribution, ROUNDED)
    return {name: round(value, 1) for name, value in found.items()}


if __name__ == "__main__":
    print(json.dumps(counts(), indent=1))
