"""What a quadratic of known spectrum predicts of each method, and what each method then does.

    python -m experiments.quadratic        # CPU seconds; writes the JSON and docs/quadratic.png

L = 1/2 sum lambda_i theta_i^2 has 512 weights in a 16 x 32 matrix, lambda_i = 1/i in random order,
and begins at theta = 1. With a = Lambda theta and S = sum a_i^2, a step along the mean of n
estimates changes the second moments m_i = E theta_i^2 by

    m_i <- m_i - 2 lr lambda_i m_i + lr^2 ((S + k_i) / n + (1 - 1/n) a_i^2)

where k_i comes from the fourth moments of z: 2 a_i^2 for Gaussian z, 0 for Rademacher z, and
2 (its row + its column of a^2) + 4 a_i^2 for a product of two Gaussian vectors. Momentum needs the
moments of its buffer, too. The recursions are exact, except that sign, z-scores and one second
moment divide by the root of S, for which its mean is taken. Each method's rate is the one with the
lowest predicted loss.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from mezo import MeZO
from mezo.compare import style
from mezo.estimators import passes_of
from mezo.rules import Momentum, ScalarAdam
from mezo.runs.result import environment

RESULT = Path(__file__).parent / "results" / "quadratic.json"
PLOT = Path(__file__).parents[1] / "docs" / "quadratic.png"
ROWS, COLUMNS, PASSES, SEEDS, POINTS = 16, 32, 480, 3, 8
EPS = 1e-4
Moments = np.ndarray  # (3, weights): E theta^2, E theta buffer, E buffer^2
Fourth = Callable[[np.ndarray], np.ndarray]  # k_i of a_i^2


def spectrum() -> np.ndarray:
    order = np.random.default_rng(0).permutation(ROWS * COLUMNS)
    return 1.0 / (1.0 + order)


def gaussian(a2: np.ndarray) -> np.ndarray:
    return 2 * a2


def rademacher(a2: np.ndarray) -> np.ndarray:
    return np.zeros_like(a2)


def product(a2: np.ndarray) -> np.ndarray:
    square = a2.reshape(ROWS, COLUMNS)
    around = square.sum(0, keepdims=True) + square.sum(1, keepdims=True)
    return (2 * around + 4 * square).ravel()


@dataclass(frozen=True)
class Method:
    """A method as MeZO's options, and as what the recursion needs to know of it."""

    options: dict[str, Any] = field(default_factory=dict)
    fourth: Fourth = gaussian
    momentum: float = 0.0
    kind: str = "sgd"  # or "normalised" by the root of S, or "sign", or "gradient"

    @property
    def samples(self) -> int:
        return self.options.get("num_samples", 1)

    @property
    def passes(self) -> int:
        if self.kind == "gradient":
            return 3
        return passes_of(self.options.get("estimator", "two_point"), self.samples)


FZOO = {"estimator": "one_sided", "num_samples": 8, "shaping": "z_scores"}
METHODS = {
    "gradient": Method(kind="gradient"),
    "MeZO": Method(),
    "4 directions": Method({"num_samples": 4}),
    "one-sided, 8 directions": Method({"estimator": "one_sided", "num_samples": 8}),
    "Rademacher": Method({"distribution": "rademacher"}, rademacher),
    "low rank, new each step": Method({"perturbation": "low_rank", "interval": 1}, product),
    "momentum": Method({"rule": Momentum(0.9)}, momentum=0.9),
    "sign": Method({"rule": "sign"}, kind="sign"),
    "one second moment": Method({"rule": ScalarAdam(0.9)}, kind="normalised"),
    "FZOO": Method(FZOO | {"distribution": "rademacher"}, rademacher, kind="normalised"),
}


def step(method: Method, lr: float, now: Moments, eigen: np.ndarray) -> Moments:
    """Return the moments after a step."""
    m, c, q = now
    a2, n = eigen**2 * m, method.samples
    total = a2.sum()
    if method.kind == "gradient":
        return np.stack([(1 - lr * eigen) ** 2 * m, c, q])
    if method.kind == "sign":  # E sign(g z_i) = 2/pi arcsin of their correlation
        toward = 2 / np.pi * np.arcsin(np.minimum(1, eigen * np.sqrt(m / total))) * np.sqrt(m)
        return np.stack([m - 2 * lr * toward + lr**2, c, q])
    lr = lr / np.sqrt(total) if method.kind == "normalised" else lr
    power = (total + method.fourth(a2)) / n + (1 - 1 / n) * a2
    beta = method.momentum
    q = beta**2 * q + 2 * beta * eigen * c + power
    drift = beta * c + eigen * m
    return np.stack([m - 2 * lr * drift + lr**2 * q, drift - lr * q, q])


