"""Low-rank directions: z = U V' / sqrt(rank) for a matrix W of m x n, which is only read.

    x W'  becomes  x W' + (x V) (A + eps U)' / sqrt(rank)     in the forward pass
    A <- A - lr * projected_grad * U                          at each step
    W <- W + A V' / sqrt(rank),  A <- 0                       with the last step of an interval

U (m, rank) is drawn anew each step, V (n, rank) each `interval` steps; updates are summed up in A
(m, rank), the one thing kept. So noise costs next to nothing, and one forward pass over the batch
and its copy can serve both signs (`Paired`). z has mean 0 and the identity as covariance: the
estimate is as unbiased as along a full z, which all but matrices keep. docs/noise.md has the bits.

LOZO (Chen et al., 2024, arXiv:2410.07698) keeps V for some steps, EGGROLL (arXiv:2511.16652) adds
the factors in the forward pass. An update goes along the V that its losses were measured with.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mezo import noise
from mezo.errors import Held
from mezo.forms import rounding
from mezo.forms.products import Factors, Products, Unpaired
from mezo.forms.rounding import HALF, last_rounding
from mezo.forms.scratch import Moved, Rows, Scratch, eager
from mezo.noise import Move
from mezo.noise import sharded as shards
from mezo.noise.definition import round_stochastically, rounding_bits

__all__ = ["LowRank", "Paired", "Unpaired", "double"]
State = dict[str, Any]  # of a tensor: "low_rank" is A, "decay" what W is to be scaled by
States = Mapping[torch.Tensor, State]  # the optimizer's
Settings = Mapping[str, Any]  # a parameter group's, or those in a log's header
Both = Callable[[int], AbstractContextManager[None]]  # LowRank.both
_FAR = 16  # times eps: where both ways to the losses are compared


def is_factored(tensor: torch.Tensor, settings: Settings) -> bool:
    """Whether z has low rank: for a matrix, in a run that says so."""
    return settings["perturbation"] == "low_rank" and tensor.dim() == 2


@torch.no_grad()
def update_(
    tensor: torch.Tensor,
    name: str,
    moves: Sequence[Move] | np.ndarray,
    settings: Settings,
    state: State,
) -> None:
    """Make the moves of steps on the weight of that name; for a matrix, add them up in `state`.

    Decay waits there too: W is scaled when it is written, A is not.
    """
    if not is_factored(tensor, settings):
        key, how = noise.tensor_key(settings["seed"], name), settings["distribution"]
        return rounding.update_(tensor, key, moves, settings["rounding"], how, state)
    if not len(moves):
        return
    a, key = factor(tensor, name, settings, state)
    moves, decay = noise.table(moves).copy(), state.get("decay", 1.0)
    for scale in moves["scale"].tolist():  # one by one, in a replay as in the run
        decay *= scale
    moves["scale"] = 1.0
    interrupt = Held()
    with interrupt:  # or decay would be behind
        noise.apply_(a, key, moves, distribution=settings["distribution"])
    if decay != 1:
        state["decay"] = decay
    interrupt.release()


def factor(tensor: torch.Tensor, name: str, settings: Settings, state: State) -> tuple:
    """A, of zeros at first, and the key of U."""
    if "low_rank" not in state:
        state["low_rank"] = _zeros(tensor, len(tensor), settings)
    return state["low_rank"], _key(name, "U", settings)


def restart_(tensor: torch.Tensor, step: int, settings: Settings, state: State) -> None:
    """After the last step of an interval: what is kept of U means nothing along another V."""
    if is_factored(tensor, settings) and (step + 1) % settings["interval"] == 0:
        state.pop("momentum_buffer", None)


@torch.no_grad()
def write_(tensor: torch.Tensor, name: str, step: int, settings: Settings, state: State) -> None:
    """W <- decay W + A V' / sqrt(rank), A <- 0, after step number `step`."""
    if "low_rank" not in state:
        return
    bits = {"key": noise.tensor_key(settings["seed"], name), "step": step, "probe": 0}
    bits["stream"] = last_rounding(settings["rounding"])
    left, right = state["low_rank"] * _scale(settings), _right(tensor, name, settings, step)
    decay = state.get("decay", 1.0)
    interrupt = Held()
    for kept in ("low_rank", "decay"):
        state.pop(kept, None)

    def write(rows: torch.Tensor, offset: int) -> None:
        mine = left[offset // tensor.shape[1] :]
        interrupt.commit(
            [(part,) for part in parts_of(rows)],
            lambda part: [(rows[part], summed(rows, part, mine, right, bits, decay, offset))],
        )

    shards.apply_(tensor, write)
    interrupt.release()


def write_now_(trained: Iterable[tuple], group: MutableMapping[str, Any], states: States) -> None:
    """Write within an interval; the group's "written" tells the run log before which step."""
    if any("low_rank" in state for state in states.values()):
        group["written"] = group["step"]
        write_all_(trained, group, states)


def write_due_(trained: Iterable[tuple], settings: Settings, states: States) -> None:
    """Write after the last step of an interval."""
    if settings["perturbation"] == "low_rank" and settings["step"] % settings["interval"] == 0:
        write_all_(trained, settings, states)


def write_all_(trained: Iterable[tuple], settings: Settings, states: States) -> None:
    """Write every matrix of `MeZO.trained()`; an interrupt meanwhile is raised at the end."""
    interrupt = Held()
    for name, p, _ in trained:
        while "low_rank" in (state := states.get(p, {})):
            with interrupt:
                write_(p, name, settings["step"] - 1, settings, state)
        restart_(p, settings["step"] - 1, settings, states.get(p, {}))
    interrupt.release()


def parts_of(tensor: torch.Tensor) -> list[slice]:
    """Rows, as many at a time as make a small temporary."""
    elements = 2**16 if tensor.device.type == "cpu" else 2**20
    rows = max(1, elements // max(1, tensor.shape[1]))
    return [slice(i, min(i + rows, len(tensor))) for i in range(0, len(tensor), rows)]


def summed(
    tensor: torch.Tensor,
    part: slice,
    left: torch.Tensor,
    right: torch.Tensor,
    bits: Mapping[str, Any],
    decay: float = 1.0,
    offset: int = 0,
) -> torch.Tensor:
    """Rows `part` of decay * tensor + left @ right', the same bits everywhere.

    left (m, rank) and right (n, rank) are float32, or float64 for a float64 matrix. Each product
    and each sum is rounded to that, in the order of the columns, which no BLAS promises; then a
    16-bit matrix, to nearest or with the `bits` of a key, step, probe and stream. `offset` is the
    index of the tensor's first element in the whole matrix.
    """
    x = tensor[part].to(left.dtype) * decay
    for k in range(left.shape[1]):
        x = x + left[part, k, None] * right[:, k]
    if tensor.dtype not in HALF or bits["stream"] == noise.NEAREST:
        return x
    start, stop = (offset + row * tensor.shape[1] for row in (part.start, part.stop))
    drawn = rounding_bits(start=start, stop=stop, device=tensor.device, **bits)
    return round_stochastically(x, drawn.view(x.shape), tensor.dtype)


def _key(name: str, factor: str, settings: Settings) -> tuple[int, int]:
    return noise.tensor_key(settings["seed"], f"{name}\0{factor}")  # no parameter has such a name


def _zeros(tensor: torch.Tensor, rows: int, settings: Settings) -> torch.Tensor:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.zeros(rows, settings["rank"], dtype=dtype, device=tensor.device)


def _right(tensor: torch.Tensor, name: str, settings: Settings, step: int) -> torch.Tensor:
    """V (n, rank) of the interval that the step is in."""
    v, first = _zeros(tensor, tensor.shape[1], settings), step - step % settings["interval"]
    key, how = _key(name, "V", settings), settings["distribution"]
    noise.apply_(v, key, [Move(first, 0, 1.0, 1.0)], distribution=how)
    return v


def _scale(settings: Settings) -> float:
    return 1 / math.sqrt(settings["rank"])  # both rounded as IEEE 754 says


class LowRank(Scratch):
    """Within `at(sign)` or `both(...)`, products with W are those of W + (A + sign eps U) V'.

    They are linear layers, `x @ W`, and lookups in an embedding. Other functions get the whole
    matrix, made for the one call; every other parameter is as in scratch perturbation.
    """

    def __init__(
        self,
        rows: Rows,
        settings: MutableMapping[str, Any],
        probe: int,
        state: States,
    ):
        how = settings["eps"], settings["step"], probe, settings["distribution"]
        super().__init__(rows, *how)
        self.settings, self.state = settings, state
        self._trained = {name: tensor for name, tensor, _ in rows}
        self.dtypes: set[torch.dtype] = set()  # in which products were computed
        self._made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # V / sqrt(rank) and eps U
        self._shifts: dict[tuple[int, int], torch.Tensor] = {}  # eps z of vectors

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        with eager(), self._products(0, sign):
            yield

    def home(self) -> AbstractContextManager[None]:
        """Within, the model is the one at theta: with what is summed up of the updates."""
        return self.at(0)

    @contextmanager
    def both(self, batch_size: int) -> Iterator[None]:
        """Of 2 batch_size rows, the first half sees theta + eps z, the second theta - eps z.

        Raises Unpaired where a parameter is read and it cannot be told which rows are which.
        """
        with eager(), self._products(2 * batch_size, +1, -1):
            yield

    def losses(self, closure: Callable) -> tuple[float, float] | None:
        return together(closure, self)

    def _products(self, batch: int, *signs: int) -> Products:
        return Products(self, [_Half(self, sign) for sign in signs], signs, batch)

    def factors(self, name: str, tensor: torch.Tensor, signs: Sequence[int]) -> Factors:
        """V / sqrt(rank), and A + sign eps U of each sign. The draws are made once."""
        if name not in self._made:
            right = _right(tensor, name, self.settings, self.step) * _scale(self.settings)
            u = self._drawn(
                _key(name, "U", self.settings), _zeros(tensor, len(tensor), self.settings)
            )
            self._made[name] = right, u
        right, u = self._made[name]
        a = self.state.get(self._trained[name], {}).get("low_rank")
        left = [sign * u if a is None else a.add(u, alpha=sign) for sign in signs]
        return right, torch.stack(left)

    def vector(self, tensor: torch.Tensor, key: tuple[int, int], sign: int) -> torch.Tensor:
        """theta + sign eps z, of 32 or 64 bits: what a move makes, drawn once for both signs."""
        if key not in self._shifts:
            self._shifts[key] = self._drawn(key, torch.zeros_like(tensor, requires_grad=False))
        return tensor.detach().add(self._shifts[key], alpha=sign)

    def _drawn(self, key: tuple[int, int], zeros: torch.Tensor) -> torch.Tensor:
        moves = [Move(self.step, self.probe, 1.0, self.eps)]
        noise.apply_(zeros, key, moves, distribution=self.distribution)
        return zeros


class _Half(Moved):
    """One sign, for all that is no product: torch's functions get the weights as they would be."""

    def __init__(self, of: LowRank, sign: int):
        super().__init__(of, of.moves(sign))
        self.of, self.sign = of, sign

    def moved(self, name: str, tensor: torch.Tensor, key) -> torch.Tensor:
        if key is None:  # made of parameters that are perturbed already
            return tensor
        if tensor.dim() > 2 or (tensor.dim() < 2 and tensor.dtype in HALF):
            return super().moved(name, tensor, key)
        self.read.add(name)
        if tensor.dim() < 2:
            return self.of.vector(tensor, key, self.sign)
        out = torch.empty_like(tensor, requires_grad=False)
        right, (left,) = self.of.factors(name, tensor, (self.sign,))
        bits = {"key": key, "step": self.of.step, "probe": self.of.probe}
        bits["stream"] = noise.ROUND_PERTURBED
        for part in parts_of(tensor):
            out[part].copy_(summed(tensor.detach(), part, left, right, bits))
        return out

    def slice(self, name: str, tensor: torch.Tensor, key, index: int) -> torch.Tensor:
        if tensor.dim() != 2:
            return super().slice(name, tensor, key, index)
        return self.moved(name, tensor, key)[index]


@dataclass(frozen=True)
class Paired:
    """A closure that can have both losses from one forward pass, over the batch and its copy.

        def halves(both):
            with both(batch_size=16):
                losses = per_example(model, double(batch))  # (32,)
            return losses[:16].mean(), losses[16:].mean()  # of theta + eps z, of theta - eps z

        optimizer.step(Paired(lambda: per_example(model, batch).mean(), halves))

    `both` is `LowRank.both`. Where directions have full rank, or where the model cannot be stacked,
    the closure is `alone`. A run's first step calls each of them some times more, to compare.
    """

    alone: Callable[[], float | torch.Tensor]
    halves: Callable[[Both], tuple[float | torch.Tensor, float | torch.Tensor]]

    def __call__(self) -> float | torch.Tensor:
        return self.alone()


def double(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch and its copy behind it: every tensor twice along its first dimension."""
    return {
        key: torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.dim() else x
        for key, x in batch.items()
    }


def together(closure: Callable, perturbed: LowRank) -> tuple[float, float] | None:
    """loss_plus and loss_minus from one forward pass; None where it takes two.

    Before one is relied on, both ways are compared. Where they disagree, or it cannot be told whose
    a row is, a warning says so, and two passes are made from then on: group["paired"] is False.
    """
    if not isinstance(closure, Paired):
        return None
    known = perturbed.settings.get("paired")  # None: not tried yet
    if known is False:
        return None
    try:
        if not known and not _agree(closure, perturbed):
            return None
        plus, minus = map(float, closure.halves(perturbed.both))
    except (Unpaired, RuntimeError) as error:  # the latter: twice the batch may be too much
        if known and not isinstance(error, Unpaired):
            raise
        logging.getLogger("mezo").warning("two forward passes a step instead of one: %s", error)
        perturbed.settings["paired"] = False
        return None
    perturbed.settings["paired"] = True
    return plus, minus


def _agree(closure: Paired, perturbed: LowRank) -> bool:
    """Unpaired if one pass has other losses than two; False if they are not finite.

    At 16 eps the losses differ by so much that a parameter read with the wrong sign shows.
    """
    settings = {**perturbed.settings, "eps": _FAR * perturbed.eps}
    far = LowRank(perturbed.rows, settings, perturbed.probe, perturbed.state)
    found = [float(loss) for loss in closure.halves(far.both)]
    expected = []
    for sign in (+1, -1, 0):
        with far.at(sign):
            expected.append(float(closure.alone()))
    if not all(map(math.isfinite, found + expected)):
        return False
    share = 0.05 if far.dtypes & set(HALF) else 0.01
    slack = share * (max(expected) - min(expected)) + 1e-5 * max(map(abs, expected))
    if any(abs(one - other) > slack for one, other in zip(found, expected, strict=False)):
        raise Unpaired(f"its losses are {found}, those of two are {expected[:2]}")
    return True
