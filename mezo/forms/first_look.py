"""A look at the closure before a run's first step: does it repeat, and does it leave weights alone?

The closure is called twice at theta, before anything has moved, with the default generators of
torch, numpy and Python put back afterwards. The first call is watched operation by operation, so
that a write to a trained weight is refused before it is made. A log never shows that a run was
looked at: neither weights nor draws change.
"""

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mezo.closures import Draws, Loss, number
from mezo.errors import InputError
from mezo.forms.direction import Direction, Row, replaced_by_pass
from mezo.forms.reads import eager, tensors
from mezo.forms.rounding import HALF
from mezo.interrupts import held
from mezo.noise.sharded import is_sharded, local

AGAIN = 64  # the step before which a closure is looked at the second time, at the earliest
_CLOSE = 4  # units in the last place by which two losses of one point may differ
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size: to add up bits
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_LOG = logging.getLogger("mezo")


def look_once(optimizer: Any, closure: Loss, direction: Direction) -> None:
    """Look at the closure, and note in `optimizer.watch` at which step to look again.

    What was well at first may change: a model that an evaluation leaves in train mode, for example.

    An offloaded model is not looked at, since each call would read all of its weights, and neither
    is a closure with an attribute `looks` that is False, as `mezo.rewards.closure` has it.

    A closure that is refused leaves no step in the log, because nothing has moved. Of several
    processes it leaves a refused step, because the others wait for this one's estimate.

    Raises InputError as `look` does, and whatever the closure raises.
    """
    watch = optimizer.watch
    watch.looks, watch.again = False, -1
    costly = not getattr(closure.closure, "looks", True)
    if costly or type(direction).at is Direction.at:  # offloaded
        return
    try:
        watch.repeats = look(closure, direction, watch.told)
        if watch.repeats:  # or it has been told
            watch.again = max(AGAIN, 2 * optimizer.settings["step"])
    except BaseException as error:
        watch.looks = True  # at the next estimate
        if isinstance(error, InputError) and getattr(optimizer.processes, "size", 1) == 1:
            optimizer.directions.clear()
        else:
            optimizer.refuse(direction)
        raise


def look(closure: Loss, direction: Direction, told: set[str]) -> bool:
    """Call the closure twice at theta, and warn if its losses differ; returns whether they do not.

    Raises InputError if the closure writes to a trained weight, replaces one or calls `backward`.
    The weights are then what they were: only what is written past torch's functions cannot be put
    back. Operations on sharded weights are not watched, but their values are compared all the same.
    """
    rows = direction.rows
    draws, seen, other = Draws(), [Seen(rows), Seen(rows)], OtherPadding(rows)
    loss = copy.copy(closure)
    loss.draws = Draws() if closure.draws is not None else None
    summed = any("low_rank" in state for state in direction.states.values())
    home = direction.home if direction.moves_weights or summed else nullcontext
    with draws.kept(), eager():
        with _unchanged(rows), home(), seen[0]:
            first, dtype, kept = _called(loss)
        drew = draws.drew()
        with home(), seen[1]:
            second, *_ = _called(loss)
        if kept:
            _warn(
                told,
                "the closure turns gradients on (torch.enable_grad), and keeps every activation of "
                "the forward pass for a backward pass that MeZO never makes: leave it out",
            )
        half = any(row.tensor.dtype in HALF for row in rows)
        if seen[0].averages:
            _warn(
                told,
                "the forward pass updates running averages, as BatchNorm does in train mode: they "
                "are no trained weights, and the run log does not rebuild them; call model.eval()",
            )
        if not seen[0].read and not any(is_sharded(row.tensor) for row in rows):
            _warn(
                told,
                "the closure reads none of the trained parameters, so that nothing is learned: it "
                "may use a copy of the model, or what was computed before the step",
            )
        is_close = partial(_is_close, first, dtype=dtype, loose=half and not drew)
        if not is_close(second):
            _warn(told, _told(first, second, drew, closure.draws is not None))
            return False
        if drew:
            return True
        _check_read(*seen)
        if seen[0].padding:
            with home(), other:
                third, *_ = _called(loss)
            if not is_close(third):
                _warn_of_padding(seen[0].padding, told)
    return True


def _check_read(first: "Seen", second: "Seen") -> None:
    if odd := sorted(first.read ^ second.read):
        raise InputError(
            f"the forward pass reads the trained parameter {odd[0]} in one of two equal calls "
            "alone: it replaces the parameter, or keeps what it has computed from it; leave that "
            "out, since it hides the perturbation"
        )


