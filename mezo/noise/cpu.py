"""The noise contract as a numba kernel: z is drawn into a buffer of 16 KB and used at once.

Bit-equal to definition.py, and about as fast as the memory allows. No fused multiply-add can occur:
numba lets LLVM contract only under fastmath, which stays off. The kernels hold no Python lock, so
long tensors are split over torch's number of threads; a numba parallel loop would bring a second
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
from numba.extending import intrinsic, overload

from mezo.noise.cpu_draws import (
    LANES,
    ROW,
    bits_float,
    float_bits,
    gaussian,
    gaussian16,
    wide,
    words_of,
)
from mezo.noise.cpu_halves import float_to_half, float_to_half_by, half_to_float
from mezo.noise.definition import DISTRIBUTIONS

_GAUSSIAN, _RADEMACHER, _GAUSSIAN16 = range(3)  # their codes
_NEAREST = 3  # of the roundings in mezo.noise, the one that takes no bits
_SPLIT = 2**16  # elements below which a second thread costs more than it brings
_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STORED = (np.float32, np.uint16, np.uint16)  # what the kernel sees of each kind
_FIELDS = {"address": "u8", "source": "u8", "n": "i8", "offset": "i8", "k0": "u8", "k1": "u8"}
_TENSOR = np.dtype(list(_FIELDS.items()))  # `source` is where the old values are read


def _working(x, out):
    """Where the numbers are worked on: float32 in `out` itself, chosen when it is compiled."""


@overload(_working)
def _choose_working(x, out):
    if out.dtype == types.float32:
        return lambda x, out: out
    return lambda x, out: x


@numba.njit(nogil=True, cache=True)
def _load(x, source, kind):
    wide()
    if kind == 0:
        for j in range(x.size):
            x[j] = source[j]
    elif kind == 1:
        for j in range(x.size):
            x[j] = half_to_float(1, source[j])
    else:
        for j in range(x.size):
            x[j] = half_to_float(2, source[j])


@numba.njit(nogil=True, cache=True)
def _store(out, x, kind):
    wide()
    if kind == 1:
        for j in range(x.size):
            out[j] = float_to_half(1, x[j])
    elif kind == 2:
        for j in range(x.size):
            out[j] = float_to_half(2, x[j])


@numba.njit(nogil=True, cache=True)
def _round(x, kind, rounding, row, words, step, probe, k0, k1):
    """Numbers of row `row` and on, to 16 bits and back."""
    wide()
    if rounding == _NEAREST:
        for j in range(x.size):
            x[j] = half_to_float(kind, float_to_half(kind, x[j]))
        return
    probe = probe | (np.uint64(rounding) << np.uint64(24))
    for begin in range(0, x.size, ROW):
        if begin == 0 or (row + begin // ROW) % 2 == 0:
            block = np.uint64((row + begin // ROW) // 2) * np.uint64(LANES)
            words_of(words, block, step, probe, k0, k1, x[:0], LANES)
        shift = np.int32(16 * ((row + begin // ROW) % 2))  # & 31: LLVM may take 32 bits for it
        part = x[begin : begin + ROW]
        for j in range(ROW):
            bits = np.int32(words[j] >> (shift & np.int32(31))) & np.int32(0xFFFF)
            part[j] = half_to_float(kind, float_to_half_by(kind, part[j], bits))


@numba.njit(nogil=True, cache=True)
def _add_normals(
    x, ahead, z, words, short, begin, row, scale, coefficient, drawn, step, probe, k0, k1
):
    """x <- x * scale + coefficient * z, element `begin` of row `row` on; `drawn`: z is there.

    `short`: a number takes 16 bits, and words make two rows, of which `row` is the first.
    `ahead` is what will be moved after x.
    """
    wide()
    if not drawn:
        made = 2 * ROW if short else ROW
        for k in range(0, z.size, made):
            group = np.uint64((row + k // ROW) // 2 if short else row + k // ROW)
            block, need = group * np.uint64(LANES), begin + x.size - k
            words_of(words, block, step, probe, k0, k1, ahead[k : k + made], need)
            if short:
                gaussian16(z[k : k + made], words, need)
            else:
                gaussian(z[k : k + made], words, need)
    noise = z[begin : begin + x.size]
    for j in range(x.size):
        x[j] = x[j] * scale + coefficient * noise[j]


@numba.njit(nogil=True, cache=True)
def _add_signs(x, ahead, words, begin, row, scale, coefficient, group, step, probe, k0, k1):
    """Do the same with signs; `words` belong to `group`. Return the group of the new words."""
    wide()
    if row // 32 != group:
        group = row // 32
        block, need = np.uint64(group) * np.uint64(LANES), begin + x.size
        words_of(words, block, step, probe, k0, k1, ahead, need)
    bits, i = float_bits(coefficient), 0
    while i < x.size:
        part = x[i : min(x.size, i + ROW - begin)]
        word = words[begin : begin + part.size]
        shift = np.int32(31 - row % 32)
        for j in range(part.size):  # the mask tells LLVM that 32 bits are enough for the shift
            sign = np.int32(word[j] << (shift & np.int32(31))) & np.int32(-(2**31))
            part[j] = part[j] * scale + bits_float(np.int32(bits ^ sign))
        i, row, begin = i + part.size, row + 1, 0
    return group


@numba.njit(nogil=True, cache=True)
def _apply(out, source, kind, in_place, offset, distribution, moves, k0, k1):
    """out <- moves of source, elements `offset` and on of a tensor.

    float32 (kind 0), or the bits of bfloat16 (1) or float16 (2) as uint16. Some rows at a time are
    kept in the cache for all the moves: four (a word rounds two), or all that the words of a
    rademacher direction make, if it is not the only direction.
    """
    wide()
    rademacher, short = distribution == _RADEMACHER, distribution == _GAUSSIAN16
    alone = True
    for m in range(1, moves.size):
        alone &= moves[m].step == moves[0].step and moves[m].probe == moves[0].probe
    chunk = 4 if alone or not rademacher else 32
    x, z = np.empty(chunk * ROW, np.float32), np.empty(chunk * ROW, np.float32)
    words, bits = np.empty(ROW, np.int32), np.empty(ROW, np.int32)
    i, n, group = 0, out.size, -1
    while i < n:
        count = min(chunk * ROW - (offset + i) % (chunk * ROW), n - i)
        row, begin = (offset + i) // ROW, (offset + i) % ROW
        if short and row % 2:
            row, begin = row - 1, begin + ROW
        made = 2 * ROW if short else ROW
        size = -(-(begin + count) // made) * made
        ahead = source[i + count : i + count + chunk * ROW]
        part = _working(x[begin : begin + count], out[i : i + count])
        if kind != 0 or not in_place:
            _load(part, source[i : i + count], kind)
        for m in range(moves.size):
            move = moves[m]
            step, probe = np.uint64(move.step), np.uint64(move.probe)
            scale, coefficient = np.float32(move.scale), np.float32(move.coefficient)
            same = m and move.step == moves[m - 1].step and move.probe == moves[m - 1].probe
            how, where = (scale, coefficient), (step, probe, k0, k1)
            if rademacher:
                group = group if alone or same else -1
                group = _add_signs(part, ahead, words, begin, row, *how, group, *where)
            else:
                _add_normals(part, ahead, z[:size], words, short, begin, row, *how, same, *where)
            if kind != 0 and move.rounding != 0:
                _round(x[:size], kind, move.rounding, row, bits, step, probe, k0, k1)
        _store(out[i : i + count], part, kind)
        i += count


@numba.njit(nogil=True, cache=True)
def _apply_rows(out, rows, kind, distribution, moves, k0, k1):
    """out[k] is row rows[k] of a tensor."""
    wide()
    for k in range(rows.size):
        _apply(out[k], out[k], kind, True, rows[k] * out.shape[1], distribution, moves, k0, k1)


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
        _apply(part, source, kind, in_place, offset + start, distribution, own, one.k0, one.k1)


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
            _apply(*whole, *how)

        return _in_parallel(run, out.size, _SPLIT)
    out, index = out.reshape(len(rows), -1), rows.numpy()

    def run_rows(begin: int, end: int) -> None:
        _apply_rows(out[begin:end], index[begin:end], kind, *how)

    _in_parallel(run_rows, len(rows), -(-_SPLIT // out.shape[1]))


class Gathered(NamedTuple):
    """What `apply_all_` knows of tensors of one dtype."""

    places: np.ndarray  # of _TENSOR
    like: np.ndarray  # an empty array of the type that they are stored in
    kind: int
    elements: int  # of all of them


def gather(tensors: Sequence[torch.Tensor], keys, offsets) -> Gathered:
    """Return what `apply_all_` takes, for tensors of one dtype that `supports` accepts."""
    kind = _KIND[tensors[0].dtype]
    places = np.empty(len(tensors), _TENSOR)
    places["address"] = places["source"] = [tensor.data_ptr() for tensor in tensors]
    places["n"] = [tensor.numel() for tensor in tensors]
    places["offset"] = offsets
    places["k0"], places["k1"] = np.array(keys, np.uint64).T
    return Gathered(places, np.empty(0, _STORED[kind]), kind, int(places["n"].sum()))


def write_all_(outs: Sequence[torch.Tensor], gathered: Gathered, moves, distribution: str) -> None:
    """Set contiguous tensors to what was gathered after the moves; those gathered stay as they are.

    The caller has looked that they lie where they did.
    """
    places = gathered.places.copy()
    places["address"] = [out.data_ptr() for out in outs]
    apply_all_(gathered._replace(places=places), moves, distribution)


def apply_all_(gathered: Gathered, moves: np.ndarray, distribution: str) -> None:
    """Do what `mezo.noise.apply_all_` does, for what was gathered."""
    places, like, kind, count = gathered
    what = places, like, kind, DISTRIBUTIONS[distribution].code, moves
    if count <= _SPLIT or torch.get_num_threads() == 1:
        _apply_all(*what, 0, count)
    else:
        _in_parallel(partial(_apply_all, *what), count, _SPLIT)


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
