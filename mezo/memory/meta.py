"""Count the memory and the arithmetic of a computation from its shapes alone.

A model on torch's meta device has shapes but no numbers. Its computation is carried out there,
while the bytes of all live tensors and the multiplications are counted. This takes seconds for any
model and needs no weights.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ITEM = torch.ops.aten._local_scalar_dense.default


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors created in a `with` block; `peak` is the most alive at one time.

    `known` tensors do not count. A model that reads a number from a tensor gets 1 or True, as if a
    mask were all ones.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {x.untyped_storage()._cdata: x for x in known}

    def take(self) -> int:
        """Return the peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is _ITEM and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class FusedAttention(TorchFunctionMode):
    """Replaces attention by a form like that of fused kernels, which never store the scores.

    On the meta device torch has only the form that stores them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args[:3]
        size = query.shape[:-1].numel() * key.shape[-2]
        self.flops += 2 * size * (query.shape[-1] + value.shape[-1])
        return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        normalisers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normalisers)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))
