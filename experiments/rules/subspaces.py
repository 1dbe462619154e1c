"""Subspaces of a model's weights, trained as parameters of their own: ZO-Act, and sparse masks.

    found = activations(model, closure, rank=8)       # or sensitive(model, closure, keep=1e-3)
    install(model, found)                             # all weights are frozen
    MeZO(model.named_parameters(), ...)

A subspace is not in the run log: keep `found` beside it (safetensors.torch.save_file), and install
it in the base model before a replay.
"""

from collections.abc import Callable

import torch
from torch.nn.utils import parametrize

Subspace = dict[str, torch.Tensor]  # by name of a weight: (in, rank) basis, or indices of elements


class Along(torch.nn.Module):
    """W + C U': ZO-Act (Dong et al., 2026, arXiv:2607.01125) with coefficients C, zero at first."""

    def __init__(self, weight: torch.Tensor, basis: torch.Tensor):
        super().__init__()
        self.register_buffer("basis", basis.to(weight))
        self.coefficients = torch.nn.Parameter(weight.new_zeros(len(weight), basis.shape[1]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.coefficients @ self.basis.t()


class Within(torch.nn.Module):
    """A weight of which some elements are trained (Guo et al., 2024, arXiv:2406.02913)."""

    def __init__(self, weight: torch.Tensor, chosen: torch.Tensor):
        super().__init__()
        self.register_buffer("chosen", chosen)
        self.values = torch.nn.Parameter(weight.detach().flatten()[chosen].clone())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten().index_copy(0, self.chosen, self.values).view(weight.shape)


@torch.no_grad()
def activations(model: torch.nn.Module, closure: Callable[[], object], rank: int) -> Subspace:
    """Return for each linear layer the leading right singular vectors of its inputs in a pass."""
    squares: dict[str, torch.Tensor] = {}
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]

    def noted(name: str, x: torch.Tensor) -> None:
        x = x.detach().double().flatten(0, -2)
        squares[f"{name}.weight"] = squares.get(f"{name}.weight", 0) + x.t() @ x

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: noted(name, given[0]))
        for name, layer in linear
    ]
    try:
        closure()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.linalg.eigh(s)[1][:, -rank:].contiguous() for name, s in squares.items()}


def sensitive(model: torch.nn.Module, closure: Callable[[], torch.Tensor], keep: float) -> Subspace:
    """Return the fraction `keep` of all elements of matrices whose gradients are largest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.dim() == 2]
    with torch.enable_grad():
        grads = torch.autograd.grad(closure(), [p for _, p in named])
    count = max(1, round(keep * sum(g.numel() for g in grads)))
    least = torch.cat([g.abs().flatten() for g in grads]).topk(count).values[-1]
    found = {
        n: (g.abs().flatten() >= least).nonzero()[:, 0]
        for (n, _), g in zip(named, grads, strict=True)
    }
    return {name: chosen for name, chosen in found.items() if len(chosen)}


def install(model: torch.nn.Module, found: Subspace) -> None:
    """Train the subspace instead of the weights; a basis has floats, a mask has integers."""
    for p in model.parameters():
        p.requires_grad_(False)
    for name, given in found.items():
        module, weight = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        kind = Along if given.is_floating_point() else Within
        parametrize.register_parametrization(module, name.rpartition(".")[2], kind(weight, given))
