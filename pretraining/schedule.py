"""A training loop whose learning rate follows the wall clock, so that a run ends when it must.

    progress t = seconds trained / seconds given
    factor     = t / warmup            for t < warmup
                 (1 - t) / (1 - warmup) after it: linear to zero

A slow or shared machine gets fewer steps, not a schedule cut off in its middle.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Trained:
    """What a run did: figures for the model card."""

    steps: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "one CPU thread"
        return (
            f"{self.tokens:,} tokens in {self.steps:,} steps, "
            f"{self.seconds / 60:.0f} minutes on {device}"
        )


def lr_factor(progress: float, warmup: float) -> float:
    """Linear from 0 to 1 over `warmup`, then linear to 0 at progress 1 and after it."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (1.0 - progress) / (1.0 - warmup))


def fit(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    minutes: float,
    warmup: float = 0.03,
    snapshot_minutes: float = float("inf"),
    on_snapshot: Callable[[int], None] = lambda number: None,
    log_seconds: float = 20.0,
) -> Trained:
    """Trains for `minutes`, counted from the end of the first step: compilation is not counted.

    on_snapshot gets 1, 2, ... every snapshot_minutes; its own time counts as training time.
    """
    params = [p for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]]
    peak_lrs = [[g["lr"] for g in optimizer.param_groups] for optimizer in optimizers]
    started = logged = time.monotonic()
    steps = tokens = snapshots = 0
    progress = 0.0
    for batch in batches:
        factor = lr_factor(progress, warmup)
        for optimizer, peaks in zip(optimizers, peak_lrs, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps, tokens = steps + 1, tokens + batch.numel()
        now = time.monotonic()
        if steps == 1:
            loss.item()  # waits for the device, which has now compiled
            started = logged = now = time.monotonic()
        if now - logged > log_seconds:
            rate = tokens / (now - started)
            print(f"{progress:6.1%}  step {steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s",
                  file=sys.stderr, flush=True)  # fmt: skip
            logged = now
        progress = (now - started) / (60 * minutes)
        if progress >= 1:
            break
        if now - started > 60 * snapshot_minutes * (snapshots + 1):
            snapshots += 1
            on_snapshot(snapshots)
    return Trained(steps, tokens, time.monotonic() - started)


@torch.no_grad()
def mean_loss(
    loss_of: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor]
) -> float:
    """Of equal batches, with the weights as they are."""
    losses = [loss_of(batch).item() for batch in batches]
    return sum(losses) / len(losses)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every training script has."""
    parser.add_argument("--data_dir", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="training, not compilation")
    parser.add_argument("--snapshot_minutes", type=float, default=float("inf"))
    parser.add_argument("--snapshot_dir", type=Path, default=Path("snapshots"))
    parser.add_argument("--sst2_dev", type=Path, help="GLUE's dev.tsv, for the zero-shot accuracy")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        default=DEVICE == "cuda", help="on a CPU: needs gcc")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
