"""The tables of docs/ from the result files: python -m experiments.tables > tables.md

--plots draws docs/volunteers.png instead.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mezo.compare import style

RESULTS = Path(__file__).parent / "results"
DIVERGED = 1.0  # a loss above; before tuning it is 0.99


def spread(values: list[float]) -> str:
    text = f"{100 * mean(values):.1f}"
    return text + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "") + f" ({len(values)})"


def demo() -> None:
    result = json.loads((RESULTS / "demo.json").read_text())
    print("| | test accuracy, % | share of Adam's gain |\n|---|---|---|")
    for name, row in result["summary"].items():
        share = f"{100 * row['share_of_adams_gain']:.0f} %"
        print(f"| {name} | {100 * row['mean']:.1f} ± {100 * row['std']:.1f} | {share} |")


def sst2(model: str) -> None:
    cells = json.loads((RESULTS / f"sst2-{model}.json").read_text())["cells"]
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, found in cells.items():
        match = re.fullmatch(r"(\S+) k=(\S+) seed=\d+", key)
        method, size = match.groups() if match else (key, "any")
        table[method][size].append(found["accuracy"])
    sizes = ("16", "512", "1000")
    print(f"| {model} | k = 16 | k = 512 | 1,000 examples |\n|---|---|---|---|")
    for method, row in table.items():
        shown = [spread(row[s] or row["any"]) if row[s] or row["any"] else "-" for s in sizes]
        print(f"| {method} | {' | '.join(shown)} |")


# arXiv:2305.17333, Appendices A and B: RoBERTa-large, SST-2, k = 16, 10,000 forward passes. Its
# n-SPSA draws a batch for each direction (Algorithm 2), so n on one batch has no number beside it.
PAPER_ABLATION = {
    "mezo": 89.6,  # Table 5, "Prompt"; the same run is the baseline of Tables 6 and 8 to 10
    "no prompt": 51.9,  # Table 5, "No Prompt"
    "n = 4, fresh batches": 89.5,  # Table 6, n = 4, "Constant"
    "n = 16, fresh batches": 90.4,  # Table 6, n = 16, "Constant"
    "variance modified, weights": 89.2,  # Table 9, d not recomputed
    "variance modified, gradients": 87.0,  # Table 8, d estimated by forward passes, not recomputed
    "expectation modified, gradients": 88.0,  # Table 10; the paper has none by norms of weights
}


def ablation(path: Path) -> None:
    """Methods at equal numbers of forward passes: loss and accuracy on the test examples."""
    found = json.loads(path.read_text())
    print(f"{path.stem}, {found['passes']} forward passes of 16 examples")
    print(
        "| | steps | lr | test loss | test accuracy, % | the paper's |\n|---|---|---|---|---|---|"
    )
    for name, row in found["rows"].items():
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f} ± {row['loss_std']:.3f}"
        accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_std']:.1f}"
        setting = f"{row['steps'] or '-'} | {row['lr']:.1e}"
        theirs = PAPER_ABLATION.get(name, "")
        print(f"| {name} | {setting} | {loss} | {accuracy} ({row['seeds']}) | {theirs} |")


PAPER = {  # arXiv:2305.17333; columns as CLASSIFICATION; None: the paper has no such number
    "RoBERTa-large (355 M), k = 16": {  # Table 18, upper half; rows as the methods' names here
        "zero-shot": (79.0, 35.5, 50.2, 51.4, None, None),  # "Zero-shot", of both halves
        "lp": (76.0, 40.3, 66.0, 59.4, None, None),  # "LP"
        "ft": (91.9, 47.5, 77.5, 66.4, None, None),  # "FT"
        "lora": (91.4, 46.7, 74.9, 66.1, None, None),  # "FT (LoRA)"
        "prefix": (91.9, 47.7, 77.2, 66.6, None, None),  # "FT (prefix)"
        "mezo": (90.5, 45.5, 68.5, 64.0, None, None),  # "MeZO"
        "mezo-lora": (91.4, 43.0, 69.7, 64.9, None, None),  # "MeZO (LoRA)"
        "mezo-prefix": (90.8, 45.8, 71.6, 65.4, None, None),  # "MeZO (prefix)"
    },
    "RoBERTa-large (355 M), k = 512": {  # Table 18, lower half, in the same rows
        "zero-shot": (79.0, 35.5, 50.2, 51.4, None, None),
        "lp": (91.3, 51.7, 80.9, 73.1, None, None),
        "ft": (93.9, 55.9, 88.7, 82.7, None, None),
        "lora": (94.2, 55.3, 88.3, 83.2, None, None),
        "prefix": (93.7, 54.6, 88.3, 82.5, None, None),
        "mezo": (93.3, 53.2, 83.0, 78.6, None, None),
        "mezo-lora": (93.4, 52.4, 84.0, 77.6, None, None),
        "mezo-prefix": (93.3, 53.6, 84.8, 77.2, None, None),
    },
    "OPT-13B, 1,000 examples": {  # Table 1, whose rows are "ICL", "FT (12x memory)", ...
        "zero-shot": (58.8, None, None, 59.6, 59.0, 46.9),
        "icl": (87.0, None, None, 62.1, 66.9, 53.1),
        "lp": (93.4, None, None, 68.6, 59.3, 63.5),
        "mezo": (91.4, None, None, 66.1, 67.6, 60.1),
        "mezo-lora": (89.6, None, None, 67.9, 73.8, 61.5),
        "mezo-prefix": (90.7, None, None, 70.8, 73.1, 63.7),
        "ft": (92.0, None, None, 70.8, 77.1, 71.1),
    },
}
CLASSIFICATION = {"sst2": "SST-2", "sst5": "SST-5", "snli": "SNLI", "rte": "RTE"}
CLASSIFICATION |= {"boolq": "BoolQ", "multirc": "MultiRC"}


def classification() -> None:
    """Ours, each number linked to its first cell, and the paper's, of far larger models, below."""
    head = f"| | {' | '.join(CLASSIFICATION.values())} |\n|---|{'---|' * len(CLASSIFICATION)}"
    for path in sorted(RESULTS.glob("classification-*.json")):
        found = json.loads(path.read_text())
        for k in (16, 512):
            tasks = [found.get(f"{task} k={k}", {}) for task in CLASSIFICATION]
            rows = [{row["method"]: row for row in one.get("rows", ())} for one in tasks]
            print(f"\n{path.stem.removeprefix('classification-')}, k = {k}\n\n{head}")
            for method in dict.fromkeys(name for row in rows for name in row):
                shown = [_linked(row[method]) if method in row else "-" for row in rows]
                print(f"| {method} | {' | '.join(shown)} |")
    print("\nThe paper's, of models 100 to 4,000 times larger: not to be compared by level.")
    for name, methods in PAPER.items():
        print(f"\n{name}\n\n{head}")
        for method, values in methods.items():
            shown = ["-" if value is None else str(value) for value in values]
            print(f"| {method} | {' | '.join(shown)} |")


