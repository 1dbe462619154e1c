"""Offload against its limits: the step without it, and the bytes over the measured bandwidth.

    python -m benchmarks.offload --shape 1.3b --size 16x300 --output offload.json     # a GPU
    python -m benchmarks.offload --limit --output offload-cpu.json                    # a CPU

The first takes steps of one model with its weights on the device and in the host's memory. The
second trains from a file, in a process that may not allocate more than a quarter of the weights
(RLIMIT_DATA), and compares the weights with those of the run without offload.
"""

import argparse
import hashlib
import json
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM

from mezo import MeZO, noise
from mezo.memory.measured import PeakMemory
from mezo.memory.plan import calibrate
from mezo.offload.context import load_offloaded, offload
from mezo.runs.result import environment

from .step import SHAPES, build


def loss_of(model, batch: int, tokens: int, device: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens), generator=generator).to(device)
    inputs = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    inputs |= {"use_cache": False, "logits_to_keep": 1}
    return lambda: F.cross_entropy(model(**inputs).logits[:, -1].float(), ids[:, -1])


def timed(optimizer, loss, steps: int, device: str) -> float:
    seconds = []
    for _ in range(steps + 2):  # the first two learn the order and take the memory
        began = time.perf_counter()
        optimizer.step(loss)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def speed(shape: str, batch: int, tokens: int, steps: int, device: str, dtype: str) -> dict:
    kind = getattr(torch, dtype)
    found: dict[str, Any] = {"shape": shape, "batch": batch, "tokens": tokens, "dtype": dtype}
    model = build(shape).to(kind)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found |= {"weights": weights, "bandwidth": calibrate(device, kind).bandwidth}
    optimizer = MeZO(model.named_parameters(), seed=0, perturbation="scratch")
    with PeakMemory() as peak, offload(model, optimizer, device=device):
        found["offload"] = timed(optimizer, loss_of(model, batch, tokens, device), steps, device)
    found["peak"] = peak.bytes
    found["transfer_limit"] = weights / found["bandwidth"]
    try:
        model = model.to(device)
    except torch.OutOfMemoryError:
        return found
    optimizer = MeZO(model.named_parameters(), seed=0, perturbation="scratch")
    found["resident"] = timed(optimizer, loss_of(model, batch, tokens, device), steps, device)
    found["of_limit"] = found["offload"] / max(found["resident"], found["transfer_limit"])
    return found


def within_limit(source: str, folder: str, steps: int, limit: int | None) -> dict:
    """Train the model at `source`, from a file and with `limit` bytes to allocate, or plainly."""
    model = load_offloaded(source)
    optimizer = MeZO(model.named_parameters(), lr=1e-4, seed=0)
    loss = loss_of(model, 2, 32, "cpu")
    noise.apply_(torch.zeros(2**18), (0, 0), [noise.Move(0, 0, 1.0, 1.0)])  # compiled now
    found: dict[str, Any] = {"limit": limit}
    if limit is None:
        began = time.perf_counter()
        found["losses"] = [optimizer.step(loss) for _ in range(steps)]
        found["seconds_a_step"] = (time.perf_counter() - began) / steps
    else:
        with offload(model, optimizer, device="cpu", folder=folder), PeakMemory() as peak:
            taken = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_DATA, (taken + limit, resource.RLIM_INFINITY))
            began = time.perf_counter()
            found["losses"] = [optimizer.step(loss) for _ in range(steps)]
            found["seconds_a_step"] = (time.perf_counter() - began) / steps
        found["resident_above_start"] = peak.bytes
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().numpy().data)
    return found | {"weights_sha256": digest.hexdigest()}


def limited(folder: Path, steps: int) -> dict:
    """16 layers of 28 MB, 462 MB in all, within 115 MB, the stacks of threads included."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "vocab_size": 2000}
    model = OPTForCausalLM(OPTConfig(num_hidden_layers=16, num_attention_heads=12, **sizes))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder / "model")
    del model
    rows = []
    for limit in (None, weights // 4):
        how = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=how) as pool:
            given = (str(folder / "model"), str(folder / "copy"), steps, limit)
            rows.append(pool.submit(within_limit, *given).result())
    same = [rows[0][key] == rows[1][key] for key in ("losses", "weights_sha256")]
    return {"weights": weights, "steps": steps, "rows": rows, "bitwise": all(same)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--size", default="16x50", help="batch x tokens")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("offload_scratch"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.limit:
        found = limited(args.folder, args.steps)
    else:
        batch, tokens = map(int, args.size.split("x"))
        found = speed(args.shape, batch, tokens, args.steps, args.device, args.dtype)
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found | {"environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
