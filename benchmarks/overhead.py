"""What Python costs a step: microseconds of CPU time a trained tensor, above two forward passes.

    python -m benchmarks.overhead [--repeats 9] [--output overhead.json]

The model has OPT-1.3B's 388 tensors at hidden size 64: arithmetic is next to nothing, and what is
left is what a GPU would wait for. Forms take turns with two plain forward passes in one process,
one thread; a figure is the median over turns of the difference within a turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from mezo import MeZO
from mezo.runs.result import environment

FORMS = ("in_place", "scratch", "low_rank")


def tiny(layers: int) -> OPTForCausalLM:
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "vocab_size": 512}
    shape = {"num_hidden_layers": layers, "num_attention_heads": 4, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(**sizes, **shape)).eval()


def cpu_seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(repeats: int, layers: int = 24) -> dict:
    model = tiny(layers)
    ids = torch.randint(5, 500, (1, 8))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=labels, use_cache=False).loss

    @torch.no_grad()
    def two() -> None:
        float(loss()), float(loss())

    calls: dict[str, Callable[[], object]] = {"two forwards": two}
    for form in FORMS:
        options = {"lr": 0.0, "eps": 1e-3, "perturbation": form, "seed": 1}
        optimizer = MeZO(model.named_parameters(), **options)
        calls[form] = lambda o=optimizer: o.step(loss)
    for _ in range(2):  # compiles, takes memory, and warns
        for call in calls.values():
            call()
    turns = [{n: cpu_seconds(call) for n, call in calls.items()} for _ in range(repeats)]
    tensors = len(list(model.parameters()))
    above = {f: statistics.median(t[f] - t["two forwards"] for t in turns) for f in FORMS}
    return {
        "tensors": tensors,
        "two_forwards_ms": 1e3 * statistics.median(t["two forwards"] for t in turns),
        "us_a_tensor": {form: 1e6 * value / tensors for form, value in above.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = measure(args.repeats)
    print(f"{found['tensors']} tensors, two forwards {found['two_forwards_ms']:.1f} ms")
    for form, value in found["us_a_tensor"].items():
        print(f"  {form:10} {value:7.1f} us a tensor and step above two forwards")
    if args.output:
        args.output.write_text(json.dumps(found | {"environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
