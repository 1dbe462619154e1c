"""Muon: momentum whose matrices are made orthogonal before they are taken as a step.

    B <- momentum B + grad
    O  = newton_schulz(grad + momentum B)                         # U V^T of the SVD, roughly
    p <- p - lr (weight_decay p + 0.2 sqrt(max(rows, columns)) O)   # the RMS of an AdamW step

torch.optim.Muon is the same rule one matrix at a time and always in bf16: a third of a step on a
CPU without bf16 instructions, and thousands of small launches on a GPU. Here equal shapes are one
batch. Jordan et al. (2024); the factor 0.2 is from arXiv:2502.16982.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch


def newton_schulz(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(n, rows, columns) -> the same with all singular values moved near 1 (0.7 to 1.2)."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(
            wide, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445
        )
    return wide if x.shape[1] <= x.shape[2] else wide.mT


class Muon(torch.optim.Optimizer):
    """For 2-D parameters only; embeddings belong to AdamW. Keeps one buffer per parameter."""

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 1e-2,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
            for (rows, columns), params in shapes.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads = [p.grad for p in params]
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, grads)
                ahead = torch._foreach_add(grads, buffers, alpha=group["momentum"])
                dtype = torch.bfloat16 if params[0].is_cuda else torch.float32
                updates = newton_schulz(torch.stack(ahead).to(dtype)).to(params[0].dtype)
                scale = 0.2 * max(rows, columns) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, updates.unbind(), alpha=-group["lr"] * scale)
