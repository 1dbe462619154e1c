"""Peak memory of a step above plain inference, each method in a process of its own.

    python -m benchmarks.memory --shape 125m --size 16x50 --output memory.json [--device cuda]

`inference` is two forward passes with all logits; every other figure is above its peak, in MiB and
as a share of the weights. On a CPU resident pages are counted, good to 10 or 20 MiB; glibc is told
to give back at once what is freed, or the holes that it keeps would count too (100 to 200 MiB).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from mezo import noise
from mezo.memory.measured import PeakMemory
from mezo.runs.result import environment

from .step import SHAPES, build, methods

CHILD = "--child"
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def measure(shape: str, batch: int, tokens: int, device: str, dtype: str, method: str) -> dict:
    """In this process: the peak of three steps above that of three times two forward passes."""
    torch.manual_seed(0)
    model = build(shape).to(device, getattr(torch, dtype))
    calls = methods(model, batch, tokens)
    for p in model.parameters():
        p.detach().sum()
    for distribution in noise.DISTRIBUTIONS:  # kernels are compiled, thread pools started
        small = torch.zeros(2**18, device=device, dtype=model.dtype)
        noise.apply_(small, (0, 0), [noise.Move(0, 0, 1.0, 1.0)], distribution=distribution)

    def run(name: str) -> int:
        with torch.no_grad(), PeakMemory() as peak:
            for _ in range(3):
                calls[name]()
        return peak.bytes

    run("forwards")
    inference = run("forwards")
    above = run(method) - inference
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"method": method, "inference": inference, "above": above, "weights": weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--size", default="16x50", help="batch x tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--output", type=Path)
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch, tokens = map(int, args.size.split("x"))
    if args.child:
        found = measure(args.shape, batch, tokens, args.device, args.dtype, args.methods[0])
        print(json.dumps(found))
        return
    names = args.methods or [n for n in methods(build("tiny"), 2, 4) if n != "forwards"]
    rows = []
    print(f"OPT-{args.shape}, {args.dtype}, {args.size} tokens, {args.device}")
    for name in names:
        command = [sys.executable, "-m", "benchmarks.memory", CHILD, "--methods", name]
        command += ["--shape", args.shape, "--size", args.size]
        command += ["--device", args.device, "--dtype", args.dtype]
        told = subprocess.check_output(command, text=True, env=os.environ | GIVE_BACK)
        rows.append(json.loads(told.splitlines()[-1]))
        above, weights = rows[-1]["above"], rows[-1]["weights"]
        print(f"  {name:40} {above / 2**20:8.0f} MiB {100 * above / weights:7.1f} %", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"shape": args.shape, "size": args.size, "dtype": args.dtype, "rows": rows}
        args.output.write_text(json.dumps(result | {"environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
