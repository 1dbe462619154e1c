"""How every plot looks: those of the commands, of docs/ and of experiments.

Panels stand one above another and letters are large, so that a picture as narrow as a phone can be
read. The ground is white and opaque, so that dark pages show it, too. matplotlib is part of the
extra `demo`; each function raises ImportError without it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = (  # Okabe and Ito's, which colour-blind readers can tell apart, and two more
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
    "#8C6D31",
    "#666666",
    "#999933",
)
WIDTH = 6.4  # inches of a plot whose legend is within it
_LETTERS = {"size": 11.0}


def figure(height: float, width: float = WIDTH) -> Any:
    """Return an empty figure, in inches. It is none of pyplot's, which keeps global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def panels(made: Any, rows: int = 1, columns: int = 1, **more: Any) -> list[Any]:
    """Return the axes of a figure, row by row. `more` is for matplotlib's `subplots`."""
    found = made.subplots(rows, columns, squeeze=False, **more).flatten().tolist()
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return list(found)


def legend(axes: Any, place: str = "best", columns: int = 1) -> None:
    """Name the lines of an axes, on white, so that a line behind a name does not cross it."""
    how = {"frameon": True, "framealpha": 0.9, "edgecolor": "none", "ncols": columns}
    axes.legend(loc=place, fontsize=_LETTERS["size"] - 1.5, borderpad=0.2, **how)


def lengths(axes: Any, bars: Any, text: str) -> None:
    """Write each bar's length beside it, on white; `text` is a format such as "%.0f MiB"."""
    around = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.bar_label(bars, fmt=text, padding=4, bbox=around, fontsize=_LETTERS["size"] - 1)


def save(made: Any, path: Path, suffixes: Sequence[str] = (".png",)) -> Path:
    """Write a figure under each suffix, and return the path of the last one."""
    for axes in made.axes:
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label]
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
        for text in texts:
            text.set_fontsize(_LETTERS["size"])
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        dated = {"metadata": {"Date": None}} if suffix == ".svg" else {"dpi": 150}
        made.savefig(path.with_suffix(suffix), **dated)
    return path.with_suffix(suffixes[-1])