def _warn(told: set[str], line: str) -> None:
    """Log a warning that was not told before."""
    if line not in told:
        told.add(line)
        _LOG.warning("%s", line)


def _warn_of_padding(padding: Mapping[str, int], told: set[str]) -> None:
    for name, index in padding.items():
        _warn(
            told,
            f"the loss depends on row {index} of {name} (padding_idx), which back-propagation "
            "would leave as it is: here it is perturbed and updated like every other row; mask the "
            "padding, or make the embedding without padding_idx",
        )


def _called(loss: Loss) -> tuple[float, torch.dtype, bool]:
    """Return the loss, the dtype that it was computed in, and whether it kept its graph."""
    try:
        found = loss.raw()
    except RuntimeError as error:
        if "does not require grad and does not have a grad_fn" not in str(error):
            raise
        raise InputError(
            "the closure calls backward(), and MeZO needs no gradients: return the loss alone"
        ) from error
    dtype = getattr(found, "dtype", torch.float32)  # a float is most often made of a float32
    dtype = dtype if getattr(dtype, "is_floating_point", False) else torch.float32
    return number(found), dtype, bool(getattr(found, "requires_grad", False))


def _is_close(first: float, second: float, *, dtype: torch.dtype, loose: bool) -> bool:
    """Return whether two losses of one point differ by no more than roundings.

    `loose` is for 16-bit weights where nothing was drawn: kernels may add in another order then.
    """
    if not (math.isfinite(first) and math.isfinite(second)):
        return True  # the step will be refused for it
    unit = torch.finfo(dtype).eps * _CLOSE
    if loose:
        unit = max(unit, torch.finfo(torch.bfloat16).eps)
    return abs(first - second) <= unit * max(abs(first), abs(second))


def _told(first: float, second: float, drew: bool, common: bool) -> str:
    found = f"the loss at the same weights is {first:.6g} in one call and {second:.6g} in the next"
    if common:
        return (
            f"{found}, though both had the same random numbers: the closure must compute the loss "
            "of one batch, and draw from the default generators of torch, numpy and Python alone"
        )
    if drew:
        return (
            f"{found}, which drowns the difference that MeZO measures: the closure draws random "
            "numbers; call model.eval() if that is dropout, or pass common_random_numbers=True if "
            "the loss draws noise by design"
        )
    return (
        f"{found}, which drowns the difference that MeZO measures, though no random numbers were "
        "drawn: each call must compute the loss of the same batch; fetch the batch before the "
        "step, and call model.eval(), as modules may change with each pass in train mode"
    )


@contextmanager
def _unchanged(rows: Sequence[Row]) -> Iterator[None]:
    """InputError if what is done within changes a trained weight; its storage is put back."""
    before = [_State(row) for row in rows]
    try:
        yield
    finally:
        replaced = [state.row.name for state in before if state.put_back_()]
        graded = [state.row.name for state in before if state.put_grad_back_()]
    if replaced:
        raise replaced_by_pass(replaced[0])
    if graded:
        raise InputError(
            f"the closure calls backward(), which gives {graded[0]} a gradient that MeZO does not "
            "need: return the loss alone"
        )
    for state in before:
        name, tensor, _ = state.row
        if _digest(tensor) != state.digest:
            raise InputError(
                f"the forward pass writes to the trained parameter {name} past torch's functions, "
                "and its values are no longer those before: load the model again, and freeze it"
            )
    if frozen := [state.row.name for state in before if not state.row.tensor.requires_grad]:
        _LOG.warning(
            "the forward pass sets requires_grad of %s to False: this step trains it, and the next "
            "one will not; leave requires_grad as it is while the run lasts",
            frozen[0],
        )


class _State:
    """What a trained parameter is before the closure is called."""

    def __init__(self, row: Row):
        self.row, self.alias, self.grad = row, row.tensor.detach(), row.tensor.grad
        self.summed = None if self.grad is None else self.grad._version  # backward adds to it
        self.digest = _digest(row.tensor)

    def put_grad_back_(self) -> bool:
        """Give the parameter its own gradient again; return whether it had another or changed."""
        grad, self.row.tensor.grad = self.row.tensor.grad, self.grad
        return grad is not self.grad or (grad is not None and grad._version != self.summed)

    def put_back_(self) -> bool:
        """Give the parameter its own storage again; return whether it had another one."""
        here, there = local(self.row.tensor), local(self.alias)
        if here.data_ptr() == there.data_ptr() and here.dtype == there.dtype:
            return False
        self.row.tensor.data = self.alias
        return True