def _linked(row: dict) -> str:
    return f"[{spread(row['values'])}](../{row['folders'][0]})"


LANGUAGE = ("zero-shot", "calibrated", "icl", "lp", "mezo", "mezo-biases_and_norms", "ft")


def language_model() -> None:
    """Test metrics of experiments/language_model.py, of each seed's best on dev, with links."""
    folder = RESULTS / "language-model"
    tasks = sorted({path.relative_to(folder).parts[0] for path in folder.rglob("result.json")})
    print(f"| | {' | '.join(tasks)} |\n|---|{'---|' * len(tasks)}")
    for method in LANGUAGE:
        print(f"| {method} | {' | '.join(_best(folder / task / method) for task in tasks)} |")


def _best(folder: Path) -> str:
    """The mean over seeds of a method, linked to its first cell; a dash where none has finished."""
    chosen = []
    for seed in sorted(folder.glob("seed-*"), key=lambda path: int(path.name[5:])):
        cells = [(json.loads(p.read_text()), p.parent) for p in sorted(seed.rglob("result.json"))]
        if cells:
            chosen.append(max(cells, key=lambda cell: cell[0]["dev"]))
    if not chosen:
        return "-"
    values = [result["test"][result["metric"]] for result, _ in chosen]
    return f"[{spread(values)}](../{chosen[0][1].relative_to(RESULTS.parents[1])})"


def newcomer() -> None:
    """The run without a rate, and the tuned one: the rate that the dev examples choose, by seed."""
    cells = json.loads((RESULTS / "newcomer.json").read_text())["cells"]
    print("| | zero-shot | default rate | tuned rate | difference |\n|---|---|---|---|---|")
    for run in dict.fromkeys(key.partition(" rate=")[0] for key in cells):
        own = {key.partition(" rate=")[2]: c for key, c in cells.items() if key.startswith(run)}
        default = own.pop("default")
        best = max(own.values(), key=lambda cell: cell["dev"], default=None)
        if best is None:
            continue
        zero, ours, tuned = (
            100 * result["accuracy"]
            for result in (default["zero_shot"], default["test"], best["test"])
        )
        rates = [f"{cell['learning_rate']:.2g}" for cell in (default, best)]
        shown = [f"{zero:.1f}", f"{ours:.1f} ({rates[0]})", f"{tuned:.1f} ({rates[1]})"]
        print(f"| {run} | {' | '.join(shown)} | {ours - tuned:+.1f} |")


