"""Models whose weights and losses are the same numbers on every machine and version of torch.

The weights come from integer arithmetic, not from a random number generator. The loss is a sum that
Python makes, one number after the other, in binary64: no BLAS and no vectorised sum decides its
last bit. What torch does in between is to read a weight or to convert it, which is exact.
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

# For each model: the trained parameters by name, and their shapes.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "small": {"layers.0.weight": (3, 4), "layers.0.bias": (4,)},
    "all": {
        "embedding.weight": (7, 4),
        "layers.0.weight": (4, 6),
        "layers.0.bias": (6,),
        "layers.1.experts": (3, 2, 5),
        "layers.1.transposed": (5, 3),
        "scale": (),
    },
    # Of three types, whatever the type that is asked for.
    "mixed": {"layers.0.weight": (4, 6), "layers.0.bias": (6,), "norm.weight": (5,)},
    # More than one piece of noise in plain torch, and rows that end within a group of it.
    "large": {"layers.0.weight": (300, 230), "layers.0.bias": (1030,)},
    # More than one piece of a rule's update.
    "huge": {"layers.0.bias": (2**19 + 1000,)},
    "identity": {"layers.0.weight": (3, 4)},  # a linear layer that is fed rows of the identity
}
_MIXED = {"layers.0.bias": torch.float64, "norm.weight": torch.float32}
_READ = 500  # of a long parameter, the loss reads every 499th number


class Toy(torch.nn.Module):
    """The parameters of one of `SHAPES`, a frozen one beside them, and a loss that reads all."""

    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__()
        self.kind = name
        for place, (parameter, shape) in enumerate(SHAPES[name].items()):
            own = _MIXED.get(parameter, dtype) if name == "mixed" else dtype
            values = numbers(shape, place)
            if parameter.endswith("transposed"):  # stored column by column
                values = numbers(shape[::-1], place).t()
            self._register(parameter, torch.nn.Parameter(values.to(own)))
        frozen = torch.nn.Parameter(numbers((3,), 99).to(dtype), requires_grad=False)
        self._register("head.weight", frozen)

    def _register(self, name: str, parameter: torch.nn.Parameter) -> None:
        *path, last = name.split(".")
        module: torch.nn.Module = self
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, parameter)

    def loss(self, batch: int) -> float:
        """The mean square distance of the weights read from numbers that depend on the batch."""
        total, count = 0.0, 0
        for place, x in self._read(batch):
            distance = x - ((place * 7 + batch * 5) % 17 - 8) / 8
            total, count = total + distance * distance, count + 1
        return total / count

    def _read(self, batch: int) -> Iterator[tuple[int, float]]:
        place = 0
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            if name == "embedding.weight":
                x = F.embedding(torch.tensor([batch % 7, (batch + 3) % 7]), p)
            elif name == "layers.1.experts":
                x = p[batch % 3]
            else:
                x = p.double()
            flat = x.double().flatten()
            for value in (flat[::499] if len(flat) > _READ else flat).tolist():
                place += 1
                yield place, value

    def rows(self, batch: int, copies: int) -> list[float]:
        """The losses of `copies` times three rows of the identity, by a linear layer without bias.

        Every product but one in each sum is with 0, so that no order of a sum and no fused
        multiplication changes a bit.
        """
        (weight,) = (p for p in self.parameters() if p.requires_grad)
        found = F.linear(torch.eye(4)[[batch % 4, 1, 2]].repeat(copies, 1).to(weight.dtype), weight)
        target = [(k * 7 + batch * 5) % 17 / 8 - 1 for k in range(3)]
        return [
            sum((x - t) * (x - t) for x, t in zip(row, target, strict=True))
            for row in found.double().tolist()
        ]


def numbers(shape: tuple[int, ...], salt: int) -> torch.Tensor:
    """float32 numbers in [-1, 1) that look random; of the multiplicative congruential kind."""
    count = math.prod(shape)
    mixed = (torch.arange(count, dtype=torch.int64) + 1000 * salt + 1) * 40503 % 65536
    mixed = (mixed * mixed + 12345) % 65521 % 65536
    return ((mixed - 32768).double() / 32768).float().reshape(shape)


def build(spec: dict[str, str]) -> Toy:
    """The model that an entry of index.json describes: {"name": ..., "dtype": ...}."""
    return Toy(spec["name"], getattr(torch, spec["dtype"]))


def digests(model: torch.nn.Module) -> dict[str, str]:
    """By name, the SHA-256 of the bytes of every trained parameter, in row-major order."""
    return {name: digest(p) for name, p in model.named_parameters() if p.requires_grad}


def digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
