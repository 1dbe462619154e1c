"""One pass of noise over a tensor: p <- p + c z, in GB/s and elements/s.

    python -m benchmarks.noise --output noise.json [--device cuda] [--elements N] [--repeats N]

Beside the kernel (numba or Triton) and plain torch, for both distributions: `reference`, the
published code's arithmetic (torch.normal, then p = p + s * z * eps), and `add`, p += c, the least
that a pass can move. Methods take turns in one process; a figure is the median of its turns, a
ratio the median over turns of the ratio within a turn. GB/s count one read and one write of p.
"16 steps fused" is a replay: 16 directions in one pass; elements/s count each of them; "in cache"
is as many draws onto one small float32 tensor, the limit of a replay.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from mezo import noise

EPS = 1e-3
FUSED = 16  # steps of a replay in one pass over the tensor
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def methods(p: torch.Tensor) -> dict[str, Callable[[], object]]:
    key = noise.tensor_key(0, "w")

    def reference():
        z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
        p.data = p.data + 1 * z * EPS

    def drawn(distribution: str, kernel: bool):
        moves = noise.table([noise.Move(1, 0, 1.0, EPS)])

        def draw():
            with nullcontext() if kernel else patch.object(noise, "_kernel", lambda device: None):
                noise.apply_(p, key, moves, distribution=distribution)

        return draw

    found: dict[str, Callable[[], object]] = {"add": lambda: p.add_(EPS), "reference": reference}
    for distribution in noise.DISTRIBUTIONS:
        if noise._kernel(p.device.type) is not None:
            found[f"{distribution}, kernel"] = drawn(distribution, True)
        found[f"{distribution}, torch"] = drawn(distribution, False)
    replayed = [noise.Move(step, 0, 1.0, EPS * (-1) ** step) for step in range(FUSED)]
    table = noise.table(replayed)
    cached = torch.zeros(2**15 if p.device.type == "cpu" else 2**24, device=p.device)
    passes = max(1, p.numel() // cached.numel())
    long = noise.table([noise.Move(step, 0, 1.0, EPS) for step in range(passes * FUSED)])
    for distribution in noise.DISTRIBUTIONS:
        name = f"{distribution}, {FUSED} steps fused"
        found[name] = lambda d=distribution: noise.apply_(p, key, table, distribution=d)
        name = f"{distribution}, {FUSED} draws in cache"
        found[name] = lambda d=distribution: noise.apply_(cached, key, long, distribution=d)
    return found


def seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(dtype: str, elements: int, repeats: int, device: str) -> list[dict]:
    p = torch.full((elements,), 0.02, dtype=DTYPES[dtype], device=device)
    calls = methods(p)
    for call in calls.values():  # compiles, and takes the memory
        call()
    turns = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(repeats)]
    rows = []
    for name in calls:
        median = statistics.median(turn[name] for turn in turns)
        passes = FUSED if name.endswith(("fused", "in cache")) else 1
        row = {"dtype": dtype, "method": name, "seconds": median, "seconds_a_step": median / passes}
        row["gb_per_s"] = 2 * p.element_size() * elements / median / 1e9
        row["elements_per_s"] = passes * elements / median
        row["times_reference"] = statistics.median(t["reference"] / t[name] for t in turns)
        row["of_add"] = statistics.median(t["add"] / t[name] for t in turns)
        rows.append(row)
    return rows


def version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return str(importlib.import_module(package).__version__)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description="Noise, one pass, against the reference.")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--elements", type=int, help="default: 2^28 on CUDA, 2^24 on a CPU")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    elements = args.elements or (2**28 if args.device == "cuda" else 2**24)
    result = {"device": device_name(args.device), "elements": elements, "repeats": args.repeats}
    result |= {name: version(name) for name in ("torch", "numba", "triton")}
    result["rows"] = []
    if importlib.util.find_spec("triton"):
        from benchmarks import sass

        result["sass_instructions_an_element"] = sass.counts()
    print(f"{result['device']}, {elements:,} elements, median of {args.repeats}")
    for dtype in args.dtype:
        for row in measure(dtype, elements, args.repeats, args.device):
            result["rows"].append(row)
            print(
                f"{dtype:9} {row['method']:27} {1e3 * row['seconds']:9.2f} ms "
                f"{row['gb_per_s']:8.1f} GB/s {row['elements_per_s'] / 1e9:8.3f} G elements/s "
                f"{row['times_reference']:6.1f} x reference {row['of_add']:5.2f} of add",
                flush=True,
            )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
