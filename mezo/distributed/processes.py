"""One run in several processes, which exchange a few dozen bytes per step and no gradients.

    optimizer = MeZO(model.named_parameters(), ...)
    distributed.join(optimizer, model)                 # under torchrun; in one process a no-op
    loss = optimizer.step(lambda: model(**mine).loss)  # on this process's part of the batch

Data parallel, the default: all processes share one z, each has its own examples, and the losses are
averaged. Probe parallel, `probes=n`: each of n groups of processes has its own z and examples, and
all processes apply the sum. This gives n-SPSA and evolution strategies in the time of one
direction.

Each step has one exchange of float64 numbers: every process's estimates, their numbers of examples,
and a checksum of its history. All processes compute the same sums in rank order, so that weights
stay equal to the bit. An all-reduce could not be used, since its order may differ between ranks.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import distributed as dist

from mezo.distributed.exchange import Link, fingerprint
from mezo.distributed.sharding import Sharded
from mezo.errors import InputError
from mezo.estimators import FAILED, Estimate, merged
from mezo.mezo import MeZO
from mezo.optimizer import (
    Joined,
    OneProcess,
    Weights,
    ZerothOrderOptimizer,
    number_of_processes,
)
from mezo.options.table import ARGUMENTS, SHARED
from mezo.record import Record

_FIELDS = 6  # per direction: examples, walks, projected_grad, loss, loss_plus, loss_minus
_CHECKS = 2  # in front: checksums of all settings and of the weights; then the first probe


class Processes(Link, OneProcess):
    """Several processes, each of which calls `step` equally often; `join` creates it.

    Attributes:
        probes: The number of process groups with their own directions.
        place: The number of this process's group.
    """

    def __init__(
        self,
        optimizer: MeZO,
        group: dist.ProcessGroup | None,
        probes: int,
        place: int,
        check_every: int,
        sharded: Sharded,
        model: torch.nn.Module | None = None,
    ):
        super().__init__(optimizer.trained()[0][1].device, group)
        self.around = sharded.closure if sharded.modules else None
        self.probes, self.place, self.check_every = probes, place, check_every
        self._sharded, self._model = sharded, model
        self._history = 0  # checksum of the settings of all steps so far
        self._weights = 0  # checksum of the weights, when it is due
        self.share(optimizer.param_groups[0]["num_samples"])
        others = [seen for seen in optimizer.observers if not isinstance(seen, _ChecksumsAtRest)]
        optimizer.observers[:] = [*others, _ChecksumsAtRest(self, optimizer)]

    def share(self, num_samples: int) -> range:
        if num_samples < self.probes:
            raise InputError(
                f"num_samples {num_samples} is less than the {self.probes} groups of processes "
                "that are to have directions of their own"
            )
        first, end = (num_samples * i // self.probes for i in (self.place, self.place + 1))
        return range(first, end)

    def begin(self, optimizer: ZerothOrderOptimizer, probe: int) -> None:
        seen, n = optimizer.directions, optimizer.settings["num_samples"]
        mine = self.share(n)
        if probe not in mine:
            raise InputError(f"rank {self.rank} estimates probes {_span(mine)}, not {probe}")
        if not max(seen, default=0) <= probe <= max(len(seen), mine[0]):
            raise ValueError(f"the probes of a step are estimated in order: not {probe} now")
        if self._sharded.any and optimizer.weights is not self._sharded:
            raise InputError("a sharded model cannot be offloaded")
        if len(seen) < probe:
            _take_up(optimizer, probe)
            optimizer.restore_()  # their walks come before this one's
        self.expect(_CHECKS + 1 + self._most(n) * _FIELDS)

    def joined(self, optimizer: ZerothOrderOptimizer) -> Joined:
        seen, n = optimizer.directions, optimizer.settings["num_samples"]
        try:
            self._sharded.check(seen)
            rows = self.exchange(self._row(optimizer, n))
            self._compare(rows, optimizer)
            rows = [_spread(row, n) for row in rows]
            if optimizer.form.moves_weights:
                _check_walks(rows)
            found, cycles = _directions(rows, optimizer.estimator.sides)
            _take_up(optimizer, len(found))
        except BaseException:  # nothing is applied: the weights are left at theta
            optimizer.restore_()
            seen.clear()
            raise
        self.latest = found
        return found, cycles

    def verify(self, optimizer: MeZO) -> None:
        """Raise InputError, naming the rank, unless all have equal weights and settings."""
        self.blame(self.gather_json(self._details(optimizer)))

    def take_checksum(self, optimizer: ZerothOrderOptimizer) -> None:
        """Take the checksum of all weights, which the next exchange compares."""
        self._weights = _checksum(_fingerprints(optimizer, self._model))

    def _details(self, optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
        return _settings(optimizer) | {"tensors": _fingerprints(optimizer, self._model)}

    def _row(self, optimizer: ZerothOrderOptimizer, n: int) -> list[float]:
        seen = optimizer.directions
        if max(seen) >= n:
            raise InputError(f"probe {max(seen)} is not one of num_samples {n}")
        self._history = _checksum([self._history, _settings(optimizer)])
        mine = self.share(n)
        row = [float(self._history), float(self._weights), float(mine[0])]
        for probe in mine:
            estimates = seen[probe].estimates if probe in seen else []
            if not estimates:
                row += [0.0] * _FIELDS
                continue
            one = merged(estimates)
            losses = (*one.losses, 0.0)[:2]
            row += [one.examples, seen[probe].cycles, one.projected_grad, one.loss, *losses]
        return row + [0.0] * _FIELDS * (self._most(n) - len(mine))

    def _most(self, n: int) -> int:
        """Return the largest number of directions of a process, so that rows have equal length."""
        return -(-n // self.probes)

    def _compare(self, rows: Sequence[Sequence[float]], optimizer: ZerothOrderOptimizer) -> None:
        """Raise InputError, in all processes alike, naming the ranks whose checksums differ."""
        if any(row[:_CHECKS] != rows[0][:_CHECKS] for row in rows):
            optimizer.restore_()
            self.blame(self.gather_json(self._details(optimizer)))
            odd = _odd([str(row[:_CHECKS]) for row in rows])
            raise InputError(f"rank {_list(odd)} had other settings or weights at an earlier step")

    def blame(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Raise InputError, naming rank and difference, unless all of `found` are the same."""
        odd = _odd([json.dumps(one, sort_keys=True) for one in found])
        if not odd:
            return
        rank, others = odd[0], next(i for i in range(len(found)) if i not in odd)
        mine, theirs = found[rank], found[others]
        tensors = {*mine["tensors"], *theirs["tensors"]}
        names = [n for n in tensors if mine["tensors"].get(n) != theirs["tensors"].get(n)]
        differ = [key for key in theirs if key != "tensors" and mine.get(key) != theirs[key]]
        what = [f"{key} is {mine.get(key)}, not {theirs[key]}" for key in differ]
        what += [f"the weights of {min(names)}" + _more(len(names))] if names else []
        raise InputError(
            f"step {theirs['step']}: rank {_list(odd)} differs from rank {others}: "
            f"{'; '.join(what)}: the run is stopped; resume it from its log"
        )


