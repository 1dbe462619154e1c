"""MeZO's weights in an engine: what `attach(optimizer, engine)` puts in place of `forms.Weights`.

    engine = VLLMEngine("Qwen/Qwen3-8B")
    remote = attach(optimizer, engine)
    optimizer.step(lambda: remote.loss(batch))

The optimizer's own parameters do not move while it steps. `optimizer.write()` copies the engine's
weights into them, for an evaluation in transformers or for saving.

Every number of the run stays with the optimizer, and the run log is an ordinary one. In place, the
walk of a direction is part of the log, and the engine needs no memory beside the weights. With
scratch, the default for 16-bit weights, the log holds updates alone, and the engine keeps a copy of
the trained weights beside those that it reads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mezo import noise
from mezo.engines.engine import THETA, Batch, Change, Engine, Point, Query, Run
from mezo.errors import InputError
from mezo.forms.direction import Direction, Part, Row
from mezo.forms.updates import Update
from mezo.forms.weights import Weights
from mezo.mezo import MeZO
from mezo.noise import Move
from mezo.rules import Rule, name_of

_ROUNDINGS = ("stochastic", "nearest")  # the others keep a buffer beside a weight


class RemoteWeights(Weights):
    """The weights of an optimizer whose model runs in an engine."""

    here = False

    def __init__(self, engine: Engine):
        self.engine = engine
        self._walk: list[Change] = []  # not sent yet: they ride with the next question
        self._look: tuple[Change, ...] = ()
        self._moved = False  # since the optimizer's parameters had the engine's weights

    def loss(self, batch: Batch) -> float:
        """Return the loss of a batch where the optimizer's direction is at the moment."""
        (loss,) = self.engine.losses(batch, [self.point()])
        return loss

    def point(self) -> Point:
        """Return the point at which the optimizer wants a loss, for one question to the engine."""
        walk, self._walk = tuple(self._walk), []
        return Point(walk, self._look)

    def flush(self) -> None:
        """Send the changes that no question has taken along."""
        if self._walk:
            self.engine.apply(self.point().walk)

    def walk(self, rows: Sequence[Row], moves: Sequence[Move], distribution: str = "") -> None:
        """Have the engine make moves, as noise.apply_all_ does; it knows the distribution."""
        if len(moves):
            self._moved = True
            self._walk.append(_change(rows, moves))

    @contextmanager
    def looking(self, changes: Sequence[Change]) -> Iterator[None]:
        self._look = tuple(changes)
        try:
            yield
        finally:
            self._look = ()

    def direction(self, optimizer: Any, probe: int) -> Direction:
        new = optimizer.plan.new  # a partial of the form
        if optimizer.form.moves_weights:
            walked = new(probe)
            walked.apply_all_ = self.walk
            return walked
        kind: Any = Looked
        looked = kind(*new.args, probe, **new.keywords)
        looked.remote = self
        return looked

    def move_(
        self, optimizer: Any, part: Part, moves: Sequence[Move], update: Update | None = None
    ) -> None:
        assert update is None  # _check has refused such rules
        self.walk(part.rows, moves)

    def end_step_(self, optimizer: Any) -> None:
        pass

    def as_written(self, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
        self.write_(optimizer)
        return super().as_written(optimizer)

    @torch.no_grad()
    def write_(self, optimizer: Any) -> None:
        """Copy the engine's weights into the optimizer's parameters."""
        if not self._moved:
            return
        self.flush()
        named = {name: p for name, p, _ in optimizer.trained()}
        for name, value in self.engine.weights():
            named[name].copy_(value)
        self._moved = False


class Looked(Direction):
    """Scratch: the engine looks at theta + sign eps z, and theta stays as it is."""

    remote: RemoteWeights

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        moves = [self.move(sign * self.eps, noise.ROUND_PERTURBED)] if sign else []
        changes = [_change(part.rows, part.scale.walk(moves)) for part in self.parts if moves]
        with self.remote.looking(changes):
            yield


def _change(rows: Sequence[Row], moves: Sequence[Move]) -> Change:
    return Change(tuple(row.name for row in rows), noise.table(moves))


def attach(
    optimizer: MeZO, engine: Engine, *, take: bool = False, probe: Sequence[int] | None = None
) -> RemoteWeights:
    """Let an engine hold the optimizer's weights, and return what its closures ask.

    The engine's weights must be the optimizer's, to the bit. This is compared tensor by tensor.
    Then each matrix is moved, and a text is scored: an engine that goes on reading other weights,
    such as a packed copy, is found before the first step.

    Args:
        optimizer: A MeZO in place or with scratch, with the rule sgd.
        engine: The engine; `begin` is called.
        take: Give the optimizer's weights to the engine, for a run that goes on. The engine has
            begun with the model that the run began with, so that its layout is known to fit.
        probe: Tokens of the text that is scored; None: tokens 1 to 8. An empty one skips this.

    Raises InputError for settings that an engine does not have, and naming the tensor, for weights
    that differ or are not read.
    """
    _check(optimizer)
    shapes = {name: tuple(p.shape) for name, p, _ in optimizer.trained()}
    settings = optimizer.settings
    engine.begin(Run(shapes, settings["seed"], settings["distribution"]))
    if take:
        engine.take((name, p.detach()) for name, p, _ in optimizer.trained())
    _compare(optimizer, engine)
    tokens = tuple(range(1, 9)) if probe is None else tuple(probe)
    if tokens:
        _read(engine, shapes, tokens)
    optimizer.weights = RemoteWeights(engine)
    return optimizer.weights


def check_choices(
    rule: Rule,
    perturbation: str | None = None,
    rounding: str | None = None,
    *,
    masked: bool = False,
) -> None:
    """Raise InputError for what an engine cannot do: it adds z to weights, and keeps no buffers.

    None stands for a default, which engines always have. Trainers ask before an engine starts.
    """
    if not rule.linear:
        raise InputError(
            f"rule {name_of(type(rule))} does not work with an engine, which only adds multiples "
            "of z: take rule sgd or scalar_adam"
        )
    if perturbation == "low_rank":
        raise InputError("perturbation low_rank is not made by engines: take scratch or in_place")
    if rounding is not None and rounding not in _ROUNDINGS:
        raise InputError(
            f"rounding {rounding} keeps a buffer, which no engine has: take "
            + " or ".join(_ROUNDINGS)
        )
    if masked:
        raise InputError("layers with thresholds (masks) are not made by engines: leave them away")


def _check(optimizer: MeZO) -> None:
    if type(optimizer.weights) is not Weights:
        raise InputError("the optimizer's weights are offloaded, sharded or in an engine already")
    parts = optimizer.plan.parts
    rounded = not all(part.plain for part in parts)  # of 32-bit weights nothing is rounded
    check_choices(
        optimizer.rule,
        "low_rank" if optimizer.form.factored else None,
        optimizer.settings["rounding"] if rounded else None,
        masked=any(part.scale.threshold is not None for part in parts),
    )


@torch.no_grad()
def _compare(optimizer: MeZO, engine: Engine) -> None:
    named = {name: p for name, p, _ in optimizer.trained()}
    for name, value in engine.weights():
        p = named.pop(name).detach().cpu()
        if p.dtype != value.dtype or p.shape != value.shape or not torch.equal(p, value):
            kinds = {_told(p), _told(value)}
            told = f"is {_told(value)} there and {_told(p)} here" if len(kinds) > 1 else "differs"
            raise InputError(
                f"engine {engine.name}: parameter {name} {told}: load the same weights in both"
            )
    if named:
        raise InputError(f"engine {engine.name} does not hold parameter {min(named)}")


def _told(p: torch.Tensor) -> str:
    return f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}"


def _read(engine: Engine, shapes: dict[str, tuple[int, ...]], tokens: Sequence[int]) -> None:
    """Raise InputError if the engine's losses do not depend on a matrix that it holds."""
    place = len(tokens) - 1
    asked = (*((at, tokens[at]) for at in range(1, place)), (place, tokens[0]))
    query = Query(tuple(tokens), asked)
    table = noise.table([Move(0, 0, 1.0, 0.1, noise.ROUND_PERTURBED)])
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    points = [THETA, *(Point(look=(Change((name,), table),)) for name in matrices), THETA]
    before, *moved, after = (found[0] for found in engine.logprobs([query], points))
    unread = [name for name, found in zip(matrices, moved, strict=True) if found == before]
    if unread:
        raise InputError(
            f"engine {engine.name} does not read parameter {unread[0]} as it is: its losses stay "
            "the same when it moves (a packed, merged or cached copy)"
        )
    spread = max(np.ptp([before, found], axis=0).max() for found in moved) if moved else 0.0
    if np.ptp([before, after], axis=0).max() > 1e-3 * spread:
        raise InputError(f"engine {engine.name} does not come back to its weights after a look")
