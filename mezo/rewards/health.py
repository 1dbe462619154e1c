"""Whether a run on rewards is still healthy: figures of it, and rules that warn once or stop.

    share of ties        estimates whose two rewards were equal and moved nothing
    share changed        weights that an update of this size changes at all; the rest rounds it away
    repetition           of 4-grams in the texts that stood in the same text before
    length, clipped      tokens a text, and the share of texts that did not end by themselves
    held-out loss        nats a token on texts that the run does not train: what is forgotten

Each rule names the figure, its bound and what to do. A warning is given once a run.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mezo import noise
from mezo.errors import InputError
from mezo.noise import Move

_SAMPLE = 2**14  # elements of a tensor that an update is tried on
_FEWEST = 20  # estimates before ties are judged

_TOLD = {
    "ties": "%.0f %% of estimates tied and moved nothing: take more prompts a step, a larger eps, "
    "or a reward with more values",
    "changed": "an update changes %.2g %% of weights, the rest rounds it away: raise lr, or take "
    "32-bit weights",
    "repetition": "%.0f %% of 4-grams in the texts repeat: the reward may be won by repeating; "
    "look at the texts",
    "clipped": "%.0f %% of texts are cut at max_completion_length: raise it, or give a stop string",
    "forgotten": "the held-out loss has risen by %.2f nats a token: the model forgets; lower lr, "
    "or stop",
}


@dataclass(frozen=True)
class Bounds:
    """Where the rules warn, and where they stop a run.

    Args:
        ties: Warn if this share of estimates or more moved nothing.
        changed: Warn if an update changes less than this share of weights.
        repetition: Warn if this share of 4-grams or more repeats, and twice the share at first.
        clipped: Warn if this share of texts or more is cut at the limit of length.
        forgotten: Warn if the held-out loss rises by this many nats a token.
        stop_forgotten: Stop there. None: never.
    """

    ties: float = 0.9
    changed: float = 0.01
    repetition: float = 0.5
    clipped: float = 0.95
    forgotten: float = 0.2
    stop_forgotten: float | None = None

    def __post_init__(self) -> None:
        stop = self.stop_forgotten
        if stop is not None and not stop > 0:
            raise InputError(f"stop_forgotten must be positive, got {stop}")


@dataclass
class Health:
    """The rules over a run. `judge` takes the figures of one log, and says whether to stop."""

    bounds: Bounds = field(default_factory=Bounds)
    first: dict[str, float] = field(default_factory=dict)  # figures as they were at first
    told: set[str] = field(default_factory=set)

    def judge(self, figures: Mapping[str, float], estimates: int = 0) -> bool:
        """Warn of figures beyond their bounds, and return whether the run should stop."""
        for name, value in figures.items():
            self.first.setdefault(name, value)
        b = self.bounds
        if estimates >= _FEWEST and figures.get("ties", 0.0) >= b.ties:
            self._tell("ties", 100 * figures["ties"])
        if figures.get("changed", 1.0) < b.changed:
            self._tell("changed", 100 * figures["changed"])
        repeated = figures.get("repetition", 0.0)
        if repeated >= b.repetition and repeated >= 2 * self.first["repetition"]:
            self._tell("repetition", 100 * repeated)
        if figures.get("clipped", 0.0) >= b.clipped:
            self._tell("clipped", 100 * figures["clipped"])
        risen = figures.get("held_out", math.nan) - self.first.get("held_out", math.nan)
        if risen >= b.forgotten:
            self._tell("forgotten", risen)
        return b.stop_forgotten is not None and risen >= b.stop_forgotten

    def _tell(self, rule: str, value: float) -> None:
        if rule not in self.told:
            self.told.add(rule)
            logging.getLogger("mezo").warning(f"health: {_TOLD[rule]}", value)


def repetition(texts: Sequence[Sequence[int]], size: int = 4) -> float:
    """Return the share of n-grams that stood in the same text before; 0 if texts are short."""
    total = distinct = 0
    for ids in texts:
        grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
        total, distinct = total + len(grams), distinct + len(set(grams))
    return (total - distinct) / total if total else 0.0


@torch.no_grad()
def share_changed(
    rows: Sequence[tuple[str, torch.Tensor, tuple[int, int]]],
    moves: Sequence[Move],
    distribution: str,
) -> float:
    """Return the share of weights that an update changes.

    It is tried on the beginnings of the eight largest tensors, weighted by the tensors' sizes.

    Args:
        rows: Name, tensor and key of the trained tensors.
        moves: The update, as moves.
        distribution: The distribution of z.
    """
    largest = sorted(rows, key=lambda row: -row[1].numel())[:8]
    changed = total = 0.0
    for _, tensor, key in largest:
        before = tensor.detach().reshape(-1)[:_SAMPLE].cpu()
        after = before.clone()
        noise.apply_(after, key, moves, distribution=distribution)
        share = float((after != before).double().mean())
        changed, total = changed + share * tensor.numel(), total + tensor.numel()
    return changed / total if total else 1.0


def advantages(members: Sequence[Sequence[float | None]]) -> list[float]:
    """Return each member's mean advantage: rewards centred and scaled prompt by prompt.

    This is GRPO's scaling of a group, with the members of a population, both halves of all
    directions, in the place of completions. A prompt on which all members agree counts 0, so that
    prompts that are too easy or too hard add no noise. A missing reward counts 0.

    Args:
        members: Rewards by member, then by prompt.
    """
    found = [0.0] * len(members)
    prompts = list(zip(*members, strict=True))
    for rewards in prompts:
        known = [r for r in rewards if r is not None]
        mean = math.fsum(known) / len(known) if known else 0.0
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / len(known)) if known else 0.0
        for i, reward in enumerate(rewards):
            if reward is not None and spread > 0:
                found[i] += (reward - mean) / spread
    return [total / len(prompts) for total in found]