class _ChecksumsAtRest:
    """Observes an optimizer's steps, to take the checksum of the weights between two of them."""

    def __init__(self, processes: Processes, optimizer: MeZO):
        self.processes, self.optimizer = processes, optimizer

    def __call__(self, record: Record) -> None:
        every = self.processes.check_every
        if every and (record.step + 1) % every == 0:
            self.processes.take_checksum(self.optimizer)


def join(
    optimizer: MeZO,
    model: torch.nn.Module | None = None,
    *,
    probes: int = 1,
    mesh: Any = None,
    group: dist.ProcessGroup | None = None,
    check_every: int = 100,
) -> OneProcess:
    """Make all processes carry out the optimizer's steps together; call it in every process.

    Start the processes with `torchrun --nproc_per_node=N`. Without a process group, the call
    changes nothing.

    Args:
        optimizer: The optimizer, with the same options in every process.
        model: Its weights and buffers are set to those of rank 0; only those that differ are sent.
            With None this holds for the trained weights alone. Required if FSDP or tensor
            parallelism has sharded the model.
        probes: Number of groups of successive ranks. Each group estimates its share of the
            `num_samples` directions, and averages losses within itself. -1 means one group per
            process.
        mesh: A DeviceMesh of all processes with a dimension "probe", instead of `probes`: its
            slices are the groups. The other dimensions are data parallel or shard the weights.
        group: The processes; None means all of them.
        check_every: Number of steps between comparisons of all weights and persistent buffers of
            `model` (or of the trained weights), by a checksum; 0 means never. Settings (step, lr,
            eps, ...) are compared at every step.

    Returns the optimizer's `processes`. Raises InputError for options that cannot be used together.
    If the settings or weights of a process come to differ later, every process stops with an
    InputError that names its rank.
    """
    if hasattr(optimizer, "optimizer"):
        raise InputError("this is Accelerate's wrapper of an optimizer: take its .optimizer")
    sharded = Sharded(model, optimizer)
    if not number_of_processes():
        return optimizer.processes
    size = dist.get_world_size(group)
    if size > 1 and not isinstance(optimizer.weights, Weights):
        raise InputError(f"a run of {size} processes cannot use offload")
    if mesh is not None:
        probes, place = mesh["probe"].size(), mesh.get_local_rank("probe")
    else:
        probes = size if probes == -1 else probes
        if probes < 1 or size % probes:
            raise InputError(f"{size} processes cannot be split into {probes} groups for probes")
        place = dist.get_rank(group) * probes // size
    processes = Processes(optimizer, group, probes, place, check_every, sharded, model)
    trained = [(name, p) for name, p, _ in optimizer.trained()]
    settings = _settings(optimizer) | {"tensors": {n: [*p.shape, str(p.dtype)] for n, p in trained}}
    processes.blame(processes.gather_json(settings))
    sharded.begin(optimizer, processes, processes.place)
    tensors = trained if model is None else named_tensors(model)
    _send(processes, tensors)
    processes.take_checksum(optimizer)
    optimizer.processes = processes
    return processes


