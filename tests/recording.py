"""What stands in for a CUDA graph on a CPU: kernels are noted once, and replayed without Python.

As in a graph, every launch is repeated with the tensors that it had when it was captured, whatever
the program has done since. `signature` says which kernels read and wrote which addresses, so that
two captures can be compared.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mezo.noise import live

SYNCHRONOUS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        if name in SYNCHRONOUS:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = function(*args, **kwargs)
        returned = [r.alias_info for r in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):
            written = any(alias is not None for alias in returned)  # in place
            self.launches.append((name, function, args, kwargs, None if written else out))
        return out

    def launch(self, module, tensor, key, moves, *rest):
        self.launches.append(("noise", module.apply_, (tensor, key, moves, *rest), {}, None))

    def replay(self):
        for _, function, args, kwargs, out in self.launches:
            found = function(*args, **kwargs)
            if out is not None:
                for into, value in zip(tree_iter(out), tree_iter(found), strict=True):
                    if isinstance(into, torch.Tensor):
                        into.copy_(value)

    def signature(self):
        """Names of kernels with their addresses; memory of the capture itself is numbered."""
        own, rows = {}, []
        for name, _, args, kwargs, out in self.launches:
            for x in tree_iter(out):
                if isinstance(x, torch.Tensor):
                    own.setdefault(x.untyped_storage().data_ptr(), len(own))
            places = []
            for x in tree_iter((args, kwargs, out)):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage().data_ptr()
                    places.append((own.get(storage, storage), x.storage_offset(), x.shape))
            rows.append((name, places))
        return rows


class Recording:
    """A backend of Graphs."""

    def __init__(self, twice=False):
        self.twice, self.tapes, self.replays = twice, [], 0

    def warm(self, call):
        return call()

    def capture(self, call):
        tape, out = self._record(call)
        if self.twice:
            again, _ = self._record(call)
            with torch._C.DisableTorchFunction():
                assert again.signature() == tape.signature()
        self.tapes.append(tape)

        def replay():
            self.replays += 1
            with torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False):
                tape.replay()

        return replay, out

    def _record(self, call):
        tape, tables = Tape(), live.current()
        known = tables.launch

        def launch(module, tensor, key, moves, *rest):
            tape.launch(module, tensor, key, tables.live(moves), *rest)

        tables.launch = launch
        try:
            with tape:
                out = call()
        finally:
            tables.launch = known
        for x in tree_iter(out):  # a capture does not compute
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.fill_(torch.nan)
        return tape, out
