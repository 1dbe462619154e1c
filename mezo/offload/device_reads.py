"""Torch's functions read the copy on the device wherever they are given a parameter."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mezo.forms.reads import METADATA, of_tensors
from mezo.offload.blocks import Block, BlockCache, Loaded
from mezo.offload.turns import Turns

_PLACE = of_tensors("device is_cuda is_cpu get_device")


class DeviceReads(TorchFunctionMode):
    """A mode in which torch's functions get the copy on the device for a parameter of the model.

    Inside it, `Moved` perturbs that copy to theta + eps z. Forward passes that take turns hand over
    where a parameter belongs to another block than the one read before.
    """

    def __init__(self, blocks: BlockCache, turns: Turns | None, number: int):
        super().__init__()
        self.blocks, self.turns, self.number = blocks, turns, number
        self.block: Block | None = None
        self.loaded: dict[Block, Loaded] = {}  # the block that was read last, and the pinned ones

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _PLACE and id(args[0]) in self.blocks.home:
            return function(torch.empty(0, device=self.blocks.device))
        if function in METADATA or not (self._reads(args) or self._reads(kwargs.values())):
            return function(*args, **kwargs)
        return function(*self._present(args), **self._present(kwargs))

    def _reads(self, given) -> bool:
        known = self.blocks.home
        return any(
            id(x) in known or (type(x) in (tuple, list, dict) and self._reads(_values(x)))
            for x in given
        )

    def _present(self, given: Any) -> Any:
        if id(given) in self.blocks.home:
            return self._of(given)
        if type(given) is dict:
            return {key: self._present(value) for key, value in given.items()}
        if type(given) in (tuple, list):
            return type(given)(map(self._present, given))
        return given

    def _of(self, p: torch.Tensor) -> torch.Tensor:
        block = self.blocks.home[id(p)]
        if block not in self.loaded:
            if not block.kept:
                if self.turns is not None:
                    self.turns.pass_on(self.number)
                self.loaded.pop(self.block, None)  # type: ignore[arg-type]
                self.block = block
            self.loaded[block] = self.blocks.need(block)
        tensor = self.loaded[block].tensors[id(p)]
        alike = p.requires_grad and not torch.is_grad_enabled()  # by it torch picks kernels
        return tensor if tensor.requires_grad == alike else tensor.requires_grad_(alike)


def _values(given: Any) -> Any:
    return given.values() if type(given) is dict else given
