"""Products with a matrix plus a product of small factors, for one sign or several groups of rows.

    x W' + b   becomes   x W' + [b + (x V) L'],   L = (A + sign eps U) / sqrt(rank)

The bracket (rows, m) is computed first, and the product with W is added to it in place. Both signs
of one direction, or of several, can share one forward pass over copies of the batch: each copy is a
group of rows, which has an L of its own. V is the same for all directions of a step. Rows are
recognised by their number, either that of all copies or that of copies flattened to two dimensions.
A tensor that fits neither is refused, and one_pass.py compares the losses with those of separate
passes before it relies on them.
"""

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from mezo.errors import InputError
from mezo.forms.one_pass import Unpaired
from mezo.forms.reads import LOOKUP, Reads, tensors
from mezo.forms.scratch import Moved
from mezo.noise import live
from mezo.noise.live import Numbers
from mezo.noise.sharded import is_sharded

Factors = tuple[torch.Tensor, torch.Tensor]  # right (n, rank), and left (groups, m, rank)
_REPEATED = ("expand", "expand_as", "repeat")  # functions that make equal rows of one
_DERIVED = 2**18  # elements of a result of parameters alone that is kept during a pass, at most
_MATMUL = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}


class Products(Reads):
    """Linear layers, `x @ W`, Conv1D and embeddings use the factors; groups handle everything else.

    Args:
        directions: Directions of one step.
        groups: One for each sign of each direction, in this order.
        signs: The signs of each direction.
        batch: With several groups, the number of rows of all of them together.
    """

    takes_derived: ClassVar[bool] = False  # a matrix computed from parameters in a product

    def __init__(
        self, directions: Sequence[Any], groups: Sequence[Moved], signs: Sequence[int], batch: int
    ):
        super().__init__(directions[0])
        self.directions, self.perturbed = directions, directions[0]
        self.groups, self.signs, self.batch = groups, signs, batch
        self._all: dict[str, Factors] | None = None  # of all matrices, once one is read

    def call(self, function, args: tuple, kwargs: dict):
        product = _product(function, args, kwargs)
        if product is not None and self._is_matrix(*product):
            return self._multiply(*product)
        if function is LOOKUP:
            return self._shared(*args, **kwargs, found=self._lookup(*args, **kwargs))
        if len(self.groups) == 1:
            return self.groups[0].call(function, args, kwargs)
        given = list(tensors((args, kwargs)))
        # parameters of three or more dimensions may be experts', which reorder the tokens
        flat = all(x.dim() < 3 for x in given if id(x) in self.rows)
        mine = {id(x) for x in given if self._is_rows(x, flat)}
        each, found = len(self.groups), []
        for i, group in enumerate(self.groups):
            own = _part(args, i, each, mine), _part(kwargs, i, each, mine)
            found.append(group.call(function, *own))
        name = getattr(function, "__name__", "a function")
        if all(self._is_fixed(x) for x in given) and self._is_derived(found[0], name):
            return self._kept(name, found)
        return self._joined(found, bool(mine), name)

    def _is_fixed(self, x: torch.Tensor) -> bool:
        return id(x) in self.rows or isinstance(x, torch.nn.Parameter)

    def _is_derived(self, one: Any, name: str) -> bool:
        """Return whether a result of parameters alone is small, and has no rows of the batch."""
        if type(one) in (tuple, list):
            return all(self._is_derived(part, name) for part in one)
        rows = isinstance(one, torch.Tensor) and one.dim() > 0 and one.numel() <= _DERIVED
        return rows and not (len(one) == self.batch and name in _REPEATED)

    def _kept(self, name: str, found: Sequence[Any]) -> Any:
        """Register a result of parameters alone, such as 1 + weight: each group reads its own."""
        one = found[0]
        if type(one) in (tuple, list):
            return type(one)(self._kept(name, parts) for parts in zip(*found, strict=True))
        for reads, value in ((self, one), *zip(self.groups, found, strict=True)):
            reads.rows[id(one)] = (f"(by {name})", value, None)
        self.watch(one)
        return one

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
        probes = tuple([one.probe for one in self.directions])
        numbers = live.numbers_of(of.step, probes, first)
        signs = tuple(self.signs)
        return ("low rank", self.batch, signs, of.eps, probes, options, where), numbers

    def __exit__(self, *raised):
        for group in self.groups:
            group.settle()
        return super().__exit__(*raised)

    def forget(self) -> None:
        self._all = None
        for one in (*self.groups, *self.directions):
            one.forget()

    def _refuse(self, function, name: str, first, kwargs: dict) -> None:
        """A write to what was computed from parameters is no fault: other passes can make it."""
        try:
            super()._refuse(function, name, first, kwargs)
        except InputError as error:
            if (first or self.rows[id(kwargs["out"])])[2] is None:
                raise Unpaired(str(error)) from None
            raise

    def know(self, x: torch.Tensor, row: tuple[str, torch.Tensor, Any]) -> None:
        for reads in (self, *self.groups):
            reads.rows[id(x)] = row

    def _is_matrix(self, x, weight, bias, transposed: bool) -> bool:
        known = isinstance(x, torch.Tensor) and x.dim() > 0 and id(x) not in self.rows
        vector = bias is None or (isinstance(bias, torch.Tensor) and bias.dim() == 1)
        if not (known and vector and id(weight) in self.rows and weight.dim() == 2):
            return False
        return self.takes_derived or self.rows[id(weight)][2] is not None

    def _factors(self, weight: torch.Tensor, dtype: torch.dtype):
        """Return right (n, rank), left (groups, m, rank) and the matrix (m, n), in `dtype`."""
        name, tensor, key = self.rows[id(weight)]
        if key is None:
            raise Unpaired(f"rows are looked up in a matrix computed from trained ones {name}")
        self.read.add(name)
        self.perturbed.dtypes.add(dtype)
        found = None
        if live.current() is None:  # a graph draws its own
            if self._all is None:
                each = [one.all_factors(self.signs) for one in self.directions]
                self._all = {of: _side_by_side([one[of] for one in each]) for of in each[0]}
            found = self._all.get(name)
        if found is None:
            each = [one.factors(name, tensor, self.signs) for one in self.directions]
            found = _side_by_side(each)
        right, left = found
        if right.dtype == dtype == tensor.dtype:
            return right, left, tensor.detach()
        return right.to(dtype), left.to(dtype), tensor.detach().to(dtype)

    def _multiply(self, x, weight, bias, transposed: bool) -> torch.Tensor:
        """Return x W' + b (transposed) or x W + b, with the perturbed W."""
        x, dtype = self._with_rows(x, x.dim()), computed_in(x)
        right, left, w = self._factors(weight, dtype)
        first, second = (right, left.mT) if transposed else (left, right.mT)
        w = w.t() if transposed else w
        rows, groups = x.shape[:-1].numel(), len(self.groups)
        flat = x.reshape(rows, w.shape[0])
        flat = flat if flat.dtype == dtype else flat.to(dtype)
        inner = torch.matmul(flat.view(groups, rows // groups, len(w)), first)  # to (.., .., rank)
        if bias is None:
            out = torch.matmul(inner, second)
        else:
            made = [group.perturbed(bias) for group in self.groups]
            biases = torch.stack(made)[:, None]
            second = second.expand(groups, *second.shape[-2:])
            out = torch.baddbmm(biases.to(dtype), inner, second)
        out = out.reshape(rows, w.shape[1]).addmm_(flat, w)  # in place: logits are large
        return out.view(*x.shape[:-1], w.shape[1])

    def _lookup(self, input, weight, padding_idx=None, max_norm=None, *args, **kwargs):
        self.embedding(weight, max_norm)
        ids = self._with_rows(input, input.dim() + 1)
        right, left, w = self._factors(weight, weight.dtype)
        out = LOOKUP(ids, w, padding_idx, None, *args, **kwargs)
        groups = ids.reshape(len(self.groups), -1)
        inner = torch.cat([LOOKUP(group, of) for group, of in zip(groups, left, strict=True)])
        out.view(-1, w.shape[1]).addmm_(inner, right.t())
        return out

    def _shared(self, input, weight, *_, found: torch.Tensor, **__) -> torch.Tensor:
        """Return the lookup's result; if a whole embedding is looked up once for all rows, as a
        prompt's is, it has one row, of which each group has its own."""
        if len(self.groups) == 1 or input.shape != (1, len(weight)):
            return found
        own = self.batch // len(self.groups)
        return self._kept("embedding", [found[i : i + 1] for i in range(0, self.batch, own)])

    def _with_rows(self, x: torch.Tensor, dims: int) -> torch.Tensor:
        """Return x with one row per row of the batch, expanded if it has one row for all.

        `dims` is the number of dimensions of the result that x leads to. Only with three or more
        does the first dimension stand for the batch regardless of the others. Raises Unpaired for
        any other number of rows.
        """
        if len(self.groups) == 1 or (dims == x.dim() and self._is_rows(x)):
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

    def _joined(self, found: Sequence[Any], split: bool, name: str):
        """Join the groups' results; with `split`, each was given only its own rows."""
        one = found[0]
        if type(one) in (tuple, list) and all(len(other) == len(one) for other in found):
            parts = zip(*found, strict=True)
            return type(one)(self._joined(part, split, name) for part in parts)
        if not isinstance(one, torch.Tensor) and all(other == one for other in found):
            return one
        own, known = self.batch // len(found), isinstance(one, torch.Tensor) and one.dim() > 0
        if known and all(other.shape == one.shape for other in found):
            rows, dims = len(one), one.dim()
            if split and rows > 0 and (rows == own or (dims <= 2 and rows % own == 0)):
                return torch.cat([*found])
            alike = rows == 1 or (rows == self.batch and name in _REPEATED)  # positions, say
            if not split and dims >= 3 and alike:
                each = [x.expand(self.batch, *x.shape[1:]) for x in found]
                return torch.cat([x[i * own : (i + 1) * own] for i, x in enumerate(each)])
        raise Unpaired(f"the result of {name} on trained parameters does not have the batch's rows")


def _side_by_side(each: Sequence[Factors]) -> Factors:
    """Return the factors of several directions, which have one right factor."""
    return each[0] if len(each) == 1 else (each[0][0], torch.cat([left for _, left in each]))


def _part(given: Any, i: int, of: int, mine: set[int]):
    """Return `given` with part i of every tensor whose id is in `mine`."""
    if type(given) is dict:
        return {key: _part(value, i, of, mine) for key, value in given.items()}
    if type(given) in (tuple, list):
        return type(given)(_part(one, i, of, mine) for one in given)
    return given.chunk(of)[i] if id(given) in mine else given


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