def predicted(method: Method, lr: float) -> list[float]:
    """Return the loss at POINTS + 1 equally distant numbers of passes."""
    eigen, losses = spectrum(), []
    now = np.stack([np.ones_like(eigen), np.zeros_like(eigen), np.zeros_like(eigen)])
    for _ in range(POINTS):
        losses.append(float((eigen * now[0]).sum() / 2))
        for _ in range(_each(method)):
            now = step(method, lr, now, eigen)
            if not np.isfinite(now).all() or now[0].max() > 1e6:
                return [*losses, *[float("inf")] * (POINTS + 1 - len(losses))]
    return [*losses, float((eigen * now[0]).sum() / 2)]


def _each(method: Method) -> int:
    return PASSES // method.passes // POINTS


def best_rate(method: Method) -> float:
    """Return the rate of the lowest predicted loss, of eight in a factor of ten."""
    rates = [10 ** (at / 8) for at in range(-32, 9)]
    return min(rates, key=lambda lr: predicted(method, lr)[-1])


def measured(method: Method, lr: float, seed: int) -> list[float]:
    """Return the losses of a run of MeZO itself, or of gradient descent."""
    eigen = torch.from_numpy(spectrum()).view(ROWS, COLUMNS)
    theta = torch.nn.Parameter(torch.ones_like(eigen))

    def loss() -> torch.Tensor:
        return (eigen * theta * theta).sum() / 2

    options = {"eps": EPS, "seed": seed, "perturbation": "in_place"} | method.options
    optimizer = MeZO([("theta", theta)], lr=lr, **options)
    losses = []
    for _ in range(POINTS):
        losses.append(_at(optimizer, loss))
        for _ in range(_each(method)):
            if method.kind == "gradient":
                theta.data -= lr * eigen * theta.data
            else:
                optimizer.step(loss)
    return [*losses, _at(optimizer, loss)]


@torch.no_grad()
def _at(optimizer: MeZO, loss: Callable[[], torch.Tensor]) -> float:
    optimizer.write()
    return float(loss())


def run() -> dict[str, Any]:
    rows = {}
    for name, method in METHODS.items():
        lr = best_rate(method)
        rows[name] = {"lr": lr, "passes": method.passes, "steps": POINTS * _each(method)}
        rows[name]["rates"] = {}
        for factor in (0.3, 1.0):
            runs = [measured(method, lr * factor, seed) for seed in range(SEEDS)]
            own = {"predicted": predicted(method, lr * factor), "measured": runs}
            rows[name]["rates"][f"{lr * factor:.3g}"] = own
            print(f"{name}: lr {lr * factor:.3g}, loss {mean(r[-1] for r in runs):.3f}, ", end="")
            print(f"predicted {own['predicted'][-1]:.3f}", flush=True)
    return {"weights": ROWS * COLUMNS, "budget": PASSES, "rows": rows, "environment": environment()}


def plot(found: dict[str, Any], path: Path) -> None:
    """Losses by passes, predicted as lines and measured as points; and one against the other."""
    figure = style.figure(9.6)
    left, right = style.panels(figure, rows=2)
    for colour, (name, row) in zip(style.COLOURS, found["rows"].items(), strict=True):
        for at, own in enumerate(row["rates"].values()):
            runs, expected = own["measured"], own["predicted"]
            passes = [row["passes"] * row["steps"] * i / POINTS for i in range(POINTS + 1)]
            if at == 1:
                left.plot(passes, expected, color=colour, label=name, linewidth=1.4)
                means = [mean(each) for each in zip(*runs, strict=True)]
                left.plot(passes, means, "o", color=colour, markersize=3.5)
            fallen = [(run[0] - run[-1]) / passes[-1] for run in runs]
            x = (expected[0] - expected[-1]) / passes[-1]
            mark = {"color": colour, "marker": "o" if at else "^", "capsize": 2, "markersize": 5}
            right.errorbar(x, mean(fallen), yerr=stdev(fallen), linestyle="none", **mark)
    left.set(xlabel="forward passes (a backward pass counts as two)", ylabel="loss", yscale="log")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    low, high = right.get_xlim()
    right.axline((low, low), (high, high), color="#999999", linewidth=0.8)
    right.set(xlabel="predicted decrease of the loss per pass", ylabel="measured")
    style.save(figure, path)


def main() -> None:
    found = run()
    RESULT.write_text(json.dumps(found, indent=1))
    plot(found, PLOT)


if __name__ == "__main__":
    main()
