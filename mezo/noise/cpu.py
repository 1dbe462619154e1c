"""The noise contract on a CPU: numba kernels, and which tensors they move, in how many threads.

Bit-equal to definition.py, and about as fast as the memory allows. The kernels hold no Python lock,
so long tensors are split over torch's number of threads; a numba parallel loop would bring a second
thread pool that aborts when two Python threads meet in it.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from mezo.noise.cpu_draws import wide
from mezo.noise.cpu_moves import (
    GAUSSIAN16,
    RADEMACHER,
    add_kept,
    add_kept_to,
    apply,
    apply_rows,
    copy,
    draw,
)
from mezo.noise.definition import DISTRIBUTIONS

_SPLIT = 2**16  # elements below which a second thread costs more than it brings
_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STORED = (np.float32, np.uint16, np.uint16)  # what the kernel sees of each kind
_FIELDS = {"address": "u8", "source": "u8", "n": "i8", "offset": "i8", "k0": "u8", "k1": "u8"}
_TENSOR = np.dtype(list(_FIELDS.items()))  # `source` is where the old values are read


def _at(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uint64), codegen


_pointer: Any = intrinsic(_at)


@numba.njit(nogil=True, cache=True)
def _apply_all(tensors, like, kind, distribution, moves, begin, end):
    """The moves of tensors that lie one behind the other, from element `begin` to `end` of all.

    `moves` has a row for each of them, or one for all; `like` has the type that they are stored in.
    """
    wide()
    first = 0
    for t in range(tensors.size):
        one = tensors[t]
        n, offset, in_place = one.n, one.offset, one.source == one.address
        start, stop = max(begin - first, 0), min(end - first, n)
        first += n
        if start >= stop:
            continue
        part = numba.carray(_pointer(one.address), n, like.dtype)[start:stop]
        source = numba.carray(_pointer(one.source), n, like.dtype)[start:stop]
        own = moves[t if moves.shape[0] > 1 else 0]
        apply(part, source, kind, in_place, offset + start, distribution, own, one.k0, one.k1)


@numba.njit(nogil=True, cache=True)
def _apply_kept(tensors, like, z, starts, new, short, moves, begin, end):
    """`_apply_all` for float32 and moves along one z, which is drawn into `z` if it is new."""
    wide()
    first, step, probe = 0, np.uint64(moves[0].step), np.uint64(moves[0].probe)
    for t in range(tensors.size):
        one = tensors[t]
        n, offset = one.n, one.offset
        start, stop = max(begin - first, 0), min(end - first, n)
        first += n
        if start >= stop:
            continue
        out = numba.carray(_pointer(one.address), n, like.dtype)[start:stop]
        source = numba.carray(_pointer(one.source), n, like.dtype)[start:stop]
        noise = z[starts[t] + start : starts[t] + stop]
        if new:
            draw(noise, offset + start, short, step, probe, one.k0, one.k1)
        for m in range(moves.size):
            how = np.float32(moves[m].scale), np.float32(moves[m].coefficient)
            if m == 0 and one.source != one.address:
                add_kept_to(out, source, noise, *how)
            else:
                add_kept(out, noise, *how)


@numba.njit(nogil=True, cache=True)
def _copy_all(tensors, like, back):
    """Copy tensors from `address` to `source`, or back."""
    for t in range(tensors.size):
        one = tensors[t]
        here = numba.carray(_pointer(one.address), one.n, like.dtype)
        there = numba.carray(_pointer(one.source), one.n, like.dtype)
        if back:
            copy(here, there)
        else:
            copy(there, here)


@cache
def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel moves contiguous tensors of this kind."""
    return device.type == "cpu" and dtype in _KIND


