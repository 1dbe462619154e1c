"""Find out whether something besides the optimizer has written to the weights between two steps.

torch counts what writes to a tensor, but not writes through `.data`, `.detach()` in inference mode
or numpy. A few elements of every tensor on a CPU are therefore compared as well. What this misses,
a replay finds by the digests in the log (fingerprints.py).
"""

from typing import Any

import numpy as np
import torch

_ELEMENTS = 16  # that are looked at, of each tensor
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Seen = tuple[int, int, bytes]  # how often it was written to, where it lies, some of its elements


class OtherWriters:
    """What the trained weights of an optimizer were after a step, and which differ before the next.

    Weights that are sharded or offloaded are not looked at: others move them between steps.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self._views: dict[int, tuple[torch.Tensor, int, np.ndarray | None]] = {}  # by id
        self._seen: dict[str, Seen] = {}
        optimizer.trained()
        self.note()

    def note(self) -> None:
        """Take the weights as they are for the optimizer's own."""
        self._seen = self._look()

    def first(self) -> str | None:
        """Return the first weight that was written to since `note`, or None.

        Values that were put back count as written to if torch counted them.
        """
        here = self._look()
        odd = (name for name, seen in self._seen.items() if here.get(name, seen) != seen)
        return next(odd, None)

    def _look(self) -> dict[str, Seen]:
        if not self._optimizer.weights.here:
            return {}
        found = {}
        for name, p, _ in self._optimizer.plan.trained:  # as the step that looks has listed it
            if not p.is_inference():
                found[name] = (p._version, p.data_ptr(), self._elements(p))
        return found

    def _elements(self, p: torch.Tensor) -> bytes:
        """Return some elements, by a view that is kept; it is made again if the tensor has moved.

        Only a CPU's: reading from a device would wait for it.
        """
        place = p.data_ptr()
        kept = self._views.get(id(p))
        if kept is None or kept[0] is not p or kept[1] != place:
            kept = self._views[id(p)] = (p, place, _view(p))
        return b"" if kept[2] is None else kept[2].tobytes()


def _view(p: torch.Tensor) -> np.ndarray | None:
    """Return elements along the longest dimension, as integers that share the tensor's memory."""
    if p.device.type != "cpu" or not p.numel():
        return None
    row = p.detach()
    while row.dim() > 1:
        shortest = min(range(row.dim()), key=lambda i: row.shape[i])
        row = row.select(shortest, row.shape[shortest] // 2)
    row = row.view(_INTEGERS[row.element_size()])
    every = max(1, row.numel() // _ELEMENTS)
    return row.reshape(-1)[::every][:_ELEMENTS].numpy() if row.dim() else row.numpy()
