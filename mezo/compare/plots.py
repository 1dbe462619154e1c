"""Plots. matplotlib is part of the extra `demo`; if it is missing, one line says so.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Markers and lines repeat the
distinction: MeZO is solid, back-propagation dashed, and untrained methods are dotted.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mezo.compare import recipes, style
from mezo.evaluation.curve import Point
from mezo.memory import sizes

STYLES = {  # method -> colour, marker, line
    "zero-shot": ("#666666", "o", ":"),
    "calibrated": ("#AA4499", "s", ":"),
    "icl": ("#000000", "s", ":"),
    "lp": ("#56B4E9", "D", ":"),
    "ft": ("#D55E00", "^", "--"),
    "lora": ("#E69F00", "v", "--"),
    "prefix": ("#CC79A7", "<", "--"),
    "head": ("#56B4E9", ">", "--"),
    "prompt": ("#666666", "d", "--"),
    "mezo": ("#0072B2", "o", "-"),
    "mezo-lora": ("#009E73", "s", "-"),
    "mezo-prefix": ("#CC79A7", "D", "-"),
    "mezo-head": ("#56B4E9", "P", "-"),
    "mezo-prompt": ("#000000", "X", "-"),
    "mezo-biases_and_norms": ("#56B4E9", "v", "-"),
    "n-spsa": ("#0072B2", "^", "-."),
    "one-sided": ("#009E73", "v", "-."),
    "fzoo": ("#CC79A7", "P", "-."),
    "lozo": ("#56B4E9", "X", "-."),
    "momentum": ("#000000", "d", "-."),
    "zo-adam": ("#8C6D31", "D", "-."),
    "ft-checkpointing": ("#D55E00", "p", "-."),
    "lora-checkpointing": ("#E69F00", "h", "-."),
}
_OTHERS = ("#8C6D31", "*", "-")
NAMES = {"icl": "in context", "lp": "linear probe", "ft": "Adam, all weights"}
NAMES |= {"calibrated": "zero-shot, calibrated", "n-spsa": "MeZO, 4 directions"}
NAMES |= {"one-sided": "MeZO, one-sided, 8 directions", "fzoo": "FZOO", "lozo": "LOZO"}
NAMES |= {"momentum": "MeZO, momentum", "zo-adam": "MeZO with Adam's rule"}
_BELOW: Any = {"loc": "outside lower center", "ncols": 2, "frameon": False, "fontsize": 9.5}
METRICS = {"accuracy": "accuracy, %", "macro_f1": "macro F1, %", "f1": "F1, %"}
METRICS |= {"exact_match": "exact match, %"}


def of_comparison(found: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Plot curves, memory and sizes, each as PNG and as SVG in the folder; return the SVGs by
    title.

    Args:
        found: what `compare` returns.

    Raise ImportError without matplotlib.
    """
    plots = {"Learning curves": _curves, "Accuracy against memory": _memory}
    plots |= {"Memory by model size": _sizes}
    written = {}
    for title, draw in plots.items():
        figure = draw(found)
        if figure is not None:
            path = folder / draw.__name__.strip("_")
            written[title] = style.save(figure, path, (".png", ".svg"))
    return written


def label(method: str) -> str:
    """Return a method's name for readers: "Adam, LoRA", "MeZO, prefix"."""
    if method in NAMES or method == "zero-shot" or not recipes.is_known(method):
        return NAMES.get(method, method)
    trained, _, part = method.partition("-") if method.startswith("mezo") else ("Adam", "", method)
    part = part.replace("_", " ").replace("lora", "LoRA").replace("ft-check", "all weights, check")
    part = part.replace("-checkpointing", ", checkpointing")
    return f"{'MeZO' if trained == 'mezo' else trained}, {part or 'all weights'}"


def _curves(found: Mapping[str, Any]) -> Any:
    """Plot the dev metric and loss on the way; lines are means over seeds, bands their range."""
    trained = [row["method"] for row in found["rows"]]
    curves = {m: [c["curve"] for c in _chosen(found, m) if c["curve"]] for m in trained}
    curves = {method: runs for method, runs in curves.items() if runs}
    if not curves:
        return None
    written = any("dev_accuracy" not in run[0] for runs in curves.values() for run in runs)
    figure = style.figure(4.8 if written else 8.4)
    panels = style.panels(figure, rows=1 if written else 2)
    shown = {"dev_loss": "loss on the dev examples"}
    if not written:
        shown = {"dev_accuracy": "accuracy on the dev examples, %"} | shown
    for axes, (name, text) in zip(panels, shown.items(), strict=True):
        for method, runs in curves.items():
            _curve(axes, method, runs, name)
        if name == "dev_accuracy":
            for row in found["rows"]:
                if row["method"] not in curves and found["metric"] == "accuracy":
                    colour, _, line = STYLES.get(row["method"], _OTHERS)
                    y, name = 100 * row["dev"], label(row["method"])
                    axes.axhline(y, color=colour, linestyle=line, linewidth=1.4, label=name)
        axes.set(xscale="log", ylabel=text)
        _plain_ticks(axes.xaxis)
        axes.set_xlabel("forward passes (a backward pass counts as two)")
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    names = [label(row["method"]) for row in found["rows"] if label(row["method"]) in handles]
    figure.legend([handles[name] for name in names], names, **_BELOW)
    return figure


def _curve(axes: Any, method: str, runs: list[list[dict[str, float]]], name: str) -> None:
    scale = 100 if name == "dev_accuracy" else 1
    passes = sorted(set.intersection(*({row["forward_passes"] for row in run} for run in runs)))
    values = [[scale * r[name] for run in runs for r in run if r["forward_passes"] == x]
              for x in passes]  # fmt: skip
    colour, marker, line = STYLES.get(method, _OTHERS)
    axes.plot(
        passes,
        [mean(each) for each in values],
        color=colour,
        marker=marker,
        linestyle=line,
        markersize=4,
        linewidth=1.5,
        label=label(method),
    )
    low, high = [min(each) for each in values], [max(each) for each in values]
    axes.fill_between(passes, low, high, color=colour, alpha=0.12, linewidth=0)


