"""Products of a pass at one sign, where on a CPU each operation that is saved is a microsecond."""

from typing import Any

import torch
from torch.nn import functional as F

from mezo.forms.drawn import Product
from mezo.forms.products import Products, computed_in
from mezo.noise import live


class OneSign(Products):
    """`Products` with one group. Linear layers take what was made ready for all of them at once."""

    _ready: dict[int, Product] | None = None  # by the matrix's id, once one is read

    def forget(self) -> None:
        super().forget()
        self._ready = None

    def at_once(self, function, args: tuple, kwargs: dict | None) -> torch.Tensor | None:
        """Return x W' + b of a linear layer, or a layer norm, from what was made ready."""
        if live.current() is not None:  # a graph draws its own
            return None
        if function is F.linear and len(args) == 3 and not kwargs:
            return self._linear(*args)
        if function is F.layer_norm and kwargs and len(args) == 2:
            weight, bias = (self.groups[0].taken(kwargs[name]) for name in ("weight", "bias"))
            if weight is not None and bias is not None and type(args[0]) is torch.Tensor:
                return F.layer_norm(*args, weight=weight, bias=bias, eps=kwargs["eps"])
        return None

    def _linear(self, x: Any, weight: torch.Tensor, bias: Any) -> torch.Tensor | None:
        if self._ready is None:
            with self.unseen():
                self._ready = self.perturbed.products(*self.signs)
        made = self._ready.get(id(weight))
        if made is None or type(x) is not torch.Tensor or not x.dim():
            return None
        name, device, (n, m), right, left, w = made
        if x.dtype != w.dtype or torch.is_autocast_enabled(device):
            return None
        if bias is not None and (bias := self.groups[0].taken(bias)) is None:
            return None
        self.read.add(name)
        self.perturbed.dtypes.add(x.dtype)
        flat = x if x.dim() == 2 else x.reshape(-1, n)
        inner = torch.mm(flat, right)  # to (.., rank)
        out = torch.mm(inner, left) if bias is None else torch.addmm(bias, inner, left)
        out.addmm_(flat, w)
        return out if flat is x else out.view(*x.shape[:-1], m)

    def _multiply(self, x, weight, bias, transposed: bool) -> torch.Tensor:
        """Return x W' + b (transposed) or x W + b, with the perturbed W."""
        dtype = computed_in(x)
        right, left, w = self._factors(weight, dtype)
        left = left[0]
        first, second, w = (right, left.t(), w.t()) if transposed else (left, right.t(), w)
        flat = x.reshape(x.shape[:-1].numel(), len(w))
        flat = flat if flat.dtype == dtype else flat.to(dtype)
        inner = torch.mm(flat, first)  # to (.., rank)
        if bias is None:
            out = torch.mm(inner, second)
        else:
            out = torch.addmm(self.groups[0].perturbed(bias).to(dtype), inner, second)
        return out.addmm_(flat, w).view(*x.shape[:-1], w.shape[1])
