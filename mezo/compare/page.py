"""The report of `mezo compare`: a self-contained HTML file, and the table as text."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mezo.compare.plots import METRICS, label

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --soft: #555; --line: #ddd;
        --block: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --soft: #a8adb3; --line: #3a3f45; --block: #22262a; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--ink); background: var(--paper); overflow-wrap: break-word; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { background: var(--block); padding: .6rem; overflow-x: auto; font-size: 13px; }
figure { margin: 1.5rem 0; } figcaption { color: var(--soft); font-size: 14px; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
summary { cursor: pointer; }
@media (max-width: 40rem) { body { margin: 1rem auto; font-size: 15px; } }
"""
CAPTIONS = {
    "Learning curves": "On the dev examples, by which the weights are chosen. Lines are means over "
    "seeds, bands the range.",
    "Accuracy against memory": "Test examples. Bars are a standard deviation over seeds to either "
    "side. Memory is that of training steps, or of the evaluation where nothing is trained; the "
    "batches differ. On a CPU it is the process's, good to 10 or 20 MiB; 1 stands for 1 or less.",
    "Memory by model size": "Lines are estimates: the steps of OPT models carried out without "
    "numbers (as mezo memory does). Crosses are what the paper (arXiv:2305.17333) measured on "
    "A100s, several where one is too small. Its back-propagation took more than the lines say: "
    "its attention was not fused. Inference lies under MeZO.",
}


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the comparison as rows of text, the head first."""
    metric = METRICS.get(found["metric"], found["metric"])
    head = ["method", metric, "95 % interval", "seeds", "memory above the model", "time"]
    head += ["forward passes", "stored"]
    rows = [head]
    for row in found["rows"]:
        spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
        rows.append(
            [
                label(row["method"]),
                f"{100 * row['mean']:.1f}{spread}",
                _interval(row.get("interval")),
                str(row["n"]),
                size(row["peak_memory"]),
                duration(row["seconds"]),
                f"{row['forward_passes']:,.0f}",
                size(row["stored_bytes"]) if row["stored_bytes"] else "-",
            ]
        )
    return rows


def _interval(found: Sequence[float] | None) -> str:
    """Return an interval in per cent, of which no metric leaves 0 to 100."""
    if not found:
        return "-"
    low, high = (min(100.0, max(0.0, 100 * end)) for end in found)
    return f"{low:.1f} to {high:.1f}"


def size(count: float) -> str:
    """Return bytes as text: 12.3 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """Return seconds as text: 12 s, 3.4 min, 5.6 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def html(found: Mapping[str, Any], plots: Mapping[str, Path]) -> str:
    """Return the report: table, plots as data, and the numbers and commands of each cell."""
    title = f"{found['task']} on {found['model']}"
    return _page(title, [f"<h1>{escape(title)}</h1>", *_section(found, plots)])


def html_of_several(
    founds: Mapping[str, Mapping[str, Any]], plots: Mapping[str, Mapping[str, Path]]
) -> str:
    """Return one report of comparisons at equal budgets, by kind (referee.EQUAL)."""
    first = next(iter(founds.values()))
    title = f"{first['task']} on {first['model']}, at equal budgets"
    parts = [f"<h1>{escape(title)}</h1>"]
    for kind, found in founds.items():
        parts += [f"<h2>{EQUAL[kind]}</h2>", f"<p>{escape(BUDGETS[kind])}</p>"]
        parts += _section(found, plots[kind])
    return _page(title, parts)


EQUAL = {"passes": "Equal forward passes", "time": "Equal time", "memory": "Equal memory"}
EQUAL |= {"steps": "Steps as given"}
BUDGETS = {
    "steps": "Each method makes the steps that it was given.",
    "passes": "Each method takes as many examples through the model as MeZO; a backward pass "
    "counts as two forward passes.",
    "time": "Each method trains for as many seconds as MeZO, by the speed of a few steps of each.",
    "memory": "As at equal forward passes, but Adam checkpoints activations and takes the largest "
    "batch whose estimated memory is at most MeZO's.",
}


def _section(found: Mapping[str, Any], plots: Mapping[str, Path]) -> list[str]:
    parts = [f"<p>{escape(_facts(found))}</p>", _table_html(table(found))]
    parts.append(
        "<p>Means over seeds ± their standard deviation, and the 95 % confidence interval of the "
        "mean (Student's t); of a grid the cell that is best on the dev examples. Forward passes "
        "are of one batch, a backward pass counts as two. Time is of the whole run with its "
        "evaluations. Stored is what has to be kept beside the model.</p>"
    )
    for method, reason in found["refused"].items():
        parts.append(f"<p>{escape(label(method))} was refused: {escape(reason)}</p>")
    for name, path in plots.items():
        parts += [f"<h2>{name}</h2>", _image(name, path)]
    parts += ["<h2>Cells</h2>", *map(_cell, found["cells"])]
    environment = json.dumps(found["environment"], indent=1)
    return [*parts, "<h2>Environment</h2>", f"<pre>{escape(environment)}</pre>"]


def _page(title: str, parts: Sequence[str]) -> str:
    meta = '<meta charset="utf-8">\n'
    meta += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"{meta}<title>{escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _facts(found: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, found["seeds"]))
    grid = "" if found["grid"] == "none" else f"; grid {found['grid']}"
    return f"{found['parameters']:,} weights; metric {found['metric']}; seeds {seeds}{grid}."


def _table_html(rows: Sequence[Sequence[str]]) -> str:
    def line(row: Sequence[str], tag: str) -> str:
        cells = "".join(f"<{tag}>{escape(text)}</{tag}>" for text in row)
        return f"<tr>{cells}</tr>"

    body = "\n".join(line(row, "td") for row in rows[1:])
    head = f"<thead>{line(rows[0], 'th')}</thead>"
    return f'<div class="wide"><table>{head}\n<tbody>{body}</tbody></table></div>'


def _image(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    source = f"data:image/svg+xml;base64,{data}"
    caption = f"<figcaption>{escape(CAPTIONS[name])}</figcaption>"
    return f'<figure><img alt="{escape(name)}" src="{source}">{caption}</figure>'


def _cell(cell: Mapping[str, Any]) -> str:
    name = " ".join([label(cell["method"]) + ",", f"seed {cell['seed']}", cell["name"]]).strip()
    test = ", ".join(f"{key} {value:.4g}" for key, value in cell["test"].items())
    kept = f"step {cell['kept_step']} of {cell['steps']}" if cell["steps"] else "not trained"
    lines = [f"test: {test}; dev {cell['dev']:.4g}; {kept}"]
    if cell["chosen"]:
        lines[0] += "; in the table"
    commands = f"# again\n{cell['command']}"
    if cell["replay"]:
        commands += f"\n# the tuned model, from the base model and the log\n{cell['replay']}"
    body = f"<p>{escape(lines[0])}</p><pre>{escape(commands)}</pre>"
    return f"<details><summary>{escape(name)}</summary>{body}</details>"
