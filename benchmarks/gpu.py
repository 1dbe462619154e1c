"""Everything that awaits a GPU, in order of worth, within the seconds given.

    python -m benchmarks.gpu --budget 240 [--only noise floors] [--output gpu.json]

Models are made at random on the device. What is measured is printed as it comes, and the JSON is
written after each section with the device's name, so that a run that is cut off leaves what it has.
A section begins only while there is time left; one that fails says why, and the next one follows.
--dry takes tiny models on the CPU: it shows that every section runs, and its figures mean nothing.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks import noise as noise_benchmark
from benchmarks import step, together
from mezo import MeZO, noise, trajectory
from mezo.runs.result import environment


@dataclass
class Plan:
    """Where it runs, how large things are, and when it has to end."""

    device: str = "cuda"
    dtype: str = "bfloat16"
    small: str = "1.3b"
    large: str = "13b"
    small_sizes: tuple[tuple[int, int], ...] = ((1, 300), (16, 50), (16, 300))
    large_sizes: tuple[tuple[int, int], ...] = ((1, 300), (16, 300))
    elements: int = 2**28
    repeats: int = 5
    budget: float = 240.0
    began: float = field(default_factory=time.perf_counter)

    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.began)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.began:6.1f}] {text}", flush=True)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def model(self, shape: str):
        return step.build(shape, self.device, getattr(torch, self.dtype))

    def timed(self, call: Callable[[], object]) -> float:
        """Milliseconds, the median of some calls after two that do not count."""
        taken = []
        for turn in range(self.repeats + 2):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            if turn >= 2:
                taken.append(1e3 * (time.perf_counter() - began))
        return statistics.median(taken)


FULL = tuple(f"full rank, one pass, {name}" for name in ("gaussian16", "rademacher"))
STEPS = [
    "forwards, labelled logits",
    "reference",
    "scratch, gaussian",
    "scratch, gaussian16",
    *FULL,
]
STEPS += ["low rank, one pass", "forwards, graphs", "scratch, gaussian16, graphs"]
STEPS += ["low rank, one pass, graphs", *(f"{name}, graphs" for name in FULL)]

DRY = {"device": "cpu", "small": "tiny", "large": "tiny", "elements": 2**14, "repeats": 1}
DRY |= {"small_sizes": ((1, 9), (2, 5)), "large_sizes": ((2, 9),), "budget": 600.0}


def tests(plan: Plan) -> dict:
    """The tests that need a device; in a dry run they are only collected."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    command += ["--collect-only"] if plan.device == "cpu" else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(30.0, plan.left()))
    last = done.stdout.strip().splitlines()[-1:] or done.stderr.splitlines()[-1:]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    for line in (*failed, *last):
        plan.say(line)
    return {"exit": done.returncode, "summary": last, "failed": failed}


