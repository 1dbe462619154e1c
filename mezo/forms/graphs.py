"""CUDA graphs: a forward pass is captured once and replayed with new data, a new z and a new step.

    with Graphs().around(model):
        optimizer.step(lambda: model(**batch).loss)

A step of a large model launches thousands of kernels, and on a fast device it waits for Python to
do so. A graph launches them all at once. What changes from step to step reaches the kernels through
memory that stays where it is: the batch is copied into tensors of the graph, and the number of the
step into the tables that the noise kernels read (noise/live.py). Losses, logs and replays are those
of a run without graphs.

One graph is kept for each sign and each shape of the batch. A shape is captured the third time it
is seen, after two plain runs; the graph's first result is compared with a plain run. Whatever
cannot be captured runs plainly, and a warning says what it was and where.
"""

import logging
import math
import os
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from functools import wraps
from inspect import signature
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mezo.forms.reads import Reads
from mezo.interrupts import held
from mezo.noise import live

Function = Callable[[Any], Any]
_NEAR = 5e-2  # of the norm: a replay and a plain run may take other kernels, in 16 bits
_PLAIN = live.numbers_of(-1, [-1], -1)  # where no noise is drawn


class Backend(Protocol):
    """What captures and replays; `CudaGraphs`, or a stand-in on a CPU."""

    def warm(self, call: Callable[[], Any]) -> Any:
        """Return call(), which is made as the capture will make it."""

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return a function that replays the kernels of call(), and the tensors they write."""


class CudaGraphs:
    """torch.cuda.CUDAGraph, all in one memory pool and captured on one stream."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.failed: list[torch.cuda.CUDAGraph] = []  # the allocator may still refer to them

    def warm(self, call: Callable[[], Any]) -> Any:
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            found = call()
        before.wait_stream(self.stream)
        return found

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        capturing = torch.cuda.graph(graph, self.pool, self.stream, "thread_local")
        here = torch.cuda.stream(torch.cuda.current_stream(self.device))
        try:
            with here, capturing:  # `here`, since torch does not come back if the capture fails
                out = call()
        except BaseException:
            self.failed.append(graph)
            self._end_allocation()
            raise
        return graph.replay, out

    def _end_allocation(self) -> None:
        """Have the allocator leave the pool, which a failed capture does not do."""
        with suppress(AttributeError, RuntimeError):  # another torch, or it has left already
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self.pool)


@dataclass
class _Captured:
    """What is known of one kind of call."""

    function: Function
    seen: int = 0  # plain runs
    refused: bool = False
    inputs: Any = None
    tables: live.Tables | None = None
    replay: Callable[[], None] | None = None
    out: Any = None


@dataclass
class Graphs:
    """Forward passes, or calls of any function of a batch, replayed where they can be.

    `around(model)` captures the model's forward; `graphs(loss, batch)` captures loss(batch), for a
    function that is the same at each step. Either must do the same for all batches of the same
    shapes: values of tensors may differ, and everything else in the batch counts as its shape.
    The model's tensors must stay where they are. Use one object for one model.

    Args:
        most: The number of graphs that are kept at most, since each one takes memory for the
            activations of a forward pass. What comes later runs plainly.
        after: The number of plain runs before a capture.
        backend: What captures; by default CUDA graphs for a batch on a CUDA device, and nothing for
            any other batch.
    """

    most: int = 8
    after: int = 2
    backend: Backend | None = None
    captured: dict[Hashable, _Captured] = field(default_factory=dict)
    _functions: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # of `around`, by model
    _told: set[str] = field(default_factory=set)

    def __call__(self, function: Function, batch: Any) -> Any:
        """Return function(batch), by a replay if there is one for this kind of call."""
        place = self._place(batch)
        if place is None:
            return function(batch)
        key, numbers, mode = place
        key = (id(function), key)
        known = self.captured.get(key)
        if known is None:
            self._forget_rare()
            known = self.captured[key] = _Captured(function)
        if known.replay is not None:
            return self._replayed(known, batch, numbers)
        known.seen += 1
        if known.refused or known.seen <= self.after or self._full():
            return function(batch)
        return self._first(known, batch, numbers, mode)

    @contextmanager
    def around(self, model: torch.nn.Module) -> Iterator["Graphs"]:
        """Return a context in which calls of the model are replayed where they can be.

        Within it, a transformers model returns keys and values only if it is asked to: they would
        fill the graph's memory.
        """
        forward, own = model.forward, vars(model).get("forward")
        caches = "use_cache" in signature(forward).parameters
        active = [True]

        before, function = self._functions.get(id(model), (None, None))
        if before != forward:  # else the graphs of the last time are those of this time

            def function(given: tuple) -> Any:
                return forward(*given[0], **given[1])

            self._functions[id(model)] = forward, function

        @wraps(forward)
        def replayed(*args, **kwargs):
            if not active[0]:  # another package has kept a reference
                return forward(*args, **kwargs)
            if caches and not torch.is_grad_enabled():
                kwargs.setdefault("use_cache", False)
            return self(function, (args, kwargs))

        model.forward = replayed
        try:
            yield self
        finally:
            active[0] = False
            if vars(model).get("forward") is replayed:
                if own is None:
                    del model.forward
                else:
                    model.forward = own

    def _forget_rare(self) -> None:
        """Keep the graphs alone once very many kinds of calls have been seen."""
        if len(self.captured) >= 64 * self.most:
            self.captured = {k: c for k, c in self.captured.items() if c.replay is not None}
            self._tell(
                "no graph is captured for batches whose shapes, or numbers that are not tensors, "
                "do not come again: pad them to few lengths"
            )

    def _place(self, batch: Any) -> tuple[Hashable, live.Numbers, Reads | None] | None:
        """Return what identifies a call, its numbers and the mode around it; None: run plainly."""
        tensors: list[torch.Tensor] = []
        shape = _shape(batch, tensors)  # kernels would keep the values of tensors elsewhere
        device = next((x.device for x in tensors if x.dim()), None)
        if (
            device is None
            or any(x.device != device for x in tensors)
            or live.current() is not None
            or torch.is_grad_enabled()
        ):
            return None
        if _get_current_dispatch_mode() is not None:  # it would not see what a replay reads
            return None
        if self.backend is None:
            if device.type != "cuda":
                return None
            self.backend = CudaGraphs(device)
        mode, around, numbers = Reads.innermost(), None, _PLAIN
        if mode is not None:
            with held(), torch._C.DisableTorchFunction():  # or the mode would see each tensor
                found = mode.sequence(device)
            if found is None:
                return None
            around, numbers = found
        cast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        return (shape, device, around, cast), numbers, mode

    def _full(self) -> bool:
        full = sum(known.replay is not None for known in self.captured.values()) >= self.most
        if full:
            self._tell(f"{self.most} graphs are kept; batches of other shapes run without")
        return full

    def _first(self, known: _Captured, batch: Any, numbers: live.Numbers, mode: Any) -> Any:
        """Capture, and return the function's plain result, with which a replay is compared."""
        known.inputs, known.tables = _copied(batch), live.Tables(numbers)
        backend, tables, plain = self.backend, known.tables, None
        assert backend is not None

        def call() -> Any:
            if mode is not None:
                mode.forget()
            return known.function(known.inputs)

        try:
            torch.clear_autocast_cache()  # casts of weights are a part of the graph
            with live.using(tables):
                plain = _copied(backend.warm(call))
                tables.capturing = True
                torch.clear_autocast_cache()
                replay, known.out = backend.capture(call)
            torch.clear_autocast_cache()  # what was made in the capture has no values
            if mode is not None:
                mode.forget()
            replay()
            _check(known.out, plain)
        except RuntimeError as error:
            torch.clear_autocast_cache()
            if mode is not None:
                mode.forget()
            known.refused, known.inputs, known.tables, known.out = True, None, None, None
            self._tell(f"no graph, the forward pass runs plainly: {_where(error)}")
            return known.function(batch) if plain is None else plain
        known.replay = replay
        return plain

    def _replayed(self, known: _Captured, batch: Any, numbers: live.Numbers) -> Any:
        assert known.tables is not None
        assert known.replay is not None
        _copy_(known.inputs, batch)
        known.tables.set_(numbers)
        known.replay()
        return _copied(known.out)  # the next graph may write over it

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            logging.getLogger("mezo").warning("%s", line)


