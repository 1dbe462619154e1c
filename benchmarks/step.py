"""A MeZO step against two plain forward passes and against the published code's arithmetic.

    python -m benchmarks.step --shape 125m --sizes 16x50 1x32 --output step.json [--device cuda]

Random weights of OPT's shape; the loss is on the last token, as for a candidate.
Methods take turns in one process on one model; a figure is the median of its turns, a ratio the
median over turns of the ratio to two plain forward passes within a turn.

    forwards    two forward passes with all logits: the plain cost
    forwards, labelled logits   the least that a step with two passes can take
    reference   torch.normal, p = p + s * z * eps, four sweeps, all logits, written out naively
    in place, scratch, low rank   this library's step; logits at the labelled position alone
    full rank, one pass   the batch and its copy: z is drawn once for both signs
    ..., graphs   the same with forward passes as CUDA graphs; on a GPU alone
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM

from mezo import MeZO, noise
from mezo.closures import Paired, double
from mezo.compare import style
from mezo.forms.graphs import Graphs
from mezo.memory.plan import OPT
from mezo.runs.result import environment

SHAPES = {"tiny": (64, 2, 2), **OPT}  # hidden size, layers, heads
EPS, LR = 1e-3, 1e-6
GRAPHED = ("forwards", "scratch", "low rank, one pass", "full rank")  # also measured as graphs
WARM = {"cuda": 4, "cpu": 2}  # turns that do not count: the third call of a kind captures its graph


def build(shape: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> OPTForCausalLM:
    """Random weights, made where they are to be: 13B take no memory and no time of the host."""
    hidden, layers, heads = SHAPES[shape]
    sizes = {"hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden}
    config = OPTConfig(num_hidden_layers=layers, num_attention_heads=heads, **sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return OPTForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def reference_step(model, loss: Callable[[], torch.Tensor]) -> None:
    """The published arithmetic: one seed, z redrawn for each of four sweeps, new tensors."""
    seed = int(torch.randint(10**9, ()))

    def directions():
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        for p in model.parameters():
            like = {"device": device, "dtype": p.dtype, "generator": generator}
            yield p, torch.normal(mean=0.0, std=1.0, size=p.data.size(), **like)

    def sweep(scale: float) -> None:
        for p, z in directions():
            p.data = p.data + scale * z * EPS

    sweep(1)
    plus = loss()
    sweep(-2)
    minus = loss()
    sweep(1)
    grad = ((plus - minus) / (2 * EPS)).item()
    for p, z in directions():
        p.data = p.data - LR * (grad * z)


def methods(model, batch: int, tokens: int) -> dict[str, Callable[[], object]]:
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens)).to(model.device)
    inputs = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    target = ids[:, -1]

    def full() -> torch.Tensor:
        return F.cross_entropy(model(**inputs, use_cache=False).logits[:, -1], target)

    def labelled() -> torch.Tensor:
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits
        return F.cross_entropy(logits[:, -1], target)

    found: dict[str, Callable[[], object]] = {
        "forwards": lambda: (full(), full()),
        "forwards, labelled logits": lambda: (labelled(), labelled()),
        "reference": lambda: reference_step(model, full),
    }
    forms = ("in_place", "scratch") if model.dtype == torch.float32 else ("scratch",)
    for form, distribution in itertools.product(forms, noise.DISTRIBUTIONS):
        options = {"perturbation": form, "distribution": distribution, "seed": 0}
        optimizer = MeZO(model.named_parameters(), lr=LR, eps=EPS, **options)
        name = f"{form.replace('_', ' ')}, {distribution}"
        found[name] = lambda o=optimizer: o.step(labelled)
        if form == forms[0]:
            found[f"{name}, all logits"] = lambda o=optimizer: o.step(full)

    def halves(both):
        with both(batch_size=batch):
            logits = model(**double(inputs), use_cache=False, logits_to_keep=1).logits[:, -1]
        return F.cross_entropy(logits[:batch], target), F.cross_entropy(logits[batch:], target)

    low = MeZO(model.named_parameters(), lr=LR, eps=EPS, perturbation="low_rank", seed=0)
    found["low rank, two passes"] = lambda: low.step(labelled)
    found["low rank, one pass"] = lambda: low.step(Paired(labelled, halves))
    one_pass = Paired(labelled, halves, full_rank=True)
    for distribution in noise.DISTRIBUTIONS:
        options = {"perturbation": "scratch", "distribution": distribution, "seed": 0}
        whole = MeZO(model.named_parameters(), lr=LR, eps=EPS, **options)
        found[f"full rank, one pass, {distribution}"] = lambda o=whole: o.step(one_pass)
    return found


def replayed(model, calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The same calls, each with forward passes as CUDA graphs of its own."""

    def call(own: Graphs, method: Callable[[], object]) -> object:
        with own.around(model):
            return method()

    return {f"{name}, graphs": partial(call, Graphs(), call_) for name, call_ in calls.items()}