def volunteers() -> dict[str, dict[str, Any]]:
    """By setting, over its seeds; without runs that diverged, whose number is `lost`."""
    cells = json.loads((RESULTS / "volunteers.json").read_text())["cells"]
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(key.rpartition(", ")[0] for key in cells if "setting" in cells[key]):
        own = [cell for key, cell in cells.items() if key.rpartition(", ")[0] == name]
        row = own[0]["setting"] | {"seeds": len(own)}
        kept = [cell for cell in own if cell["loss"] is not None and cell["loss"] < DIVERGED]
        row |= {key: [cell[key] for cell in kept] for key in ("loss", "accuracy")}
        row["lost"] = len(own) - len(kept)
        rows[name] = row
    return rows


def late_and_lying() -> None:
    print("| | test loss | test accuracy, % | diverged |\n|---|---|---|---|")
    for name, row in volunteers().items():
        losses = row["loss"]
        told = f"{mean(losses):.3f}" if losses else "-"
        told += f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
        right = spread(row["accuracy"]) if losses else "-"
        print(f"| {name} | {told} | {right} | {row['lost'] or ''} |")


def plot_volunteers(path: Path) -> None:
    """Test loss against lateness; and by lie and defence. A point a seed, lines through means."""
    figure = style.figure(10)
    upper, lower = style.panels(figure, rows=2, height_ratios=(2, 3))
    plain = {"random": False, "dropped": 0.0}
    rows = [row for row in volunteers().values() if row.items() >= plain.items()]
    _late(upper, [row for row in rows if not row["lie"] and not row["defence"]])
    known = {"own_z": False, "late": 0, "slower": 1}
    _lies(lower, [r for r in rows if r.items() >= known.items() and r["share"] in (0, 0.2)])
    style.save(figure, path)


def _late(axes: Any, rows: list[dict[str, Any]]) -> None:
    colours = {(False, 1): "#0072B2", (False, 3): "#56B4E9"}
    colours |= {(True, 1): "#D55E00", (True, 3): "#E69F00"}
    for (own_z, slower), colour in colours.items():
        own = [r for r in rows if (r["own_z"], r["slower"]) == (own_z, slower)]
        at, mark = [max(r["late"], 0.5) for r in own], {"color": colour}
        mark["marker"] = "^" if own_z else "o"
        label = "8 directions" if own_z else "1 direction"
        label += ", rate / 3" if slower > 1 else ""
        axes.plot(at, [mean(r["loss"]) for r in own], markersize=0, label=label, **mark)
        for x, row in zip(at, own, strict=True):
            axes.plot([x] * len(row["loss"]), row["loss"], linestyle="none", **mark)
    ticks = [0.5, 1, 2, 4, 8, 16, 32, 64]
    axes.set(xscale="log", xlabel="steps by which numbers are late", ylabel="test loss")
    axes.set_xticks(ticks, [f"{x:g}" if x >= 1 else "0" for x in ticks])
    axes.minorticks_off()
    style.legend(axes, "center left")


def _lies(axes: Any, rows: list[dict[str, Any]]) -> None:
    names = {"": "no defence", "clip 0.5": "their sum bounded (clip_quantile)", "median": "median"}
    names |= {"each 0.5": "each bounded at the median", "each 0.9": "each bounded at 90 %"}
    names |= {"middle": "mean of the middle half", "fixed 10": "their sum bounded by 10 (clip)"}
    lies = {"": "#000000", "flipped": "#009E73", "noise": "#E69F00", "huge": "#D55E00"}
    rows, told = sorted(rows, key=lambda r: list(lies).index(r["lie"])), []
    for at, row in enumerate(rows):
        defence = names[row["defence"]] if row["defence"] or not row["checked"] else "5 % checked"
        defence += ", 5 % checked" if row["defence"] and row["checked"] else ""
        told.append(f"{row['lie'] or 'all honest'}: {defence}")
        axes.plot(row["loss"], [at] * len(row["loss"]), "o", color=lies[row["lie"]])
        if row["lost"]:
            axes.plot([0.9], [at], "x", color=lies[row["lie"]])
    axes.set_yticks(range(len(rows)), told)
    axes.set_xlim(0.6, 0.92)
    axes.invert_yaxis()
    axes.set(title="one in five lies", xlabel="test loss (x: diverged)")


if __name__ == "__main__":
    if "--plots" in sys.argv:
        plot_volunteers(RESULTS.parents[1] / "docs" / "volunteers.png")
        sys.exit()
    demo()
    for path in sorted(RESULTS.glob("sst2-*.json")):
        print()
        sst2(path.stem.removeprefix("sst2-"))
    for path in sorted(RESULTS.glob("ablation-*.json")):
        print()
        ablation(path)
    classification()
    print()
    language_model()
    print()
    newcomer()
    print()
    late_and_lying()