def supports(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and takes(tensor.device, tensor.dtype)


def apply_(tensor, key, moves, distribution, offset, source, rows) -> None:
    """Do what `mezo.noise.apply_` does, for tensors that `supports` accepts."""
    kind, out = _KIND[tensor.dtype], _array(tensor)
    how = (DISTRIBUTIONS[distribution].code, moves, np.uint64(key[0]), np.uint64(key[1]))
    if rows is None:
        out, given = out.reshape(-1), (out if source is None else _array(source)).reshape(-1)

        def run(begin: int, end: int) -> None:
            whole = out[begin:end], given[begin:end], kind, source is None, offset + begin
            apply(*whole, *how)

        return _in_parallel(run, out.size, _SPLIT)
    out, index = out.reshape(len(rows), -1), rows.numpy()

    def run_rows(begin: int, end: int) -> None:
        apply_rows(out[begin:end], index[begin:end], kind, *how)

    _in_parallel(run_rows, len(rows), -(-_SPLIT // out.shape[1]))


class Copies(NamedTuple):
    """How one tensor holds copies of many."""

    sizes: list[int]  # elements, up to the next one
    starts: np.ndarray  # where each begins, and the end
    shaped: list[tuple]  # place, shape, strides and beginning of those that are no whole piece


class Gathered(NamedTuple):
    """What `apply_all_` knows of tensors of one dtype."""

    places: np.ndarray  # of _TENSOR
    like: np.ndarray  # an empty array of the type that they are stored in
    kind: int
    elements: int  # of all of them
    dtype: torch.dtype
    copies: Copies
    kept: Any = None  # mezo.noise.Kept
    slots: Any = None  # the places of these tensors in it, and the first element of each


def gather(tensors: Sequence[torch.Tensor], keys, offsets) -> Gathered:
    """Return what `apply_all_` takes, for tensors of one dtype that `supports` accepts."""
    dtype = tensors[0].dtype
    kind = _KIND[dtype]
    places = np.empty(len(tensors), _TENSOR)
    places["address"] = places["source"] = [tensor.data_ptr() for tensor in tensors]
    places["n"] = sizes = [tensor.numel() for tensor in tensors]
    places["offset"] = offsets
    places["k0"], places["k1"] = np.array(keys, np.uint64).T
    like = np.empty(0, _STORED[kind])
    return Gathered(places, like, kind, sum(sizes), dtype, _copies(tensors, sizes))


def _copies(tensors: Sequence[torch.Tensor], elements: Sequence[int]) -> Copies:
    line = 64 // tensors[0].dtype.itemsize  # a copy begins where torch would let it begin
    sizes = [-(-n // line) * line for n in elements]
    starts = np.cumsum([0, *sizes])
    shaped = [
        (i, (x.shape, x.stride(), int(start)))
        for i, (x, start, size) in enumerate(zip(tensors, starts, sizes, strict=False))
        if x.shape != (size,)
    ]
    return Copies(sizes, starts, shaped)


def keep(gathered: Gathered, keys: Sequence[tuple[int, int]], kept) -> Gathered:
    """Return the same, where z is kept for the next move along it."""
    if gathered.kind != 0:
        return gathered
    slots = [np.array([of[key] for key in keys], np.int64) for of in (kept.places, kept.starts)]
    return gathered._replace(kept=kept, slots=slots)


def moved_all(gathered: Gathered, moves, distribution: str) -> list[torch.Tensor]:
    """Return what was gathered after the moves, in new tensors that share their memory.

    The caller has looked that the tensors lie where they did.
    """
    places, copies = gathered.places.copy(), gathered.copies
    out = torch.empty(int(copies.starts[-1]), dtype=gathered.dtype)
    places["address"] = out.data_ptr() + copies.starts[:-1] * gathered.dtype.itemsize
    apply_all_(gathered._replace(places=places), moves, distribution)
    found = list(out.split(copies.sizes))
    for i, how in copies.shaped:
        found[i] = found[i].as_strided(*how)
    return found


def apply_all_(gathered: Gathered, moves: np.ndarray, distribution: str) -> None:
    """Do what `mezo.noise.apply_all_` does, for what was gathered."""
    code, kept, first = DISTRIBUTIONS[distribution].code, gathered.kept, moves[0, 0]
    what = gathered.places, gathered.like
    alone = kept is not None and len(moves) == 1 and code != RADEMACHER
    if alone and len({(step, probe) for step, probe, *_ in moves[0].tolist()}) == 1:
        (which, starts), z = gathered.slots, kept.z
        if z is None:
            z = kept.z = np.empty(sum(kept.sizes), np.float32)
        known = np.uint64(int(first["step"]) << 32 | int(first["probe"]) << 8 | (code + 1))
        new = bool((kept.drawn[which] != known).any())
        if new:
            kept.drawn[which] = 0  # until it has all been drawn
        run = partial(_apply_kept, *what, z, starts, new, code == GAUSSIAN16, moves[0])
    else:
        run = partial(_apply_all, *what, gathered.kind, code, moves)
    if gathered.elements <= _SPLIT or torch.get_num_threads() == 1:
        run(0, gathered.elements)
    else:
        _in_parallel(run, gathered.elements, _SPLIT)
    if run.func is _apply_kept and new:
        kept.drawn[which] = known


class Aside:
    """Copies of what was gathered, which is perturbed from them and put back.

    It refers to the memory of the tensors, so that there is something to be put back in any case.
    """

    def __init__(self, gathered: Gathered, tensors: Sequence[torch.Tensor]):
        self.tensors = [x.detach() for x in tensors]
        size, starts = gathered.dtype.itemsize, gathered.copies.starts
        self.memory = torch.empty(int(starts[-1]), dtype=gathered.dtype)
        places = gathered.places.copy()
        places["source"] = self.memory.data_ptr() + starts[:-1] * size
        self.gathered = gathered._replace(places=places)

    def save(self) -> None:
        _copy_all(self.gathered.places, self.gathered.like, False)

    def perturb_(self, moves: np.ndarray, distribution: str) -> None:
        """Set the tensors to their copies after the moves."""
        apply_all_(self.gathered, moves.reshape(1, -1), distribution)

    def restore_(self) -> None:
        _copy_all(self.gathered.places, self.gathered.like, True)


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy()


def _in_parallel(run: Callable[[int, int], None], count: int, quantum: int) -> None:
    """Call run(begin, end) over [0, count), split over threads if there is enough to do."""
    threads = min(torch.get_num_threads(), -(-count // quantum))
    if threads <= 1:
        return run(0, count)
    size = -(-count // (threads * quantum)) * quantum
    spans = [(start, min(start + size, count)) for start in range(0, count, size)]
    pool = _pool(os.getpid(), threads)
    futures = [pool.submit(run, *span) for span in spans]
    for future in futures:
        future.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the process's thread pool; a forked child has none of its parent's threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mezo-noise")