def measure(
    shape: str, batch: int, tokens: int, repeats: int, device: str, dtype: str, only: list[str]
) -> dict:
    model = build(shape, device, getattr(torch, dtype))
    calls = methods(model, batch, tokens)
    if device == "cuda":
        calls |= replayed(model, {n: c for n, c in calls.items() if n.startswith(GRAPHED)})
    if only:
        calls = {name: call for name, call in calls.items() if name in ("forwards", *only)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for turn in range(repeats + (warm := WARM.get(device, 4))):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                if turn >= warm:  # the first ones compile, capture and take the memory
                    seconds[name].append(time.perf_counter() - began)
    plain = seconds["forwards"]
    rows = {
        name: {
            "seconds": statistics.median(values),
            "of_two_forwards": statistics.median(a / b for a, b in zip(values, plain, strict=True)),
        }
        for name, values in seconds.items()
    }
    found = {"shape": shape, "batch": batch, "tokens": tokens, "dtype": dtype}
    return found | {"repeats": repeats, "methods": rows}


def plot(rows: list[dict], path: Path) -> None:
    """Bars of the methods at each size, in units of two plain forward passes, on a log axis."""
    from matplotlib import ticker

    figure = style.figure(3.2 * len(rows))
    top = max(one["of_two_forwards"] for row in rows for one in row["methods"].values())
    for axis, row in zip(style.panels(figure, rows=len(rows)), rows, strict=True):
        names = [name for name in row["methods"] if not name.startswith("forwards")]
        values = [row["methods"][name]["of_two_forwards"] for name in names]
        colours = ["#888888" if name == "reference" else style.COLOURS[0] for name in names]
        axis.axvline(1, color="black", linewidth=1, linestyle="--")
        if least := row["methods"].get("forwards, labelled logits"):
            axis.axvline(least["of_two_forwards"], color="#d55e00", linewidth=1, linestyle=":")
        bars = axis.barh(names, values, color=colours)
        style.lengths(axis, bars, "%.2f")
        axis.grid(visible=False, axis="y")
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(0.4, 1.8 * top)
        axis.xaxis.set_major_locator(ticker.FixedLocator([2**i for i in range(-1, 7)]))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
        axis.set_title(f"OPT-{row['shape']}, {row['batch']} x {row['tokens']} tokens")
    axis.set_xlabel("step / two plain forward passes\n(dotted: passes with labelled logits)")
    style.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--sizes", nargs="+", default=["16x50"], help="batch x tokens: 1x32 16x50")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=[], help="beside forwards; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG or SVG")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    where = {"repeats": args.repeats, "device": args.device, "dtype": args.dtype}
    where["only"] = args.methods
    found = [measure(args.shape, batch, tokens, **where) for batch, tokens in sizes]
    for row in found:
        print(f"OPT-{row['shape']}, {args.dtype}, {row['batch']} x {row['tokens']} tokens")
        for name, value in row["methods"].items():
            print(f"  {name:32} {value['seconds']:8.3f} s  {value['of_two_forwards']:6.2f}")
    if args.plot:
        plot(found, args.plot)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"rows": found, "environment": environment()}
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
