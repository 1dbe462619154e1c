"""What an operation allocates: tests count the buffers of a step."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The largest new tensor of the weights' dtype that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = [a.data_ptr() for a in args if isinstance(a, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.data_ptr() not in given:
            self.elements = max(self.elements, out.numel())
        return out
