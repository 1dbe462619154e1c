"""Models that FSDP2 (`fully_shard`) or tensor parallelism has spread over processes.

Each process moves its own shards by the same z as one device would (noise/sharded.py). Perturbed in
place, the shards are gathered as they are. With scratch or low-rank perturbation they do not move;
the tensors that replace them in a forward pass are perturbed where they are read: those that FSDP
has gathered, or the plain tensors that transformers uses for tensor parallel weights. Three things
would spoil a run silently, and are handled here:

    After a forward pass without a backward pass, FSDP's root module keeps its gathered weights, and
    the next pass would read those instead of the perturbed shards. They are dropped around every
    pass.
    An optimizer created from such gathered weights would move copies that are soon dropped. It is
    refused.
    The tensor that is read is not the optimizer's parameter. `find` returns the shard that it
    stands for.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mezo.closures import Closure
from mezo.distributed.exchange import Link, fingerprint
from mezo.errors import InputError
from mezo.estimators import FAILED
from mezo.forms.direction import Direction
from mezo.forms.scratch import Scratch
from mezo.mezo import MeZO
from mezo.noise.sharded import is_sharded, local, partners, place
from mezo.optimizer import Weights, ZerothOrderOptimizer

_KINDS = ("Shard", "_StridedShard", "Replicate")  # the second: FSDP's, of a tensor parallel weight


class Sharded(Weights):
    """What `distributed.join` keeps of a model that may be sharded.

    Raises InputError, naming the tensor, for what cannot be trained so.
    """

    here = False

    def __init__(self, model: torch.nn.Module | None, optimizer: MeZO):
        sharded = [(name, p) for name, p, _ in optimizer.trained() if is_sharded(p)]
        if sharded and model is None:
            raise InputError(f"parameter {sharded[0][0]} is sharded: join(optimizer, model)")
        self._link: Link | None = None
        self.modules = [] if model is None else reshard(model)
        self.any = bool(sharded or self.modules)  # a forward pass takes all processes
        if model is None:
            return
        _check_parameters(model, optimizer)
        self._places = [(m, *named) for m in model.modules() for named in _own(m)]
        self._next = 0  # forward passes read parameters in their order, more or less
        self._layouts = {id(p): _layout(p) for _, p in sharded}  # in a forward pass
        if sharded:
            _check_settings(sharded[0][0], optimizer)
            self._look(sharded, optimizer)

    def begin(self, optimizer: MeZO, link: Link, group: int) -> None:
        """Take over the optimizer's weights after all have joined; `group` shares one z."""
        self._link = link
        _check_shards([(n, p) for n, p, _ in optimizer.trained() if is_sharded(p)], link, group)
        if self.any:
            optimizer.weights = self

    def direction(self, optimizer: ZerothOrderOptimizer, probe: int) -> Direction:
        perturbed = super().direction(optimizer, probe)
        if isinstance(perturbed, Scratch):
            perturbed.placed = self
        return perturbed

    def as_written(self, optimizer: ZerothOrderOptimizer) -> Iterator[tuple[str, torch.Tensor]]:
        self.reshard()
        return super().as_written(optimizer)

    def write_(self, optimizer: ZerothOrderOptimizer) -> None:
        super().write_(optimizer)
        self.reshard()

    def find(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (shard, x as a part of the whole) if x stands in for a trained shard."""
        for i in range(len(self._places)):
            at = (self._next + i) % len(self._places)
            module, leaf, shard = self._places[at]
            if getattr(module, leaf, None) is x:
                self._next = at
                return (shard, self._part(leaf, shard, x)) if id(shard) in self._layouts else None
        return None

    def of_all(self, names: set[str]) -> set[str]:
        """Return the names that every process gives. All processes must call it."""
        assert self._link is not None
        return names.intersection(*self._link.gather_json(sorted(names)))

    def reshard(self) -> None:
        """Drop the weights that FSDP has gathered."""
        for module in self.modules:
            module.reshard()

    def closure(self, closure: Closure) -> Closure:
        """Return a closure that reads the shards as they are at the time of the call."""
        if not self.modules:
            return closure

        def fresh() -> float | torch.Tensor:
            self.reshard()
            try:
                return closure()
            finally:  # or an evaluation after the update would read what was gathered before it
                self.reshard()

        return fresh

    def check(self, seen: Mapping[int, Any]) -> None:
        """Raise after a failed pass: the others wait for this process's shards."""
        failed = any(one is FAILED for perturbed in seen.values() for one in perturbed.estimates)
        if self.any and failed:
            raise RuntimeError("a forward pass failed in one process of a sharded model")

    @torch.no_grad()
    def _look(self, sharded: Sequence[tuple[str, torch.Tensor]], optimizer: MeZO) -> None:
        """Gather once, and raise InputError if the form cannot perturb what is gathered."""
        form, name_of_form = optimizer.form, optimizer.perturbation
        if form.moves_weights:
            return
        dtypes = {}
        for fsdp in self.modules:
            fsdp.unshard()
            for module, leaf, shard in self._places:
                if (whole := getattr(module, leaf)) is not shard:
                    self._layouts[id(shard)], dtypes[id(shard)] = _layout(whole), whole.dtype
            fsdp.reshard()
        for name, p in sharded:
            if (dtype := dtypes.get(id(p), p.dtype)) != p.dtype:
                raise InputError(
                    f"parameter {name} is {p.dtype} and gathered as {dtype}: leave param_dtype of "
                    f"MixedPrecisionPolicy away, or perturb in place, not {name_of_form}"
                )
            if form.factored and self._layouts[id(p)] is not None:
                raise InputError(
                    f"parameter {name} is sharded by tensor parallelism: perturbation must be "
                    "in_place or scratch, not low_rank"
                )

    @torch.no_grad()
    def _part(self, leaf: str, shard: Any, x: torch.Tensor) -> torch.Tensor:
        """Return x if FSDP has gathered it whole, else a DTensor of this process's part of it."""
        layout = None if is_sharded(x) else self._layouts[id(shard)]
        if layout is None and x.shape == shard.shape:
            return x
        if layout is not None:
            how = {"shape": shard.shape, "stride": shard.stride(), "run_check": False}
            found = type(shard).from_local(x.detach(), *layout, **how)
            if place(found)[0] == tuple(x.shape):
                return found
        raise InputError(
            f"the model reads a {leaf} of shape {tuple(x.shape)} for a parameter of "
            f'{tuple(shard.shape)}: perturb a float32 model in place, perturbation="in_place"'
        )


def _check_shards(shards: Sequence[tuple[str, torch.Tensor]], link: Link, group: int) -> None:
    """Raise unless ranks that hold the same shard hold equal values and ranks of a copy share z."""
    if not shards:
        return
    groups = link.gather([float(group)])
    for name, p in shards:
        ranks = link.ranks(partners(p))
        if any(groups[rank] != groups[link.rank] for rank in ranks):
            raise InputError(
                f"parameter {name} is sharded over ranks {', '.join(map(str, ranks))}, which have "
                "directions of their own: give a mesh with a dimension for probes, and shard over "
                "the others"
            )
    mine = [(name, *place(p), fingerprint(local(p))) for name, p in shards]
    first: dict[str, tuple[int, int]] = {}
    for rank, rows in enumerate(link.gather_json(mine)):
        for *where, value in rows:
            found, other = first.setdefault(json.dumps(where), (value, rank))
            if found != value:
                raise InputError(
                    f"parameter {where[0]}: rank {rank} has other numbers than rank {other} in the "
                    "same shard: load the same weights in all processes"
                )


def _layout(p: Any) -> tuple | None:
    """Return the device mesh and placements of a sharded tensor; None for a whole one."""
    return (p.device_mesh, p.placements) if is_sharded(p) else None


def _own(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(module.named_parameters(recurse=False, remove_duplicate=False))


def reshard(model: torch.nn.Module) -> list[Any]:
    """Drop what FSDP has gathered, so that the model's parameters are the shards again.

    Returns the FSDP modules; InputError for those of the first FSDP.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has used it has imported it
    if fsdp is None:
        return []
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise InputError(
                f"module {name or 'the model'} is of FSDP 1, which flattens its weights: take "
                "torch.distributed.fsdp.fully_shard"
            )
    found: list[Any] = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    for module in found:
        module.reshard()
    return found


def _check_parameters(model: torch.nn.Module, optimizer: MeZO) -> None:
    known = {id(p) for p in model.parameters()}
    for name, p, _ in optimizer.trained():
        if id(p) not in known:
            raise InputError(
                f"parameter {name} of the optimizer is not the model's: make the optimizer after "
                "fully_shard, and after a forward pass call model.reshard() before"
            )


def _check_settings(name: str, optimizer: MeZO) -> None:
    first = optimizer.param_groups[0]
    allowed = {
        "rounding": (first["rounding"], ("stochastic", "nearest")),
        "rule": ("sgd" if optimizer.rule.linear else first["rule"]["name"], ("sgd",)),
    }
    for option, (given, good) in allowed.items():
        if given not in good:
            raise InputError(
                f"parameter {name} is sharded: {option} must be {' or '.join(good)}, not {given}"
            )
    if first["layers"]:
        raise InputError(f"parameter {name} is sharded: it takes no layers (scales, masks)")
    if type(optimizer.weights) is not Weights and not isinstance(optimizer.weights, Sharded):
        raise InputError(f"parameter {name} is sharded, and offloaded too: leave offload away")
    for name, p, _ in optimizer.trained():
        for placement in getattr(p, "placements", ()):
            kind = type(placement).__name__
            if kind not in _KINDS:
                raise InputError(
                    f"parameter {name} is placed as {kind}: Shard and Replicate are known"
                )
            if kind == "_StridedShard" and p.shape[placement.dim] % placement.split_factor:
                raise InputError(
                    f"parameter {name} has {p.shape[placement.dim]} rows, which tensor parallelism "
                    f"cannot split over {placement.split_factor} processes evenly: FSDP2 on top of "
                    "it needs that"
                )