def leave() -> None:
    """Leave the process group, if there is one. Call it when a process ends, or torch warns."""
    if number_of_processes():
        dist.destroy_process_group()


def together() -> None:
    """Wait until all processes of the group are here; alone, return at once."""
    if number_of_processes():
        dist.barrier()


def named_tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters and buffers of a module, by name."""
    return list(chain(module.named_parameters(), module.named_buffers()))


def _send(processes: Processes, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Send tensors that differ from rank 0's to all; if all loaded the same files, none do."""
    digests = processes.gather_json([fingerprint(tensor) for _, tensor in tensors])
    for (_, tensor), of_ranks in zip(tensors, zip(*digests, strict=True), strict=True):
        # an offloaded or sharded tensor has the fingerprint 0 everywhere: it is frozen, or refused
        if len(set(of_ranks)) > 1:
            processes.broadcast_(tensor)


def _spread(row: Sequence[float], n: int) -> list[float]:
    """Spread a process's row over n directions, with zeros for those that others estimate."""
    begin, given = int(row[_CHECKS]) * _FIELDS, row[_CHECKS + 1 :]
    spread = [0.0] * begin + list(given) + [0.0] * (n * _FIELDS)
    return spread[: n * _FIELDS]


def _directions(rows: Sequence[Sequence[float]], sides: int) -> Joined:
    """Collect the estimates of all rows by direction, up to the last that was estimated."""
    found: dict[int, list[Estimate]] = {}
    cycles = []
    for start in range(0, len(rows[0]), _FIELDS):
        made = [part for row in rows if (part := row[start : start + _FIELDS])[1]]
        estimates = [Estimate(g, loss, (*of,)[:sides], n) for n, _, g, loss, *of in made if n]
        found[start // _FIELDS] = estimates or [FAILED]
        cycles.append(int(max((part[1] for part in made), default=0)))
    while cycles and not cycles[-1]:
        cycles.pop()
    return {i: found[i] for i in range(len(cycles))}, tuple(max(1, c) for c in cycles)


def _check_walks(rows: Sequence[Sequence[float]]) -> None:
    """Raise InputError unless all made equally many estimates, each of which rounds weights."""
    for start in range(1, len(rows[0]), _FIELDS):
        walks = [int(row[start]) for row in rows]
        made = {w or 1 for w in walks if any(walks)}  # who makes none walks once
        if len(made) > 1:
            raise InputError(
                f"the processes made {_list(walks)} estimates along direction {start // _FIELDS}: "
                "in place each rounds the weights; make equally many, or take "
                'perturbation="scratch"'
            )


def _take_up(optimizer: ZerothOrderOptimizer, end: int) -> None:
    """Take up the directions before `end` that other processes estimate.

    In place, a walk there and back rounds the weights: a new direction owes one, here too.
    """
    seen = optimizer.directions
    for probe in range(len(seen), end):
        seen[probe] = optimizer.weights.direction(optimizer, probe)


def _settings(optimizer: ZerothOrderOptimizer) -> dict[str, Any]:
    """Return the step and all options, on which the processes must agree."""
    groups = optimizer.param_groups
    settings = {name: optimizer.settings[name] for name in ("step", *(o.name for o in SHARED))}
    settings |= {o.name: [float(g[o.name]) for g in groups] for o in ARGUMENTS if o.of_group}
    return settings | {"perturbation": optimizer.perturbation}


def _fingerprints(optimizer: ZerothOrderOptimizer, model: torch.nn.Module | None) -> dict[str, int]:
    """Return fingerprints of trained weights, their buffers, and all else that `model` saves.

    Buffers that a model does not save are left out, since they may depend on the batches that a
    process has seen, as the frequencies of dynamic rotary embeddings do.
    """
    found, trained = {}, set()
    for name, p, _ in optimizer.trained():
        state = optimizer.state.get(p, {})
        kept = [state[key] for key in sorted(state) if isinstance(state[key], torch.Tensor)]
        values = [fingerprint(tensor) for tensor in (p, *kept)]
        found[name] = sum((2 * i + 1) * value for i, value in enumerate(values)) % 2**64
        trained.add(id(p))
    for name, tensor in _saved(model):
        if isinstance(tensor, torch.Tensor) and id(tensor) not in trained:
            found[name] = fingerprint(tensor)
    return found


def _saved(model: torch.nn.Module | None) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters and persistent buffers of a model, by name."""
    return [] if model is None else list(model.state_dict(keep_vars=True).items())


def _checksum(value: Any) -> int:
    """Return a checksum of a JSON value in 53 bits, which a float64 holds exactly."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 11


def _odd(texts: Sequence[str]) -> list[int]:
    """Return the ranks that differ from the majority; in a tie the lowest rank's value counts."""
    common, _ = Counter(texts).most_common(1)[0]  # in a tie, the first one
    return [i for i, text in enumerate(texts) if text != common]


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def _span(own: range) -> str:
    return f"{own[0]} to {own[-1]}" if len(own) > 1 else str(own[0])
