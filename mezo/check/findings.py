"""What the numbers of `mezo check` mean, in sentences, and which options to take instead."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from mezo.runs.examiner import ERRORS, Horizon

STEPS = 20_000  # of a run: Table 16
AGREES = 0.1  # change of the projected gradient that is small beside the noise of a batch


@dataclass(frozen=True)
class Trained:
    """The part that would be trained, and how its weights are perturbed and rounded."""

    kind: str  # "all weights", "a part of the weights", or the adapter's type
    paper: list[str] | None  # the paper's learning rates and eps for it
    parameters: int
    tensors: int
    of: int  # parameters of the whole model
    dropout: list[float]
    dtypes: list[str]
    perturbation: str
    rounding: str
    half: bool  # some weights have 16 bits


@dataclass(frozen=True)
class ZeroShot:
    """How the model answers the prompt before it is trained."""

    accuracy: float
    n: int
    chance: float
    chance_error: float
    favourite: str  # the most frequent answer, and its share
    share: float


@dataclass(frozen=True)
class Measurements:
    """The measurements of `mezo check`, as JSON holds them; None stands for NaN."""

    trained: Trained
    prompt: ZeroShot
    candidates: dict[str, list[str]]  # the tokens of each
    bytes: dict[str, int]
    eps: float
    lr: float
    batch_size: int
    asked: int  # the batch size that was asked for
    directions: int
    lost: int  # directions along which the loss was not finite
    same_forward: bool
    differs: float | None  # of two estimates along one direction, relative
    share: float | None  # of the projected gradient's square, the part that is the gradient
    share_error: float | None
    share_at_most: float | None
    signal_at_most: float | None
    clear: bool  # the gradient is distinguishable from noise
    mean_size: float
    std: float
    trace: float  # of the Gauss-Newton matrix
    trace_error: float
    hessian: float  # trace, by second differences of the loss
    hessian_error: float
    gap: float  # between the losses of the two passes
    spacing: float  # of numbers of the loss's size
    loss: float
    pull: float  # E[g_B^2 z'Gz], of examiner.py
    steps: int  # of the run to come
    best_lr: float | None  # of a first step
    run_lr: float | None  # of the whole run
    limited: bool  # the rates are bounded by how far the slope lasts
    last_place: float  # a unit in the last place of most weights
    last_place_of: str
    eps_low: float | None  # change of the projected gradient at eps / 10
    eps_high: float | None  # and at 10 eps
    step_seconds: float
    forward_seconds: float
    seconds: float

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Measurements":
        """From the JSON object of `mezo check`, whose other keys are left out."""
        nested = {"trained": Trained(**found["trained"]), "prompt": ZeroShot(**found["prompt"])}
        known = {f.name: found[f.name] for f in fields(cls)}
        return cls(**(known | nested))

    @property
    def changes(self) -> tuple[float, float]:
        """Relative changes of the projected gradient at eps / 10 and 10 eps; inf if unknown."""
        low, high = (math.inf if x is None else x for x in (self.eps_low, self.eps_high))
        return low, high


def advice(m: Measurements) -> dict[str, Any]:
    """The options of a run: the rate for its length, and eps or a steadier neighbour.

    Where the gradient was not clearly measured, its upper bound was used, and a third is taken.
    """
    smaller, larger = m.changes
    part, eps = m.run_lr and m.run_lr / (1 if m.clear else 3), m.eps
    if eps < m.last_place / 2:
        eps = float(f"{4 * m.last_place:.0e}")
    elif min(smaller, larger) > AGREES:  # to the steadier side, unless rounding would show there
        down = smaller < larger and m.gap > 3 * m.spacing
        eps = float(f"{eps / 3 if down else 3 * eps:.0e}")
    return {"learning_rate": part and float(f"{part:.0e}"), "mezo_eps": eps}


def findings(m: Measurements) -> list[dict[str, str]]:
    """Sentences on the measurements, each with its level: "ok", "note" or "warning"."""
    found = (*_of_model(m), *_of_estimates(m), *_of_training(m))
    return [{"level": level, "text": text} for level, text in found]


def _judged(good: bool, text: str, otherwise: str, level: str = "warning") -> tuple[str, str]:
    return ("ok", text) if good else (level, f"{text}: {otherwise}")


def _of_model(m: Measurements) -> Iterator[tuple[str, str]]:
    t, p, words = m.trained, m.prompt, m.candidates
    text = f"training {t.kind}: {t.parameters:,} of {t.of:,} parameters, {t.tensors} "
    text += f"tensors of {', '.join(t.dtypes)}, perturbed {t.perturbation}"
    yield "ok", text + (f", updates rounded {t.rounding}" if t.half else "")
    text = f"zero-shot accuracy {p.accuracy:.3f} on {p.n} dev examples, chance "
    text += f"{p.chance:.3f} ± {p.chance_error:.3f} (standard error); {p.favourite!r} is "
    text += f"its answer to {p.share:.0%}"
    why = "MeZO needs a model that nearly solves the task when asked in the right words (Section 4 "
    why += "of the paper): try other words, --calibrate, or a model pre-trained for longer"
    yield _judged(p.accuracy > p.chance + ERRORS * p.chance_error, text, why)
    shown = ", ".join(f"{word!r} ({' '.join(tokens)})" for word, tokens in words.items())
    text = f"candidates and their tokens: {shown or 'descriptions, of any length'}"
    more = "more than one costs a row of the batch, and the score is the mean over them"
    yield _judged(all(len(tokens) == 1 for tokens in words.values()), text, more, "note")
    text = f"the same estimate twice differs by {m.differs or 0:.1g} of its size"
    text += f"; dropout {t.dropout or '(none)'} is off: MeZO runs in eval mode"
    yield _judged(m.same_forward and (m.differs or 0) < AGREES, text, "not deterministic")


def _of_estimates(m: Measurements) -> Iterator[tuple[str, str]]:
    share, error, size = m.share, m.share_error, m.batch_size
    text = f"projected gradient: mean size {m.mean_size:.3g}, standard deviation {m.std:.3g} "
    text += f"over {m.directions - m.lost} directions and twice as many batches of {size}"
    yield _judged(not m.lost, text, f"{m.lost} directions gave a loss that is not finite")
    if size < m.asked:
        yield "note", f"{2 * size} training examples make two batches of {size}, not {m.asked}"
    if share is None:
        yield "warning", "the loss changes along no direction: a larger --mezo_eps, or float32"
    elif m.clear:
        text = f"{share:.0%} ± {error:.0%} of its square is gradient, the rest is the batch: one 4 "
        yield "ok", f"{text}times as large makes a step worth {4 / (1 + 3 * share):.1f} of these"
    else:
        text = f"the gradient is not distinguishable from noise with {m.directions} directions, "
        text += f"at most {m.share_at_most:.0%} of the square ({share:.0%} ± {error:.0%})"
        yield "note", f"{text}: a larger batch makes better steps, more --directions tell more"
    eps, unit, paper = m.eps, m.last_place, m.trained.paper
    low, high = m.changes
    text = f"eps {eps:g}: the projected gradient changes by {low:.1%} at {eps / 10:g}, by "
    text += f"{high:.1%} at {10 * eps:g}"
    text += f"; the paper takes {paper[1]}" if paper else ""
    ends = eps / (10 if low <= AGREES else 1), eps * (10 if high <= AGREES else 1)
    text += f"; it is steady from {ends[0]:g} to {ends[1]:g}"
    yield _judged(ends[0] < ends[1], text, f"check again at {advice(m)['mezo_eps']:g}")
    text = f"half a unit in the last place of most {m.last_place_of} weights is {unit / 2:.2g}"
    yield _judged(eps >= unit / 2, text, f"eps {eps:g} is too small, take {4 * unit:.0e}")
    text = f"the two losses differ by {m.gap:.1g}, numbers of their size by {m.spacing:.1g}"
    yield _judged(m.gap > m.spacing, text, "a larger --mezo_eps, or float32")


def _of_training(m: Measurements) -> Iterator[tuple[str, str]]:
    t, lr, best = m.trained, m.lr, m.best_lr
    text = f"curvature: tr H is {m.trace:.4g} ± {m.trace_error:.2g} (its Gauss-Newton part), "
    text += f"{m.hessian:.4g} ± {m.hessian_error:.2g} by second differences"
    clear = m.hessian > ERRORS * m.hessian_error
    yield "ok", text + ("" if clear else ", which cannot be told from 0")
    if best is None:
        yield "warning", "no learning rate can be derived: no slope of the loss is seen at this eps"
    else:
        run = m.run_lr or best
        text = f"the best learning rate of a run of {m.steps:,} steps is "
        text += f"{'about' if m.clear else 'at most'} {run:.1e}, of a single step {best:.1e}; a "
        text += f"rate up to three times smaller or larger than {run:.1e} is worth trying"
        text += "; no step is longer than its slope lasts" if m.limited else ""
        yield "ok", text + (f"; the paper's rates are {t.paper[0]}" if t.paper else "")
        yield _rate(m, lr, run)
    size, half = lr * m.mean_size, m.last_place / 2
    text = f"lr * |projected_grad| is {size:.1g}, half a unit in the last place {half:.1g}"
    kept = t.half and t.perturbation == "scratch" and t.rounding != "nearest"
    text += f": {t.rounding} rounding keeps it in the mean" if kept else ""
    yield _judged(kept or size > half, text, "it is rounded away")
    b = {key: f"{value / 2**20:,.0f} MiB" for key, value in m.bytes.items()}
    text = f"memory: weights {b['weights']}, on top {b['inference']} for a pass, {b['estimate']} "
    yield "ok", f"{text}for a step (± 20 on a CPU); the largest trained tensor is {b['largest']}"
    step, passes = m.step_seconds, 2 * m.forward_seconds / m.step_seconds
    text = f"a step takes {step:.2g} s, {passes:.0%} in forward passes: {STEPS:,} steps are "
    yield "ok", f"{text}{STEPS * step / 3600:.1f} hours, this check {m.seconds / step:.0f} steps"


def _rate(m: Measurements, lr: float, best: float) -> tuple[str, str]:
    """Judge the learning rate `lr` beside the best of the run."""
    horizon = Horizon(m.signal_at_most or 0.0, m.pull, m.loss, m.steps)
    change = horizon.change(lr) / m.loss
    text = f"learning_rate {lr:g} is {lr / best:.2g} times that: {m.steps:,} steps are expected to "
    if change > 0:
        return "warning", f"{text}raise the loss, as the noise of the updates outweighs their gain"
    text += f"lower the loss by about {-change:.0%}, and at the best rate by "
    text += f"{-horizon.change(best) / m.loss:.0%}"
    return "ok" if 1 / 3 <= lr / best <= 3 else "note", text
