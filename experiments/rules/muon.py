"""ZO-Muon (Lang et al., 2026, arXiv:2602.17155): an orthogonalised update in a random subspace.

MeZO(model.named_parameters(), lr=1e-3, rule=ZOMuon(), perturbation="low_rank", rank=16,
     interval=100, num_samples=4, estimator="one_sided")
"""

import math
from dataclasses import dataclass

import torch

from mezo.rules import Rule

A, B, C = 3.4445, -4.7750, 2.0315  # Muon's quintic; singular values end between 0.7 and 1.2


@dataclass(frozen=True)
class ZOMuon(Rule):
    """theta <- theta - lr msign(G), where msign sets the singular values of G to about 1.

    With low_rank, G is the estimate for the thin factor, as in the paper. `vectors` multiplies lr
    for tensors that are no matrices, which are updated along G itself. A whole matrix works too,
    but takes min(m, n) passes over it.
    """

    steps: int = 5
    vectors: float = 1.0

    additive = whole = True

    def direction(self, theta, gradient, kept):
        g = gradient.now()
        if g.dim() != 2:
            return g * self.vectors, {}
        return msign(g, self.steps), {}


def msign(g: torch.Tensor, steps: int) -> torch.Tensor:
    """Return g Q, with Q from the Newton-Schulz iteration for g'g; no BLAS, so equal bits."""
    if g.shape[1] > g.shape[0]:
        return msign(g.t(), steps).t()
    x = g.double()
    square = torch.stack([_summed(x * column[:, None]) for column in x.unbind(1)])  # x'x
    norm = math.sqrt(math.fsum(square.diagonal().tolist())) + 1e-7
    one = torch.eye(len(square), dtype=x.dtype, device=x.device)
    q = one / norm
    for _ in range(steps):
        a = _product(_product(q, square), q)
        q = _product(q, one * A + a * B + _product(a, a) * C)
    return _product(x, q).to(g.dtype)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b, column after column: an order that no BLAS promises."""
    total = a[:, :1] * b[:1]
    for k in range(1, len(b)):
        total = total + a[:, k, None] * b[k]
    return total


def _summed(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over the first axis, by halves."""
    while len(x) > 1:
        half = len(x) // 2
        x = torch.cat([x[:half] + x[half : 2 * half], x[2 * half :]])
    return x[0]
