"""Products with a matrix plus a product of small factors, for one sign or for both.

    x W' + b   becomes   x W' + [b + (x V) L'],   L = (A + sign eps U) / sqrt(rank)

The bracket (rows, m) is computed first, and the product with W is added to it in place. Both signs
can share one forward pass over the batch and its copy: the first half of the rows uses L of +, the
second half that of -. Rows are recognised by their number, either that of the batch or that of a
batch flattened to two dimensions. A tensor that fits neither is refused, and one_pass.py compares
the losses with those of two passes before it relies on them.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from mezo.forms.one_pass import Unpaired
from mezo.forms.reads import LOOKUP, Reads, tensors
from mezo.forms.scratch import Moved
from mezo.noise import live
from mezo.noise.live import Numbers
from mezo.noise.sharded import is_sharded

if TYPE_CHECKING:
    pass

Factors = tuple[torch.Tensor, torch.Tensor]  # right (n, rank), and left (signs, m, rank)
_MATMUL = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


class Products(Reads):
    """Linear layers, `x @ W`, Conv1D and embeddings use the factors; halves handle everything else.

    There is one half per sign. With two halves, `batch` is the number of rows of both together.
    """

    def __init__(self, perturbed: Any, halves: Sequence[Moved], signs: Sequence[int], batch: int):
        super().__init__(perturbed)
        self.perturbed, self.halves, self.signs, self.batch = perturbed, halves, signs, batch
        self._all: dict[str, Factors] | None = None  # of all matrices, once one is read

    def call(self, function, args: tuple, kwargs: dict):
        found = _product(function, args, kwargs)
        if found is not None and self._is_matrix(*found):
            return self._multiply(*found)
        if function is LOOKUP:
            return self._lookup(*args, **kwargs)
        if len(self.halves) == 1:
            return self.halves[0].call(function, args, kwargs)
        given = list(tensors((args, kwargs)))
        # parameters of three or more dimensions may be experts', which reorder the tokens
        flat = all(x.dim() < 3 for x in given if id(x) in self.rows)
        mine = {id(x) for x in given if self._is_rows(x, flat)}
        plus, minus = (
            half.call(function, _part(args, i, mine), _part(kwargs, i, mine))
            for i, half in enumerate(self.halves)
        )
        name = getattr(function, "__name__", "a function")
        if all(self._is_fixed(x) for x in given) and _is_vector(plus):
            return self._kept(name, plus, minus)
        return self._joined(plus, minus, bool(mine), name)

    def _is_fixed(self, x: torch.Tensor) -> bool:
        return id(x) in self.rows or isinstance(x, torch.nn.Parameter)

    def _kept(self, name: str, plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
        """Register a result of parameters alone, such as 1 + weight: each half reads its own."""
        for reads, value in ((self, plus), *zip(self.halves, (plus, minus), strict=True)):
            reads.rows[id(plus)] = (f"(by {name})", value, None)
        self.watch(plus)
        return plus

    def sequence(self, device: torch.device) -> tuple[Hashable, Numbers] | None:
        of, tensors = self.perturbed, [tensor for _, tensor, _ in self.rows.values()]
        interval = of.settings["interval"]
        first = of.step - of.step % interval
        if of.placed is not None or any(x.device != device or is_sharded(x) for x in tensors):
            return None
        if first == of.step and interval > 1:  # U and V would have one step: which is which?
            return None
        kept = [of.states.get(x, {}).get("low_rank") for x in tensors]
        where = (
            tuple([x.data_ptr() for x in tensors]),
            tuple([x is not None and x.data_ptr() for x in kept]),
        )
        options = tuple(of.settings[name] for name in ("rank", "interval", "distribution"))
        numbers = {"step": of.step, "probe": of.probe, "first": first}
        return (
            "low rank",
            self.batch,
            tuple(self.signs),
            of.eps,
            of.probe,
            options,
            where,
        ), numbers

    def __exit__(self, *raised):
        for half in self.halves:
            half.settle()
        return super().__exit__(*raised)

    def forget(self) -> None:
        self._all = None
        for half in self.halves:
            half.forget()
        self.perturbed.forget()

    def know(self, x: torch.Tensor, row: tuple[str, torch.Tensor, Any]) -> None:
        for reads in (self, *self.halves):
            reads.rows[id(x)] = row

    def _is_matrix(self, x, weight, bias, transposed: bool) -> bool:
        known = isinstance(x, torch.Tensor) and x.dim() > 0 and id(x) not in self.rows
        vector = bias is None or (isinstance(bias, torch.Tensor) and bias.dim() == 1)
        return known and vector and id(weight) in self.rows and weight.dim() == 2

    def _factors(self, weight: torch.Tensor, dtype: torch.dtype):
        """Return right (n, rank), left (halves, m, rank) and the matrix (m, n), in `dtype`."""
        name, tensor, _ = self.rows[id(weight)]
        self.read.add(name)
        self.perturbed.dtypes.add(dtype)
        found = None
        if live.current() is None:  # a graph draws its own
            if self._all is None:
                self._all = self.perturbed.all_factors(self.signs)
            found = self._all.get(name)
        right, left = found or self.perturbed.factors(name, tensor, self.signs)
        if right.dtype == dtype == tensor.dtype:
            return right, left, tensor.detach()
        return right.to(dtype), left.to(dtype), tensor.detach().to(dtype)

    def _multiply(self, x, weight, bias, transposed: bool) -> torch.Tensor:
        """Return x W' + b (transposed) or x W + b, with the perturbed W."""
        x, dtype = self._with_rows(x, x.dim()), computed_in(x)
        right, left, w = self._factors(weight, dtype)
        first, second = (right, left.mT) if transposed else (left, right.mT)
        w = w.t() if transposed else w
        rows, halves = x.shape[:-1].numel(), len(self.halves)
        flat = x.reshape(rows, w.shape[0])
        flat = flat if flat.dtype == dtype else flat.to(dtype)
        inner = torch.matmul(flat.view(halves, rows // halves, len(w)), first)  # to (.., .., rank)
        if bias is None:
            out = torch.matmul(inner, second)
        else:
            made = [half.perturbed(bias) for half in self.halves]
            biases = torch.stack(made)[:, None]
            second = second.expand(halves, *second.shape[-2:])
            out = torch.baddbmm(biases.to(dtype), inner, second)
        out = out.reshape(rows, w.shape[1]).addmm_(flat, w)  # in place: logits are large
        return out.view(*x.shape[:-1], w.shape[1])

    def _lookup(self, input, weight, padding_idx=None, max_norm=None, *args, **kwargs):
        self.embedding(weight, max_norm)
        ids = self._with_rows(input, input.dim() + 1)
        right, left, w = self._factors(weight, weight.dtype)
        out = LOOKUP(ids, w, padding_idx, None, *args, **kwargs)
        halves = ids.reshape(len(self.halves), -1)
        inner = torch.cat([LOOKUP(half, of) for half, of in zip(halves, left, strict=True)])
        out.view(-1, w.shape[1]).addmm_(inner, right.t())
        return out

    def _with_rows(self, x: torch.Tensor, dims: int) -> torch.Tensor:
        """Return x with one row per row of the batch, expanded if it has one row for all.

        `dims` is the number of dimensions of the result that x leads to. Only with three or more
        does the first dimension stand for the batch regardless of the others. Raises Unpaired for
        any other number of rows.
        """
        if len(self.halves) == 1 or (dims == x.dim() and self._is_rows(x)):
            return x
        if dims >= 3 and len(x) in (1, self.batch):
            return x.expand(self.batch, *x.shape[1:])
        raise Unpaired(f"a tensor of shape {tuple(x.shape)} does not have {self.batch} rows")

    def _is_rows(self, x: torch.Tensor, flat: bool = True) -> bool:
        """Return whether x has one row per row of the batch, or a multiple if it may be flattened.

        Raises Unpaired if the number could be a coincidence.
        """
        if self._is_fixed(x) or x.dim() == 0:
            return False
        many = len(x) > 0 and len(x) % self.batch == 0
        if many and x.dim() == 1:
            raise Unpaired(
                f"a tensor of {len(x)} elements may or may not stand for {self.batch} rows"
            )
        return many and (len(x) == self.batch or (flat and x.dim() == 2))

    def _joined(self, plus: Any, minus: Any, split: bool, name: str):
        """Join the results of both halves; with `split`, each was given only its own rows."""
        if type(plus) in (tuple, list) and len(plus) == len(minus):
            pairs = zip(plus, minus, strict=True)
            return type(plus)(self._joined(p, m, split, name) for p, m in pairs)
        if not isinstance(plus, torch.Tensor) and plus == minus:
            return plus
        half, known = self.batch // 2, isinstance(plus, torch.Tensor) and plus.dim() > 0
        if known and plus.shape == minus.shape:
            rows, dims = len(plus), plus.dim()
            if split and rows > 0 and (rows == half or (dims <= 2 and rows % half == 0)):
                return torch.cat([plus, minus])
            one = rows == 1 or (rows == self.batch and "expand" in name)  # positions, say
            if not split and dims >= 3 and one:
                plus, minus = (x.expand(self.batch, *x.shape[1:]) for x in (plus, minus))
                return torch.cat([plus[:half], minus[half:]])
        raise Unpaired(f"the result of {name} on trained parameters does not have the batch's rows")


def _is_vector(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 1


def _part(given: Any, i: int, mine: set[int]):
    """Return `given` with half i of every tensor whose id is in `mine`."""
    if type(given) is dict:
        return {key: _part(value, i, mine) for key, value in given.items()}
    if type(given) in (tuple, list):
        return type(given)(_part(one, i, mine) for one in given)
    return given.chunk(2)[i] if id(given) in mine else given


def _product(function, args: tuple, kwargs: dict) -> tuple | None:
    """Return (x, W, b, transposed) if the function computes x W' + b (transposed) or x W + b."""
    if function is F.linear:
        return _linear(*args, **kwargs)
    if function is torch.addmm and len(args) == 3 and not kwargs:
        return args[1], args[2], args[0], False
    if function in _MATMUL and len(args) == 2 and not kwargs:
        return *args, None, False
    return None


def _linear(input, weight, bias=None) -> tuple:
    return input, weight, bias, True


def computed_in(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that autocast would use; it does not see functions that work in place."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