def _digest(tensor: torch.Tensor) -> int:
    """Return the sum of all elements' bits, modulo their width: one pass over them, and no copy.

    On a CPU, torch would copy them into 64 bits for a sum that is wider than they are.
    """
    part = local(tensor).detach()
    word = _WORDS[part.element_size()]
    return int(part.view(word).sum(dtype=word)) if part.numel() else 0


class _Watching(TorchDispatchMode):
    """A mode that knows by its memory which trained parameter a tensor is, or is a view of."""

    def __init__(self, rows: Iterable[Row]):
        super().__init__()
        self._spans: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
        for name, tensor, _ in rows:
            if not is_sharded(tensor) and tensor.numel():
                place, start, end = _span(tensor)
                self._spans.setdefault(place, []).append((start, end, name))

    def name_of(self, x: torch.Tensor) -> str | None:
        """Return the name of the trained parameter whose memory x shares, if there is one."""
        if type(x) not in _PLAIN or x.is_meta or x.layout != torch.strided or not x.numel():
            return None
        place, start, end = _span(x)
        found = [n for first, last, n in self._spans.get(place, ()) if first < end and start < last]
        return found[0] if found else None


class Seen(_Watching):
    """Notes which trained parameters are read, and refuses operations that would write to one.

    Attributes:
        read: The names of the parameters that were read.
        padding: By name, the padding_idx of trained embeddings of which that row was looked up.
        averages: Whether a batch norm updated its running averages.
    """

    def __init__(self, rows: Iterable[Row]):
        super().__init__(rows)
        self.read: set[str] = set()
        self.padding: dict[str, int] = {}
        self.averages = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with held(), torch._C.DisableTorchFunction():  # or `Reads` sees it, too
            self._look(function, args, kwargs)
        return function(*args, **kwargs)

    def _look(self, function: Any, args: tuple, kwargs: dict) -> None:
        """Note what the operation reads. InputError if it writes to a trained weight."""
        if function._schema.is_mutable:
            for argument, given in _bound(function._schema, args, kwargs):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._refuse(given, function._schema.name.removeprefix("aten::"))
        self.averages |= _is_averaging(function, args)
        found = map(self.name_of, tensors((args, kwargs)))
        names = {name for name in found if name is not None}
        self.read |= names
        if names and _is_padded(function, args):
            padded = bool((args[1] == args[2]).any())
            self.padding |= dict.fromkeys(names, args[2]) if padded else {}

    def _refuse(self, given: Any, what: str) -> None:
        for x in tensors(given):
            if (name := self.name_of(x)) is not None:
                raise InputError(
                    f"the forward pass writes to the trained parameter {name} ({what}): freeze it, "
                    "or leave that out (an embedding's max_norm, an assignment in forward)"
                )


class OtherPadding(_Watching):
    """Gives other numbers for padding_idx: where padding is masked, the loss remains the same."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        with held(), torch._C.DisableTorchFunction():
            if _is_padded(function, args) and self.name_of(args[0]) is not None:
                found[args[1] == args[2]] += 1
        return found


def _is_padded(function: Any, args: tuple) -> bool:
    """Return whether an operation is a lookup in an embedding with a padding_idx."""
    lookup = function is torch.ops.aten.embedding.default
    return lookup and len(args) > 2 and args[2] >= 0


def _is_averaging(function: Any, args: tuple) -> bool:
    """Return whether an operation is a batch norm in train mode that has running averages."""
    named = "batch_norm" in function._schema.name and "backward" not in function._schema.name
    return named and len(args) > 5 and args[3] is not None and args[5] is True


def _bound(schema: Any, args: tuple, kwargs: dict) -> Iterator[tuple[Any, Any]]:
    """Yield every argument of an operation's schema that was given, and its value."""
    for i, argument in enumerate(schema.arguments):
        if i < len(args) and not argument.kwarg_only:
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _span(x: torch.Tensor) -> tuple[tuple[torch.device, int], int, int]:
    """Return a tensor's storage, and the first byte and the end of what it covers there."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    size, start = x.element_size(), int(x.storage_offset()) * x.element_size()
    return (x.device, x.untyped_storage().data_ptr()), start, start + (int(last) + 1) * size
