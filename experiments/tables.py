"""The tables of docs/results.md from the result files: python -m experiments.tables > tables.md"""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

RESULTS = Path(__file__).parent / "results"


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


if __name__ == "__main__":
    demo()
    for path in sorted(RESULTS.glob("sst2-*.json")):
        print()
        sst2(path.stem.removeprefix("sst2-"))
