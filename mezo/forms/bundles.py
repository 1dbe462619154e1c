"""Small parameters that a forward pass reads one after another, perturbed in one launch.

A model has hundreds of biases, norms and small matrices, and to perturb each of them when it is
read takes more time in Python than in the processor. The first pass notes the order in which
parameters are read; from then on, whoever reads one small parameter gets the next ones ready too.
Each has a z of its own, so that the bits are those of one after another.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from mezo import noise
from mezo.forms.direction import Row
from mezo.layers import PLAIN, TensorScale

_SMALL = 2**16  # elements of a parameter; a larger one keeps the processor busy by itself
_MOST = 2**18  # elements of a bundle: 1 MB of float32


class Bundles:
    """The bundles of a model. They are empty until a pass has shown the order of its reads."""

    def __init__(self) -> None:
        self.of: dict[str, noise.Rows] = {}  # by parameter: those of one dtype, device and scale
        self.learned = False
        self.drawn: Any = None  # drawn.Drawn, of low-rank directions

    def learn(self, read: Sequence[Row], scales: Mapping[str, TensorScale]) -> None:
        """Make bundles of what a pass has read, in the order in which it did."""
        kinds: dict[tuple, list[Row]] = {}
        for row in read:
            scale = scales.get(row.name, PLAIN)
            if _is_small(row.tensor) and scale.threshold is None:
                kind = row.tensor.dtype, row.tensor.device, scale
                kinds.setdefault(kind, []).append(row)
        for rows in kinds.values():
            total, ends = 0, []
            for row in rows:
                total += row.tensor.numel()
                ends.append(total // _MOST)
            for _, pairs in groupby(zip(ends, rows, strict=True), key=lambda pair: pair[0]):
                own = [row for _, row in pairs]
                bundle = noise.Rows(own)
                self.of |= {row.name: bundle for row in own if len(own) > 1}
        self.learned = True


def _is_small(x: torch.Tensor) -> bool:
    ordinary = type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"
    return ordinary and x.is_contiguous() and 0 < x.numel() <= _SMALL