def kernels(plan: Plan) -> dict:
    """Noise of every distribution and rounding against copy and add, for one to four warps."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.full((plan.elements,), 0.02, dtype=dtype, device=plan.device)
        other, key, name = torch.empty_like(p), noise.tensor_key(0, "w"), str(dtype)[6:]
        calls = {"copy": partial(other.copy_, p), "add": partial(p.add_, 1e-9)}
        rows = {label: plan.timed(call) for label, call in calls.items()}
        for distribution in noise.DISTRIBUTIONS:
            for rounding in (noise.NEAREST, noise.ROUND_PERTURBED):
                if dtype == torch.float32 and rounding == noise.ROUND_PERTURBED:
                    continue
                moves = noise.table([noise.Move(1, 0, 1.0, 1e-3, rounding)])
                draws = partial(noise.apply_, p, key, moves, distribution=distribution)
                for warps in (1, 2, 4) if plan.device == "cuda" else (1,):
                    _warps(plan, warps)
                    label = f"{distribution}, rounding {rounding}, warps {warps}"
                    rows[label] = plan.timed(draws)
                _warps(plan, 1)
        for label, ms in rows.items():
            rate = plan.elements / ms / 1e6
            plan.say(f"{name:9} {label:36} {ms:8.3f} ms {rate:8.1f} G elements/s")
        found[name] = rows
    return found


def _warps(plan: Plan, number: int) -> None:
    if plan.device == "cuda":
        from mezo.noise import gpu

        gpu.OPTIONS["num_warps"] = number


def all_at_once(plan: Plan) -> dict:
    """A walk over all tensors of the small model: one launch, or one a tensor."""
    model = plan.model(plan.small)
    rows = [(n, p, noise.tensor_key(0, n)) for n, p in model.named_parameters()]
    moves = noise.table([noise.Move(1, 0, 1.0, 1e-9)])

    def singly() -> None:
        for _, p, key in rows:
            noise.apply_(p, key, moves, distribution="gaussian16")

    found = {
        "one launch": plan.timed(lambda: noise.apply_all_(rows, moves, distribution="gaussian16")),
        "one a tensor": plan.timed(singly),
        "tensors": len(rows),
    }
    plan.say(f"{plan.small}: {found}")
    return found


def floors(plan: Plan, shape: str, sizes) -> dict:
    """Two forward passes: eager, stacked into one, and as replays of a CUDA graph."""
    model, found = plan.model(shape), {}
    for batch, tokens in sizes:
        ids = torch.randint(5, model.config.vocab_size, (batch, tokens), device=plan.device)
        doubled = torch.cat([ids, ids])

        def forward(i: torch.Tensor) -> torch.Tensor:
            return model(input_ids=i, use_cache=False, logits_to_keep=1).logits.float().mean()

        with torch.no_grad():
            row = {
                "eager": plan.timed(lambda i=ids, f=forward: (f(i), f(i))),
                "stacked": plan.timed(lambda i=doubled, f=forward: f(i)),
                "graphs": _graphs(plan, lambda i=ids, f=forward: f(i)),
            }
        plan.say(f"{shape} {batch}x{tokens}, two forward passes, ms: {row}")
        found[f"{batch}x{tokens}"] = row
    return found


def _graphs(plan: Plan, forward: Callable[[], object]) -> float | None:
    if plan.device != "cuda":
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            forward()
    except RuntimeError as error:  # the model waits for the device somewhere
        plan.say(f"not captured: {str(error).splitlines()[0]}")
        return None
    return plan.timed(lambda: (graph.replay(), graph.replay()))


def steps(plan: Plan, shape: str, sizes) -> list[dict]:
    found = []
    for batch, tokens in sizes:
        only = STEPS if plan.device == "cuda" else []
        row = step.measure(shape, batch, tokens, plan.repeats, plan.device, plan.dtype, only)
        plan.say(f"{shape} {batch}x{tokens}")
        for name, value in row["methods"].items():
            took, ratio = 1e3 * value["seconds"], value["of_two_forwards"]
            plan.say(f"    {name:36} {took:9.2f} ms {ratio:7.3f} of two forward passes")
        found.append(row)
        _free(plan)
    return found


def memory(plan: Plan, shape: str, size: tuple[int, int]) -> dict:
    """The peak of each method, in bytes above that of two forward passes."""
    if plan.device != "cuda":  # the allocator's counters are CUDA's
        return {}
    model = plan.model(shape)
    calls, peaks = step.methods(model, *size), {}
    with torch.no_grad():
        for name, call in calls.items():
            call()
            _free(plan)
            torch.cuda.reset_peak_memory_stats()
            call()
            peaks[name] = torch.cuda.max_memory_allocated()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for name, peak in peaks.items():
        share = (peak - peaks["forwards"]) / weights
        plan.say(f"{shape} {size[0]}x{size[1]} {name:36} {100 * share:6.2f} % of the weights")
    return {"weights": weights, "peaks": peaks}


def profile(plan: Plan, shape: str, size: tuple[int, int]) -> dict:
    """How long the device is busy in one step, and with what."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    model = plan.model(shape)
    calls, found = step.methods(model, *size), {}
    kind = ProfilerActivity.CUDA if plan.device == "cuda" else ProfilerActivity.CPU
    for name in (
        "forwards",
        "scratch, gaussian",
        "scratch, gaussian16",
        *FULL,
        "low rank, one pass",
    ):
        with torch.no_grad():
            wall = plan.timed(calls[name])
            with profiler(activities=[kind]) as seen:
                calls[name]()
                plan.wait()
        events = [
            (
                e.device_time_total if plan.device == "cuda" else e.self_cpu_time_total,
                e.count,
                e.key,
            )
            for e in seen.key_averages()
            if plan.device == "cpu" or e.device_type == torch.autograd.DeviceType.CUDA
        ]
        events.sort(reverse=True)
        busy = sum(event[0] for event in events) / 1e3
        plan.say(f"{shape} {size[0]}x{size[1]} {name}: {wall:.2f} ms, device busy {busy:.2f} ms")
        for took, count, key in events[:6]:
            plan.say(f"    {took / 1e3:9.3f} ms x {count:5} {key[:70]}")
        found[name] = {"wall_ms": wall, "busy_ms": busy, "kernels": events[:20]}
    return found


