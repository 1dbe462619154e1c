"""What `mezo memory` estimates against what is measured, each method in a process of its own.

    python -m benchmarks.planning --output planning.json [--shapes opt-125m ...] [--device cuda]

Random weights. Measured are the weights and, above them, the peak of two steps: of resident pages
on a CPU (MALLOC_MMAP_THRESHOLD_=65536 makes them what lives), of the allocator on CUDA. Offload
copies as to a device: on a CPU its figures are those of device and host together.
"""

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from mezo import MeZO
from mezo.closures import Paired, double
from mezo.memory.measured import PeakMemory
from mezo.memory.plan import PLANNED, Planner, config_of
from mezo.offload import blocks
from mezo.offload.context import Offload
from mezo.runs.result import environment

_LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000}
SHAPES: dict[str, tuple[Any, int, int]] = {  # config, batch, tokens
    "opt-125m": (lambda: config_of("facebook/opt-125m"), 16, 50),
    "opt-125m long": (lambda: config_of("facebook/opt-125m"), 4, 300),
    "opt-350m": (lambda: config_of("facebook/opt-350m"), 4, 64),
    "gpt2-124m": (GPT2Config, 8, 100),
    "llama-50m": (
        lambda: LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, **_LLAMA),
        8,
        128,
    ),
    "llama-230m": (
        lambda: LlamaConfig(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, **_LLAMA
        ),
        2,
        256,
    ),
    "qwen2-110m": (
        lambda: Qwen2Config(
            hidden_size=640, intermediate_size=1728, num_hidden_layers=12, **_LLAMA
        ),
        4,
        200,
    ),
}


def step_of(model, method: str, batch: int, tokens: int, device: str) -> Any:
    """(one step, what is to be entered around it)."""
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens)).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"use_cache": False, "logits_to_keep": 1}

    def loss(model=model) -> torch.Tensor:
        return F.cross_entropy(model(**inputs).logits[:, -1].float(), ids[:, -1])

    def halves(both):
        with both(batch_size=batch):
            logits = model(**double(inputs)).logits[:, -1].float()
        return F.cross_entropy(logits[:batch], ids[:, -1]), F.cross_entropy(
            logits[batch:], ids[:, -1]
        )

    if method in ("lora", "adam", "adam_checkpointing"):
        return _backward(model, method, loss)
    form = {"offload": None}.get(method, method)
    optimizer = MeZO(model.named_parameters(), perturbation=form, seed=0)
    if method == "low_rank":
        optimizer.memory.paired = True  # the comparison before the first step costs more
        return lambda: optimizer.step(Paired(loss, halves))
    if method == "offload":
        blocks.must_copy = lambda device, write_every: True  # the CPU stands for a device
        context = Offload(model, optimizer, device=device)

        def offloaded() -> None:
            with context:
                for _ in range(2):
                    optimizer.step(loss)

        return offloaded
    return lambda: optimizer.step(loss)


def _backward(model, method: str, loss) -> Any:
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    if method == "adam_checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)

    def step() -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(shape: str, method: str, device: str, dtype: str) -> dict[str, Any]:
    """In this process: the weights, and the peak of two steps above them."""
    make, batch, tokens = SHAPES[shape]
    where = "cpu" if method == "offload" else device
    model = AutoModelForCausalLM.from_config(make()).to(where, getattr(torch, dtype)).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with PeakMemory() as peak:
        step = step_of(model, method, batch, tokens, device)
        for _ in range(2):
            step()
    held = 0 if method == "offload" and device != "cpu" else weights
    return {"shape": shape, "method": method, "measured": held + peak.bytes}


def _warm(device: str) -> None:
    """What a process loads once: kernels, thread pools, modules imported when they are used."""
    tiny = OPTConfig(hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=1)
    for method in PLANNED:
        model = AutoModelForCausalLM.from_config(tiny).to("cpu" if method == "offload" else device)
        step_of(model.eval(), method, 1, 4, device)()


def _in_process(queue, *given) -> None:
    queue.put(measure(*given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=list(PLANNED), choices=PLANNED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    _warm(args.device)
    how = multiprocessing.get_context("fork" if args.device == "cpu" else "spawn")
    rows = []
    for shape in args.shapes:
        make, batch, tokens = SHAPES[shape]
        planner = Planner(make(), getattr(torch, args.dtype), batch, tokens)
        for method in args.methods:
            queue = how.Queue()
            given = (queue, shape, method, args.device, args.dtype)
            process = how.Process(target=_in_process, args=given)
            process.start()
            row = queue.get(timeout=600)
            process.join()
            plan = planner.plan(method, 1000)
            row["estimated"] = plan.device + (plan.host if args.device == "cpu" else 0)
            row["ratio"] = row["estimated"] / row["measured"]
            rows.append(row)
            sizes = [f"{row[key] / 2**20:8.0f} MiB" for key in ("estimated", "measured")]
            print(f"{shape:14} {method:20} {' '.join(sizes)} {row['ratio']:6.3f}", flush=True)
        if args.output:  # after each shape
            args.output.parent.mkdir(parents=True, exist_ok=True)
            found = {"dtype": args.dtype, "rows": rows, "environment": environment()}
            args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