def _chosen(found: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    return [cell for cell in found["cells"] if cell["method"] == method and cell["chosen"]]


def _memory(found: Mapping[str, Any]) -> Any:
    """Plot the table's rows as points; bars are a standard deviation over seeds to either side."""
    figure = style.figure(5.2)
    (axes,) = style.panels(figure)
    for row in found["rows"]:
        colour, marker, _ = STYLES.get(row["method"], _OTHERS)
        axes.errorbar(
            max(row["peak_memory"] / 2**20, 1.0),
            100 * row["mean"],
            yerr=100 * (row["std"] or 0.0),
            color=colour,
            marker=marker,
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=0.6,
            capsize=3,
            linestyle="none",
            label=label(row["method"]),
        )
    axes.set_xscale("log")
    axes.set_xlabel("peak memory above the model's weights, MiB")
    axes.set_ylabel(f"test {METRICS.get(found['metric'], found['metric'])}")
    _plain_ticks(axes.xaxis)
    figure.legend(**_BELOW)
    return figure


def _plain_ticks(axis: Any) -> None:
    """Label 10, 20, 50 instead of powers, with few enough labels that they do not collide."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


_SIZES = {  # as in sizes.COLUMNS: colour, marker, line
    "inference": ("#666666", "o", ":"),
    "MeZO": ("#0072B2", "o", "-"),
    "MeZO prefix": ("#CC79A7", "D", "-"),
    "in context": ("#000000", "s", ":"),
    "prefix FT": ("#CC79A7", "<", "--"),
    "Adam FT": ("#E69F00", "^", "--"),
    "Adam FT, 32 bits": ("#D55E00", "^", "--"),
}


def _sizes(found: Mapping[str, Any]) -> Any:
    """Plot the paper's figure: lines are estimates (sizes.py), crosses what the paper measured."""
    figure = style.figure(5.8)
    (axes,) = style.panels(figure)
    billions = {name: row[0] for name, row in sizes.ESTIMATES.items()}
    for i, method in reversed(list(enumerate(sizes.COLUMNS, start=1))):  # the highest line first
        colour, _, line = _SIZES[method]
        values = [row[i] for row in sizes.ESTIMATES.values()]
        width = 3.5 if method == "inference" else 1.5  # MeZO's line lies on it
        axes.plot(billions.values(), values, color=colour, linestyle=line, linewidth=width,
                  label=method)  # fmt: skip
        for size, measured in sizes.PAPER.get(method, {}).items():
            mark = {"color": colour, "marker": "x", "markersize": 6, "linestyle": "none"}
            axes.plot([billions[size]], [measured], **mark)
    axes.plot([], [], color="#333333", marker="x", linestyle="none", label="measured in the paper")
    for name, room in (("RTX 3090, 24 GB", 24), ("A100, 80 GB", 80)):
        axes.axhline(room, color="#999999", linewidth=0.8)
        axes.annotate(name, (0.115, room), (0, 2), textcoords="offset points", fontsize=8,
                      color="#555555")  # fmt: skip
    own = found["parameters"] / 1e9
    if billions["125M"] <= own <= billions["175B"]:
        axes.axvline(own, color="#999999", linewidth=0.8)
    axes.set(xscale="log", yscale="log", ylabel="memory, GB")
    axes.set_xlabel("weights of an OPT (16 bits if not said, 700 tokens, batch 1)")
    axes.set_xticks(list(billions.values()), list(billions))
    axes.minorticks_off()
    _plain_ticks(axes.yaxis)
    figure.legend(**_BELOW)
    return figure


def learning_curves(
    path: Path,
    curves: Mapping[str, Sequence[Point]],
    memory: Mapping[str, int],
) -> None:
    """Plot test accuracy against forward passes and memory above inference, in one PNG."""
    try:
        figure = style.figure(6.4)
    except ImportError:
        logging.getLogger("mezo").warning("no plot: pip install 'mezo-lm[demo]'")
        return
    upper, lower = style.panels(figure, rows=2, height_ratios=(5, 2))
    styles = dict(zip(curves, _demo_styles(curves), strict=True))
    for name, points in curves.items():
        passes, accuracies = [p.forward_passes for p in points], [100 * p.accuracy for p in points]
        colour, marker, line = styles[name]
        upper.plot(passes, accuracies, marker=marker, markersize=4, color=colour, linestyle=line,
                  label=name)  # fmt: skip
    upper.set(xlabel="forward passes of one batch\n(a backward pass counts as two)")
    upper.set(ylabel="test accuracy, %")
    style.legend(upper, "lower right")
    values = [memory[name] / 2**20 for name in curves]
    names = [name.replace(", ", ",\n") for name in curves]
    bars = lower.barh(names, values, color=[styles[name][0] for name in curves])
    style.lengths(lower, bars, "%.0f MiB")
    lower.set(xlabel="peak memory above inference, MiB", xlim=(0, 1.35 * max([*values, 1.0])))
    lower.invert_yaxis()
    lower.grid(visible=False, axis="y")
    style.save(figure, path)


def _demo_styles(names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Colour, marker and line of each method of the demo: MeZO solid, Adam dashed, as elsewhere."""
    mezo = itertools.cycle([STYLES["mezo-lora"], STYLES["mezo"], STYLES["mezo-prefix"]])
    for name in names:
        yield STYLES["ft"] if name.startswith("Adam") else next(mezo)