def offload(plan: Plan) -> dict:
    """benchmarks.offload in a process of its own."""
    shape, (batch, tokens) = plan.large, plan.large_sizes[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "offload.json"
        command = [sys.executable, "-m", "benchmarks.offload", "--shape", shape, "--steps", "2"]
        command += ["--size", f"{batch}x{tokens}", "--device", plan.device, "--output", str(path)]
        limit = max(30.0, plan.left())
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        plan.say(done.stdout.strip() or done.stderr.strip()[-300:])
        return json.loads(path.read_text()) if path.exists() else {"exit": done.returncode}


def replay(plan: Plan) -> dict:
    """A run on the device, replayed on the host: equal bits for each distribution."""
    found = {}
    for distribution in noise.DISTRIBUTIONS:
        model = step.build("tiny", "cpu", torch.bfloat16)
        base = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.to(plan.device)
        ids = torch.randint(5, model.config.vocab_size, (2, 9), device=plan.device)
        options = {"lr": 1e-3, "eps": 1e-3, "seed": 5, "distribution": distribution}
        optimizer = MeZO(model.named_parameters(), **options)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.mezo"
            with trajectory.record(optimizer, path, model=model):
                for _ in range(5):
                    optimizer.step(lambda m=model, i=ids: m(input_ids=i, labels=i).loss)
            host = step.build("tiny", "cpu", torch.bfloat16)
            with torch.no_grad():
                for name, p in host.named_parameters():
                    p.copy_(base[name])
            trajectory.replay(path, host)
        there = dict(model.named_parameters())
        pairs = [(p, there[n].cpu()) for n, p in host.named_parameters()]
        found[distribution] = all(torch.equal(a, b) for a, b in pairs)
        plan.say(f"replay of {distribution} on the host has equal bits: {found[distribution]}")
    return found


def engine(plan: Plan) -> dict:
    """A step whose weights are in vLLM, in a process of its own, beside the step with graphs."""
    batch, tokens = plan.small_sizes[min(1, len(plan.small_sizes) - 1)]
    command = [sys.executable, "-m", "benchmarks.engine", "--shape", plan.small]
    command += ["--size", f"{batch}x{tokens}", "--dtype", plan.dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(60.0, plan.left()))
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    name = "scratch, gaussian16" + (", graphs" if plan.device == "cuda" else "")
    sizes = (plan.small, batch, tokens, plan.repeats, plan.device, plan.dtype)
    found["seconds_of_a_step_here"] = step.measure(*sizes, [name])["methods"][name]["seconds"]
    plan.say(
        f"vLLM: {100 * found['share']:.1f} % of a step is scoring (the aim is 85 %); a step takes "
        f"{1e3 * found['seconds_of_a_step']:.2f} ms, and {name} here "
        f"{1e3 * found['seconds_of_a_step_here']:.2f} ms (the aim is no more than that); "
        f"{found['samples_per_second']:.1f} texts a second"
    )
    return found


def shared(plan: Plan) -> dict:
    """Losses that share a forward pass: directions of low rank, and both signs of LoRA."""
    dtype, sizes = getattr(torch, plan.dtype), [(*size, 4) for size in plan.small_sizes]
    found = together.run(plan.small, sizes, plan.repeats, plan.device, dtype)
    for kind, rows in found.items():
        for row in rows:
            plan.say(f"{plan.small} {kind}: {row}")
    return found


SECTIONS: dict[str, Callable[[Plan], object]] = {
    "replay": replay,
    "noise": kernels,
    "all_at_once": all_at_once,
    "steps_small": lambda plan: steps(plan, plan.small, plan.small_sizes),
    "steps_large": lambda plan: steps(plan, plan.large, plan.large_sizes),
    "tests": tests,
    "profile_small": lambda plan: profile(plan, plan.small, plan.small_sizes[0]),
    "floors_small": lambda plan: floors(plan, plan.small, plan.small_sizes),
    "floors_large": lambda plan: floors(plan, plan.large, plan.large_sizes),
    "together": shared,
    "memory_small": lambda plan: memory(plan, plan.small, plan.small_sizes[-1]),
    "memory_large": lambda plan: memory(plan, plan.large, plan.large_sizes[0]),
    "offload": offload,
    "engine": engine,
}


def _free(plan: Plan) -> None:
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()


def run(plan: Plan, only: list[str], output: Path) -> dict:
    device = noise_benchmark.device_name(plan.device)
    result: dict = {"device": device, "dry": plan.device == "cpu", "environment": environment()}
    plan.say(f"{device}, torch {torch.__version__}, {plan.budget:.0f} s")
    for name in only or SECTIONS:
        if plan.left() <= 0:
            plan.say(f"no time is left for {name}")
            continue
        plan.say(f"== {name}")
        try:
            result[name] = SECTIONS[name](plan)
        except Exception as error:  # the other sections are worth as much
            result[name] = {"failed": repr(error)}
            plan.say(traceback.format_exc(limit=-4))
        _free(plan)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=240.0, help="seconds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[])
    folder = Path(os.environ.get("OUT", "benchmarks/results"))
    parser.add_argument("--output", type=Path, default=folder / "gpu.json")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry runs tiny models on the CPU")
    torch.manual_seed(0)
    run(Plan(**DRY) if args.dry else Plan(budget=args.budget), args.only, args.output)


if __name__ == "__main__":
    main()
