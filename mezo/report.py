"""Plots. matplotlib is part of the demo's extra; without it there is one line that says so."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from .tuning import Point


def learning_curves(
    path: Path,
    curves: Mapping[str, Sequence[Point]],
    memory: Mapping[str, int],
) -> None:
    """Test accuracy against forward passes, and memory above inference, side by side in one PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logging.getLogger("mezo").warning("no plot: pip install 'mezo-lm[demo]'")
        return
    figure = Figure(figsize=(11, 4.2), layout="constrained")  # no pyplot: no global state
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = dict(zip(curves, ("C0", "C1", "C3", "C2", "C4"), strict=False))
    for name, points in curves.items():
        passes, accuracies = [p.forward_passes for p in points], [100 * p.accuracy for p in points]
        left.plot(passes, accuracies, marker="o", markersize=3, color=colours[name], label=name)
    left.set(xlabel="forward passes of one batch (a backward pass counts as two)")
    left.set(ylabel="test accuracy, %")
    left.legend(loc="lower right")
    values = [memory[name] / 2**20 for name in curves]
    bars = right.barh(list(curves), values, color=[colours[name] for name in curves])
    right.bar_label(bars, fmt="%.0f MiB", padding=3)
    right.set(xlabel="peak memory above inference, MiB", xlim=(0, 1.25 * max([*values, 1.0])))
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
