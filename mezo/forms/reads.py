"""Intercept torch's functions that read a parameter, so that they can be given theta + eps z.

torch offers two ways. A mode sees every call of every function, and takes more time in Python than
a small forward pass does. A tensor of a subclass is seen wherever it is an argument, and costs
nothing elsewhere. The first pass of a run is therefore watched by a mode, which also notes what a
subclass would miss; if there was nothing, parameters are `Watched` during all later passes.
"""

import sys
import threading
from collections.abc import Hashable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar, Protocol

import torch
from torch.overrides import TorchFunctionMode, get_ignored_functions

from mezo.errors import InputError
from mezo.forms.bundles import Bundles
from mezo.noise.live import Numbers


class Placed(Protocol):
    """Tensors that a model reads in place of trained shards (see sharding.py)."""

    def find(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the shard that x stands for, and x as a part of the parameter; None if none."""

    def of_all(self, names: set[str]) -> set[str]:
        """Return the names that every process gives; every process must call it."""


def eager():
    """Return a context in which compiled code runs uncompiled, since it bypasses `Reads`."""
    compiling = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiling else nullcontext()


def of_tensors(names: str) -> set:
    attributes = [getattr(torch.Tensor, name) for name in names.split()]
    return {f if callable(f) else f.__get__ for f in attributes}


# Functions that read metadata only; `device` and the like are properties.
METADATA = of_tensors(
    "shape dtype device layout ndim requires_grad is_leaf is_cpu is_cuda is_meta is_sparse"
    " is_quantized is_mkldnn is_nested grad grad_fn _version itemsize nbytes retains_grad size dim"
    " ndimension numel nelement stride storage_offset is_contiguous is_floating_point is_complex"
    " is_signed element_size get_device requires_grad_ __len__ __hash__"
) | {torch.is_floating_point, torch.is_complex, torch.numel}
_POINTERS = of_tensors("data_ptr untyped_storage storage __dlpack__ __cuda_array_interface__")
_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_CONVERSIONS = of_tensors("to type float half bfloat16 double cpu cuda contiguous")
_ASSIGNING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
LOOKUP = torch.nn.functional.embedding
_UNSEEN = (
    get_ignored_functions()
)  # torch.as_tensor and the like: a mode sees them, no subclass does
# Functions that neither write to what they are given nor take its address, which needs no look.
_ONLY_READ = {LOOKUP, torch.nn.functional.linear, torch.nn.functional.layer_norm}


class Watched(torch.nn.Parameter):
    """What a trained parameter is during a pass: torch's functions hand it to `Reads`."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        reads = Reads.innermost()
        if reads is not None and (made := reads.at_once(function, args, kwargs)) is not None:
            return made
        with Reads.unseen():
            if reads is None:  # another thread, or a copy that was made in a pass
                return function(*args, **kwargs or {})
            return reads.handle(function, args, kwargs)


class WatchedTensor(torch.Tensor):
    """The same for a trained tensor that is no `Parameter`."""

    __torch_function__ = Watched.__torch_function__


_WATCHED: dict[type, type] = {torch.nn.Parameter: Watched, torch.Tensor: WatchedTensor}


class Reads(TorchFunctionMode):
    """A context in which `call` handles every call of torch's functions that reads a parameter."""

    # Of this thread: its `modes`, those that are entered; its `guard`, the last of `unseen`.
    _entered: ClassVar[threading.local] = threading.local()

    def __init__(self, perturbed: Any):
        super().__init__()
        self.rows: dict[int, tuple[str, torch.Tensor, Any]] = {id(r[1]): r for r in perturbed.rows}
        self.read: set[str] = perturbed.read  # names of the parameters read so far
        self.placed: Placed | None = perturbed.placed
        self.bundles: Bundles | None = perturbed.bundles
        self._known: dict[int, torch.Tensor] = {}  # parameters already looked up in `placed`
        self._watched: list[tuple[torch.Tensor, type]] | None = None  # with the class that each had

    def __enter__(self):
        vars(self._entered).setdefault("modes", []).append(self)
        if self.placed is not None or self.bundles is None or not self.bundles.watched:
            return super().__enter__()
        self._watched = [(x, type(x)) for _, x, _ in self.rows.values() if type(x) in _WATCHED]
        for x, kind in self._watched:
            x.__class__ = _WATCHED[kind]
        return self

    def watch(self, x: torch.Tensor) -> None:
        """Until the end of the pass, have torch's functions hand x to `handle`, as a mode does."""
        if self._watched is not None and (kind := type(x)) in _WATCHED:
            self._watched.append((x, kind))
            x.__class__ = _WATCHED[kind]

    def __exit__(self, *raised):
        self._entered.modes.pop()
        self._see_again()
        if self._watched is None:
            self._settle(raised[0] is None)
            return super().__exit__(*raised)
        for x, kind in self._watched:
            x.__class__ = kind
        self._watched = None
        return None

    @classmethod
    def unseen(cls) -> Any:
        """Return a context in which torch's functions do not hand over `Watched` tensors."""
        guard = cls._entered.guard = torch._C.DisableTorchFunctionSubclass()
        return guard

    def _see_again(self) -> None:
        """Leave `unseen` if it was not left: a `with` that Ctrl-C ends may not exit."""
        guard, self._entered.guard = getattr(self._entered, "guard", None), None
        if guard is not None and not torch._C._is_torch_function_enabled():
            guard.__exit__(None, None, None)

    def _settle(self, whole: bool) -> None:
        """After a pass in which the mode saw everything: may the next one do without it?"""
        if whole and self.read and self.bundles is not None and self.bundles.watched is None:
            self.bundles.watched = all(type(x) in _WATCHED for _, x, _ in self.rows.values())

    @classmethod
    def innermost(cls) -> "Reads | None":
        """Return the mode that was entered last in this thread and not left, or None."""
        modes = getattr(cls._entered, "modes", None)
        return modes[-1] if modes else None

    def sequence(self, device: torch.device) -> tuple[Hashable, Numbers] | None:
        """Return what identifies the kernels of a pass within this mode, and a step's numbers.

        A pass can be captured once and replayed at another step if the first is the same. None
        means that it cannot, or not at this step. `device` is where the batch lies.
        """
        return None

    def forget(self) -> None:
        """Drop what was computed for reuse within the pass or after it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.handle(function, args, kwargs)

    def handle(self, function, args: tuple, kwargs: dict | None):
        """Return what the function returns for theta + eps z; refuse what would not see it."""
        if function in METADATA:
            return function(*args, **kwargs or {})
        if self.placed is not None:
            self._find(self.placed, (args, kwargs))
        if not (self._reads(args) or (kwargs and self._reads(kwargs.values()))):
            return function(*args, **kwargs or {})
        kwargs = kwargs or {}
        if function in _ONLY_READ and "out" not in kwargs:
            return self.call(function, args, kwargs)
        if function in _UNSEEN and self.bundles is not None:
            self.bundles.watched = False
        name = getattr(function, "__name__", "")
        if name == "__set__":
            self._check_assigned(function, *args)
            return function(*args, **kwargs)
        if function in _CONVERSIONS and self._is_idle(function, args, kwargs):
            return args[0]  # the parameter itself: `module.to()` assigns it where it was
        self._refuse(function, name, self.rows.get(id(args[0])) if args else None, kwargs)
        return self.call(function, args, kwargs)

    def at_once(self, function, args: tuple, kwargs: dict | None) -> torch.Tensor | None:
        """Return the result of a function that needs none of `handle`'s looks; None: it does."""
        return None

    def call(self, function, args: tuple, kwargs: dict):
        """Call the function with theta + eps z in place of theta, and return its result."""
        raise NotImplementedError

    def _is_idle(self, function, args: tuple, kwargs: dict) -> bool:
        """Whether a conversion of a parameter returns the parameter."""
        if not args or id(args[0]) not in self.rows or kwargs.get("memory_format") is not None:
            return False
        x = args[0]
        like = torch.empty(0, dtype=x.dtype, device=x.device)
        return x.is_contiguous() and function(like, *args[1:], **kwargs) is like

    def _check_assigned(self, function, tensor: torch.Tensor, value: Any) -> None:
        """InputError for `.data = ` of other data: theta would be moved, or replaced."""
        if function == _DATA and id(tensor) in self.rows and value is not tensor:
            raise InputError(
                f"the forward pass replaces the trained parameter {self.rows[id(tensor)][0]} "
                "(.data =, or module.to() with another dtype or device): convert the model before "
                "the first step"
            )

    def _reads(self, given) -> bool:
        rows = self.rows
        for x in given:  # noqa: SIM110 (each call of a pass comes here, and `any` is slower)
            if id(x) in rows or (type(x) in (tuple, list) and self._reads(x)):
                return True
        return False

    def _find(self, placed: Placed, given: Any) -> None:
        """Register unknown parameters in `given` that stand in place of a trained one."""
        for x in tensors(given):
            known = id(x) in self.rows or id(x) in self._known
            if not known and isinstance(x, torch.nn.Parameter):
                self._known[id(x)] = x
                if (placement := placed.find(x)) is not None:
                    name, _, key = self.rows[id(placement[0])]
                    self.know(x, (name, placement[1], key))

    def know(self, x: torch.Tensor, row: tuple[str, torch.Tensor, Any]) -> None:
        """Register x: from now on, a function that is given x reads that row."""
        self.rows[id(x)] = row

    def embedding(self, weight: torch.Tensor, max_norm: float | None) -> tuple:
        """Return the weight's row; raise InputError if the lookup would rescale it."""
        if max_norm is not None:
            name, *_ = self.rows[id(weight)]
            raise InputError(f"the embedding {name} has max_norm and rescales itself: freeze it")
        return self.rows[id(weight)]

    def _refuse(self, function, name: str, first, kwargs: dict) -> None:
        """Raise InputError for a function that takes an address or writes to the parameter.

        The function is given a temporary tensor, so that either would have no effect.
        """
        in_place = name in _ASSIGNING or (name.endswith("_") and not name.endswith("__"))
        written = first if in_place else self.rows.get(id(kwargs.get("out")))
        if written:
            raise InputError(
                f"the forward pass writes to the trained parameter {written[0]} ({name}): freeze it"
            )
        if first and function in _POINTERS:
            raise InputError(
                f"the model reads {first[0]} by its address ({name}), where scratch perturbation "
                'cannot reach: perturb a float32 model in place, perturbation="in_place"'
            )


def tensors(given: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in a function's arguments."""
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, dict | tuple | list):
        for one in given.values() if isinstance(given, dict) else given:
            yield from tensors(one)