def _shape(given: Any, tensors: list[torch.Tensor]) -> Hashable:
    """Return what must be equal for a replay, and append the tensors to `tensors`."""
    if isinstance(given, torch.Tensor):
        tensors.append(given)
        return given.shape, given.dtype, given.device
    if isinstance(given, Mapping):
        return tuple((key, _shape(value, tensors)) for key, value in given.items())
    if isinstance(given, tuple | list):
        return tuple(_shape(value, tensors) for value in given)
    return given if isinstance(given, Hashable) else id(given)


def _copied(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return given.clone()
    if isinstance(given, Mapping):
        found = {key: _copied(value) for key, value in given.items()}
        return type(given)(**found) if is_dataclass(given) else found  # transformers'
    if type(given) in (tuple, list):
        return type(given)(map(_copied, given))
    return given


def _copy_(into: Any, given: Any) -> None:
    if isinstance(given, torch.Tensor):
        into.copy_(given, non_blocking=True)
    elif isinstance(given, Mapping):
        for key, value in given.items():
            _copy_(into[key], value)
    elif isinstance(given, tuple | list):
        for one, value in zip(into, given, strict=True):
            _copy_(one, value)


def _check(found: Any, plain: Any) -> None:
    """Raise RuntimeError if a replay gives another result than a plain run, but for rounding.

    transformers looks at the values of a mask to choose an attention kernel. It cannot look while
    capturing and takes the general kernel, so that the last bits may differ.
    """
    if isinstance(plain, torch.Tensor):
        same = (found == plain) | ((found != found) & (plain != plain))
        if plain.is_floating_point():
            off = torch.where(same, 0, found - plain)  # an infinity is equal, or it is far
            near = _norm(off) <= _NEAR * _norm(torch.where(plain.isfinite(), plain, 0))
        else:
            near = same.all()
        if not bool(near):
            raise RuntimeError("the graph gives another result than a plain run")
        if not bool(same.all()):
            logging.getLogger("mezo").info(
                "a graph's results differ from a plain run's in their rounding"
            )
    elif isinstance(plain, Mapping):
        for key, value in plain.items():
            _check(found[key], value)
    elif isinstance(plain, tuple | list):
        for one, value in zip(found, plain, strict=True):
            _check(one, value)
    elif found != plain and not (isinstance(plain, float) and math.isnan(plain)):
        raise RuntimeError("the function returns a number of Python that changes")


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _where(error: BaseException) -> str:
    """Return what went wrong and the line of the model or of the user at which it did."""
    what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    inside = (f"{os.sep}torch{os.sep}", f"{os.sep}mezo{os.sep}")
    frames = list(traceback.extract_tb(error.__traceback__))
    theirs = [f for f in frames if not any(part in f.filename for part in inside)]
    theirs = [f for f in theirs if f.name != "__torch_dispatch__"]  # a mode's own
    if not (theirs or frames):
        return what
    last = (theirs or frames)[-1]
    return f"{what} ({last.filename}:{last.lineno}, in {last.name})"
