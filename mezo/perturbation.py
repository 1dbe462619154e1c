"""How theta + eps z reaches the forward pass.

in_place   moves the weights there and back: no memory, and float32's roundings are a replayed 1e-7
scratch    leaves the weights as they are, and gives theta + eps z to what reads them: for 16 bits
low_rank   leaves them too: z of a matrix is a product of small factors, which are multiplied apart
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from mezo import noise
from mezo.errors import Held
from mezo.forms.factors import write_now_
from mezo.forms.low_rank import LowRank
from mezo.forms.reads import Rows
from mezo.forms.rounding import HALF
from mezo.forms.scratch import Scratch
from mezo.forms.updates import Update, make_
from mezo.layers import PLAIN, Own, own_of, owns
from mezo.noise import Move

FORMS = ("in_place", "scratch", "low_rank")


class InPlace:
    """theta -> theta + eps z -> theta - eps z -> theta, one tensor after the other.

    Every tensor makes the same three moves (two where an estimator looks on one side only),
    whatever is raised in between: a replay repeats them. Home again, an element is off by at most 3
    roundings.
    """

    def __init__(
        self,
        rows: Rows,
        eps: float,
        step: int,
        probe: int,
        distribution: str,
        owns: Mapping[str, Own],
        sides: int = 2,
    ):
        self.rows, self.eps, self.distribution = rows, eps, distribution
        scales = [owns.get(name, PLAIN).scale for name, _, _ in rows]
        walks = {scale: walk(step, probe, eps / scale, sides) for scale in set(scales)}
        self.moves = [walks[scale] for scale in scales]
        self.made = [sides + 1] * len(rows)  # of them, tensor by tensor: all, that is home
        self.estimates: list = []

    def home(self) -> AbstractContextManager[None]:
        """The weights are theta within: they are home before the first `at`."""
        return nullcontext()

    @contextmanager
    def at(self, sign: int) -> Iterator[None]:
        """The weights are theta + sign eps z within; +1 comes first, and -1 follows on it."""
        if sign > 0:
            self.made = [0] * len(self.rows)
        interrupt = Held()  # it arrives when a tensor is done: the others follow first
        stop = 1 if sign > 0 else 2
        for i, (_, tensor, key) in enumerate(self.rows):
            moves, self.made[i] = self.moves[i][self.made[i] : stop], stop
            with interrupt:
                noise.apply_(tensor, key, moves, distribution=self.distribution)
        torch.clear_autocast_cache()  # it would hold casts of the weights as they were
        interrupt.release()
        yield

    def way_home(self, i: int) -> list[Move]:
        """The moves that tensor i still has to make; the caller makes them."""
        moves, self.made[i] = self.moves[i][self.made[i] :], len(self.moves[i])
        return moves

    def check(self, closure) -> None:
        """Nothing can be read past it."""

    def losses(self, closure) -> tuple[float, float] | None:
        """As Scratch.losses: it takes two passes."""
        return None


def trained(groups: Sequence[dict]) -> list[tuple[str, torch.nn.Parameter, dict]]:
    """(canonical name, parameter, its group) of what is to be trained; nameless ones by number."""
    rows, position = [], 0
    for group in groups:
        names = group.get("param_names") or map(str, range(position, 2**31))
        position += len(group["params"])
        named = zip(names, group["params"], strict=False)
        rows += [(noise.canonical_name(n), p, group) for n, p in named if p.requires_grad]
    return rows


def form(trained: Sequence[tuple], group: dict[str, Any]) -> str:
    """What was asked for; else scratch if a trained weight has 16 bits, or in place."""
    half = any(tensor.dtype in HALF for _, tensor, _ in trained)
    return group["perturbation"] or ("scratch" if half else "in_place")


def perturb(
    trained: Sequence[tuple],
    group: dict[str, Any],
    probe: int,
    state: MutableMapping[torch.Tensor, dict] | None = None,
) -> InPlace | Scratch:
    """Direction number `probe` of a step, for weights as `MeZO.trained` lists them.

    `state` is the optimizer's: low-rank perturbation adds what it has summed up of the updates.
    """
    rows = [(name, tensor, noise.tensor_key(group["seed"], name)) for name, tensor, _ in trained]
    kind = form(trained, group)
    if kind == "low_rank":
        return LowRank(rows, group, probe, {} if state is None else state)
    settings = (group["eps"], group["step"], probe, group["distribution"], owns(group["layers"]))
    if kind == "scratch":
        return Scratch(rows, *settings)
    return InPlace(rows, *settings, sides(group))


class Resident:
    """The weights are where they are computed with; offload.Offload does the same from afar."""

    def perturb(self, optimizer: Any, probe: int) -> InPlace | Scratch:
        """Direction number `probe` of a MeZO's step."""
        return perturb(optimizer.trained(), optimizer.param_groups[0], probe, optimizer.state)

    def make_(self, optimizer: Any, p, name: str, moves: list[Move], update: Update | None) -> None:
        """The moves and the update of a step, on one weight."""
        first, state = optimizer.param_groups[0], optimizer.state.get(p, {})
        try:
            make_(p, name, moves, update, first, state, own_of(first["layers"], name))
        finally:
            if state:
                optimizer.state[p] = state

    def together(self, optimizer: Any, probes: Iterable[int]) -> None:
        """These directions of a step are estimated next, with the same closure."""

    def queue(self, optimizer: Any, p, name: str, program: Any) -> bool:
        """Whether the moves of a replay are taken, to be made later; else the caller makes them."""
        return False

    def write_(self, optimizer: Any) -> None:
        """Whatever is not in the weights yet."""
        write_now_(optimizer.trained(), optimizer.param_groups[0], optimizer.state)


def sides(group: Mapping[str, Any]) -> int:
    """How many of theta + eps z and theta - eps z an estimate looks at."""
    return 2 if group["estimator"] == "two_point" else 1


def walk(step: int, probe: int, eps: float, sides: int = 2) -> list[Move]:
    there = (eps, -2 * eps, eps) if sides == 2 else (eps, -eps)
    return [Move(step, probe, 1.0, c) for c in there]
