"""Instructions an element of the Triton kernels, compiled for sm_90: no GPU is needed.

    python -m benchmarks.sass [--output benchmarks/results/sass.json]

The whole kernel is counted: addresses, masks, loads, random words, conversions and stores of one
program, divided by the elements that a thread reads. Nothing is assumed of the arguments; wide
loads are a constant of the kernel that a launch chooses for what lies at a multiple of 16 bytes, as
matrices do ("narrow" is the other one). ptxas and cuobjdump come with Triton.
"""

import argparse
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
ONE = [noise.Move(1, 0, 1.0, 1e-3)]
ROUNDED = [noise.Move(1, 0, 1.0, 1e-3, noise.ROUND_PERTURBED)]


def compiled(dtype: str, distribution: str, moves: list[noise.Move], wide: bool = True) -> Any:
    """Return the kernel as `apply_` launches it for a whole tensor."""
    types = {"out": f"*{dtype}", "source": f"*{dtype}", "table": "*i32", "n": "i64"}
    types |= {"offset": "i64", "key": "u64", "count": "i32"}
    return _compiled(
        gpu._kernel, types, dtype, distribution, moves, {"rows": None, "ALIGNED": wide}
    )


def compiled_all(dtype: str, distribution: str, moves: list[noise.Move], wide: bool = True) -> Any:
    """Return the kernel of many tensors; `wide` is the one of whole spans."""
    types = {"owners": "*i32", "tensors": "*i64", "table": "*i32", "count": "i32", "each": "i32"}
    constants = {"dtype": gpu._DTYPES[DTYPES[dtype]], "WHOLE": wide}
    return _compiled(gpu._kernel_all, types, dtype, distribution, moves, constants)


def compiled_both(dtype: str, distribution: str, moves: list[noise.Move]) -> Any:
    """Return the kernel that makes both signs of one draw."""
    types = {"both": f"*{dtype}", "source": f"*{dtype}", "n": "i64", "key": "u64", "table": "*i32"}
    return _compiled(gpu._kernel_both, types, dtype, distribution, moves, {"ALIGNED": True})


def _compiled(
    kernel: Any, types: dict, dtype: str, distribution: str, moves: Any, constants: dict
) -> Any:
    constants |= gpu._launch(noise.table(moves), DTYPES[dtype], distribution)
    options = {name: constants.pop(name) for name in gpu.OPTIONS}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
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


def count(kernel: Any, dtype: str, distribution: str, moves: list[noise.Move]) -> float:
    """Return the kernel's instructions an element."""
    launch = gpu._launch(noise.table(moves), DTYPES[dtype], distribution)
    elements = launch["PAIRS"] * 2048 / (32 * launch["num_warps"])
    return round(sum(instructions(kernel).values()) / elements, 1)


def counts() -> dict[str, dict[str, float]]:
    """Return the counts of one move by dtype, distribution and rounding, and by kernel."""
    found = {}
    for dtype in ("bf16", "fp32"):
        for distribution in noise.DISTRIBUTIONS:
            for moves, name in ((ONE, ""), (ROUNDED, ", rounded stochastically")):
                if dtype == "fp32" and name:
                    continue
                what = dtype, distribution, moves
                found[f"{dtype}, {distribution}{name}"] = {
                    "one tensor": count(compiled(*what), *what),
                    "many tensors": count(compiled_all(*what), *what),
                    "both signs of one draw": count(compiled_both(*what), *what),
                    "one tensor, narrow": count(compiled(*what, wide=False), *what),
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = {"target": "sm_90", "triton": triton.__version__, "instructions": counts()}
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
