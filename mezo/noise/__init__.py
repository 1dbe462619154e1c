"""z, and what is done with it: `apply_` adds multiples of z to a tensor without storing z.

definition.py is the truth; cpu.py and gpu.py are kernels with the same bits, used where numba and
triton are installed.
"""

import importlib
import logging
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .definition import (
    CONTRACT,
    DISTRIBUTIONS,
    GROUP,
    MAX_PROBE,
    MAX_STEP,
    canonical_name,
    draw,
    tensor_key,
)

__all__ = ["CONTRACT", "DISTRIBUTIONS", "MAX_PROBE", "MAX_STEP"]
__all__ += ["apply_", "canonical_name", "draw", "tensor_key"]

_KERNELS = {"cpu": ".cpu", "cuda": ".gpu"}  # of numba, of triton
_PIECE = {"cpu": 2**16, "other": 2**22}  # elements drawn at a time in plain torch: caches, launches


@cache
def _kernel(device: str) -> ModuleType | None:
    """The kernel for a type of device; without one, plain torch draws the same bits, slower."""
    if device not in _KERNELS:
        return None
    try:
        return importlib.import_module(_KERNELS[device], __package__)
    except Exception as error:  # not installed, or Triton finds no C compiler
        log = logging.getLogger("mezo")
        log.info("noise on %s is drawn by plain torch: %s", device, error)
        return None


def apply_(
    tensor: torch.Tensor,
    key: tuple[int, int],
    terms: list[tuple[float, float]],
    *,
    step: int,
    probe: int = 0,
    distribution: str = "gaussian",
    offset: int = 0,
    kernel: bool = True,
) -> None:
    """tensor <- scale * tensor + coefficient * z for each (scale, coefficient), in order.

    z is drawn once for all terms, and the bits are those of a call for each. A term is a
    multiplication by scale, a multiplication of z by the coefficient and an addition, each rounded
    to float32 (float64 for a float64 tensor); for a 16-bit tensor the sum is rounded once more.

    Args:
        tensor: elements `offset` and on of the parameter in row-major order, whatever its strides.
        key: `tensor_key(seed, name)`.
        terms: pairs, rounded to float32 (not for a float64 tensor).
        step, probe: which direction; step in [0, 2^32), probe in [0, 2^24).
        kernel: False keeps to plain torch (the same bits; for tests).
    """
    if not terms:
        return
    where: dict[str, Any] = {"step": step, "probe": probe, "distribution": distribution}
    module = _kernel(tensor.device.type) if kernel else None
    if module is not None and module.supports(tensor):
        module.apply_(tensor, key, terms, offset=offset, **where)
        return
    with torch.no_grad():
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        for piece, start in _pieces(tensor.detach(), GROUP[distribution]):
            first = offset + start
            z = draw(key, first, first + piece.numel(), device=tensor.device, **where)
            z = z.to(wide).view(piece.shape)
            for scale, coefficient in terms:
                piece.copy_(piece.to(wide) * scale + z * coefficient)


def _pieces(tensor: torch.Tensor, group: int):
    """Views of consecutive elements in row-major order, each with the index of its first."""
    size = max(_PIECE.get(tensor.device.type, _PIECE["other"]), group)
    if tensor.dim() == 0 or tensor.is_contiguous():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), size):
            yield flat[start : start + size], start
    else:
        row = tensor[0].numel()
        rows = max(1, size // max(row, 1))
        for first in range(0, tensor.shape[0], rows):
            yield tensor[first : first + rows], first * row
