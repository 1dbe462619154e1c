"""What the numbers of `mezo check` mean, in sentences, and which options to take instead."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from mezo.runs.examiner import ERRORS, Horizon

STEPS = 20_000  # of a run: Table 16
AGREES = 0.1  # change of the projected gradient that is small beside the noise of a batch

Finding = tuple[str, str]  # its level and its text


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
    model = (_trained, _zero_shot, _candidates, _deterministic)
    estimates = (_projected_grad, _share, _eps, _eps_and_precision, _gap)
    run = (_curvature, _rates, _rounding, _memory, _time)
    parts = (*model, *estimates, *run)
    told = (finding for part in parts for finding in part(m))
    return [{"level": level, "text": text} for level, text in told]


def _judged(good: bool, text: str, otherwise: str, level: str = "warning") -> tuple[str, str]:
    """The text is fine if `good`; else what it means, and what to do, is added to it."""
    return ("ok", f"{text}.") if good else (level, f"{text}: {otherwise}.")


def _trained(m: Measurements) -> Iterator[Finding]:
    t = m.trained
    rounded = f"; updates are rounded {t.rounding}" if t.half else ""
    yield (
        "ok",
        f"Trained: {t.kind}, {t.parameters:,} of {t.of:,} parameters, in {t.tensors} tensors of "
        f"{', '.join(t.dtypes)}. The perturbation is {t.perturbation}{rounded}.",
    )


def _zero_shot(m: Measurements) -> Iterator[Finding]:
    p = m.prompt
    yield _judged(
        p.accuracy > p.chance + ERRORS * p.chance_error,
        f"The zero-shot accuracy is {p.accuracy:.3f} on {p.n} dev examples; chance is "
        f"{p.chance:.3f} ± {p.chance_error:.3f} (standard error). The most frequent answer is "
        f"{p.favourite!r}, with {p.share:.0%}",
        "MeZO needs a model that nearly solves the task when it is asked in the right words "
        "(Section 4 of the paper). Try other words, --calibrate, or a model that was pre-trained "
        "for longer",
    )


def _candidates(m: Measurements) -> Iterator[Finding]:
    words = ", ".join(f"{word!r} ({' '.join(tokens)})" for word, tokens in m.candidates.items())
    yield _judged(
        all(len(tokens) == 1 for tokens in m.candidates.values()),
        f"The candidates and their tokens are {words or 'descriptions of any length'}",
        "a candidate of several tokens takes a row of the batch for itself, and its score is the "
        "mean over its tokens",
        "note",
    )


def _deterministic(m: Measurements) -> Iterator[Finding]:
    differs, dropout = m.differs or 0, m.trained.dropout
    off = f"; dropout {dropout} is switched off, as MeZO runs in eval mode" if dropout else ""
    yield _judged(
        m.same_forward and differs < AGREES,
        f"The same estimate, made twice, differs by {differs:.1g} of its size{off}",
        "the forward pass is not deterministic, and its noise drowns the estimate",
    )


def _projected_grad(m: Measurements) -> Iterator[Finding]:
    size = m.batch_size
    yield _judged(
        not m.lost,
        f"The projected gradient has the mean size {m.mean_size:.3g} and the standard deviation "
        f"{m.std:.3g}, over {m.directions - m.lost} directions and two batches of {size} for each",
        f"the loss was not finite along {m.lost} other directions",
    )
    if size < m.asked:
        yield "note", f"{2 * size} training examples make two batches of {size}, not {m.asked}."


def _share(m: Measurements) -> Iterator[Finding]:
    share, error = m.share, m.share_error
    if share is None:
        yield "warning", "The loss changes along no direction: take a larger --mezo_eps or float32."
    elif m.clear:
        yield (
            "ok",
            f"Of its square, {share:.0%} ± {error:.0%} is the gradient, and the rest is the "
            f"noise of the batch. With a batch four times as large, one step is worth "
            f"{4 / (1 + 3 * share):.1f} of these.",
        )
    else:
        yield (
            "note",
            f"The gradient is not distinguishable from noise with {m.directions} directions: it "
            f"is at most {m.share_at_most:.0%} of the square ({share:.0%} ± {error:.0%}). A "
            "larger batch makes better steps; more --directions measure more exactly.",
        )


def _eps(m: Measurements) -> Iterator[Finding]:
    eps, (low, high), paper = m.eps, m.changes, m.trained.paper
    ends = eps / (10 if low <= AGREES else 1), eps * (10 if high <= AGREES else 1)
    yield _judged(
        ends[0] < ends[1],
        f"The projected gradient at eps {eps:g} changes by {low:.1%} at {eps / 10:g} and by "
        f"{high:.1%} at {10 * eps:g}{f'; the paper takes {paper[1]}' if paper else ''}. It is "
        f"steady from {ends[0]:g} to {ends[1]:g}",
        f"check again with --mezo_eps {advice(m)['mezo_eps']:g}",
    )


def _eps_and_precision(m: Measurements) -> Iterator[Finding]:
    yield _judged(
        m.eps >= m.last_place / 2,
        f"Half a unit in the last place of most {m.last_place_of} weights is "
        f"{m.last_place / 2:.2g}",
        f"eps {m.eps:g} is too small; take {4 * m.last_place:.0e}",
    )


def _gap(m: Measurements) -> Iterator[Finding]:
    yield _judged(
        m.gap > m.spacing,
        f"The two losses differ by {m.gap:.1g}, and neighbouring numbers of their size by "
        f"{m.spacing:.1g}",
        "only rounding is measured; take a larger --mezo_eps or float32",
    )


def _curvature(m: Measurements) -> Iterator[Finding]:
    clear = m.hessian > ERRORS * m.hessian_error
    yield (
        "ok",
        f"The trace of the Hessian is {m.trace:.4g} ± {m.trace_error:.2g} (its Gauss-Newton "
        f"part), and {m.hessian:.4g} ± {m.hessian_error:.2g} by second differences"
        f"{'' if clear else ', which cannot be told from 0'}.",
    )


def _rates(m: Measurements) -> Iterator[Finding]:
    best, paper = m.best_lr, m.trained.paper
    if best is None:
        yield "warning", "No learning rate can be derived: at this eps the loss shows no slope."
        return
    run = m.run_lr or best
    bounded = " Both are bounded by how far the slope of the loss lasts." if m.limited else ""
    yield (
        "ok",
        f"The best learning rate for {m.steps:,} steps is {'about' if m.clear else 'at most'} "
        f"{run:.1e}; for a single step it would be {best:.1e}.{bounded} Rates up to three times "
        f"smaller or larger than {run:.1e} are worth a try"
        f"{f'; the paper takes {paper[0]}' if paper else ''}.",
    )
    yield _rate(m, m.lr, run)


def _rate(m: Measurements, lr: float, best: float) -> Finding:
    """Judge the learning rate `lr` beside the best of the run."""
    horizon = Horizon(m.signal_at_most or 0.0, m.pull, m.loss, m.steps)
    change = horizon.change(lr) / m.loss
    text = f"The learning rate {lr:g} is {lr / best:.2g} times that. "
    if change > 0:
        text += f"In {m.steps:,} steps it is expected to raise the loss, as the noise of the "
        return "warning", f"{text}updates outweighs what they gain."
    text += f"In {m.steps:,} steps it is expected to lower the loss by about {-change:.0%}, and "
    text += f"the best rate by {-horizon.change(best) / m.loss:.0%}."
    return "ok" if 1 / 3 <= lr / best <= 3 else "note", text


def _rounding(m: Measurements) -> Iterator[Finding]:
    t, size, half = m.trained, m.lr * m.mean_size, m.last_place / 2
    kept = t.half and t.perturbation == "scratch" and t.rounding != "nearest"
    yield _judged(
        kept or size > half,
        f"lr * |projected_grad| is {size:.1g}, and half a unit in the last place is {half:.1g}"
        f"{f'; {t.rounding} rounding keeps such updates in the mean' if kept else ''}",
        "most updates are rounded away; take float32, or perturbation=scratch with stochastic "
        "rounding",
    )


def _memory(m: Measurements) -> Iterator[Finding]:
    b = {key: f"{value / 2**20:,.0f} MiB" for key, value in m.bytes.items()}
    yield (
        "ok",
        f"The weights take {b['weights']} of memory; a forward pass takes {b['inference']} more, "
        f"and a step {b['estimate']} (± 20 on a CPU). The largest trained tensor has "
        f"{b['largest']}.",
    )


def _time(m: Measurements) -> Iterator[Finding]:
    step = m.step_seconds
    yield (
        "ok",
        f"A step takes {step:.2g} s, of which {2 * m.forward_seconds / step:.0%} are forward "
        f"passes. A run of {STEPS:,} steps takes {STEPS * step / 3600:.1f} hours, and this check "
        f"took as long as {m.seconds / step:.0f} steps.",
    )
