"""Losses that share a forward pass against passes of their own: ratios within one run.

    python -m benchmarks.together --shape 125m --sizes 1x32x1 1x32x4 [--device cuda]

A size is rows x tokens x directions. Random weights of OPT's shape; the loss is on the last token.
Methods take turns in one process. On a CPU the time is that of this thread.

    lora        adapters of rank 8 on all linear layers, in place: two passes a direction, one pass
                a direction, one pass for all directions
    low rank    all weights
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from benchmarks import step
from mezo import MeZO
from mezo.closures import Paired, copies, repeated

METHODS = ("two passes a direction", "one pass a direction", "one pass")


def closures(model, batch: int, tokens: int) -> tuple[Callable, Callable]:
    """Return the loss of a batch, and the losses of its copies."""
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens)).to(model.device)
    inputs = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}

    def logits(times: int) -> torch.Tensor:
        given = repeated(inputs, times)
        return model(**given, use_cache=False, logits_to_keep=1).logits[:, -1]

    def halves(both):
        with both(batch):
            parts = logits(copies(both)).chunk(copies(both))
        return [F.cross_entropy(part, ids[:, -1]) for part in parts]

    return lambda: F.cross_entropy(logits(1), ids[:, -1]), halves


def measure(model, form: str, size: tuple[int, int, int], turns: int) -> dict:
    """Return the median seconds of a step by method, and its ratio to the method before."""
    batch, tokens, directions = size
    alone, halves = closures(model, batch, tokens)
    given = [alone, Paired(alone, halves, True), Paired(alone, halves, True, directions)]
    options = {"eps": 1e-3, "seed": 0, "perturbation": form, "num_samples": directions}
    made = [MeZO(model.named_parameters(), lr=1e-7, **options) for _ in given]
    on_gpu = model.device.type == "cuda"

    def timed(number: int) -> float:
        clock = time.perf_counter if on_gpu else time.thread_time
        began = clock()
        made[number].step(given[number])  # it reads losses from the device, which waits for it
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - began

    for number in range(len(given)):
        timed(number)
    taken = [[timed(number) for number in range(len(given))] for _ in range(turns)]
    found: dict = {"size": "x".join(map(str, size)), "stacked": made[2].memory.stacked}
    for number, name in enumerate(METHODS):
        seconds = statistics.median(turn[number] for turn in taken)
        before = max(0, number - 1)
        ratio = statistics.median(turn[number] / turn[before] for turn in taken)
        found[name] = {"seconds": round(seconds, 4), "of_the_one_before": round(ratio, 3)}
    return found


def run(shape: str, sizes: list[tuple[int, int, int]], turns: int, device: str, dtype) -> dict:
    from peft import LoraConfig, get_peft_model

    model, found = step.build(shape, device, dtype), {}
    found["low rank"] = [measure(model, "low_rank", size, turns) for size in sizes]
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).eval()
    found["lora"] = [measure(model, "in_place", size, turns) for size in sizes]
    return found


def size_of(text: str) -> tuple[int, int, int]:
    batch, tokens, directions = map(int, text.split("x"))
    return batch, tokens, directions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=step.SHAPES, default="125m")
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[(1, 32, 1), (1, 32, 4)])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    print(json.dumps(run(args.shape, args.sizes, args.turns, args.device, dtype), indent=1))


if __name__ == "__main__":
    main()
