"""Proposes mutants: `python tests/mutants/make.py > proposed.tsv`; the list that runs is edited.

Each is one line of a source file with one operator or number changed: < for <=, + for -, * for /,
and for or, True for False, min for max, a number for another. A mutant is named by its file and by
the text of its line, so that code that moves within a file takes its mutants along.
"""

import ast
import random
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
EACH = 7  # mutants a file
TARGETS = {  # source -> the tests that must notice, the quickest first
    "mezo/estimators.py": "tests/test_estimators.py",
    "mezo/rules.py": "tests/test_rules.py",
    "mezo/forms/updates.py": "tests/forms/test_updates.py tests/test_rules.py",
    "mezo/layers.py": "tests/forms/test_updates.py tests/test_rules.py",
    "mezo/layer_norms.py": "tests/test_rules.py",
    "mezo/schedules.py": "tests/test_rules.py tests/test_estimators.py",
    "mezo/mezo.py": "tests/test_mezo.py tests/test_optimizer.py",
    "mezo/objectives/metric_losses.py": "tests/objectives/test_metric_objectives.py",
    "mezo/objectives/masked.py": "tests/objectives/test_objectives.py",
    "mezo/objectives/causal.py": "tests/objectives/test_demonstrations.py "
    "tests/objectives/test_objectives.py "
    "tests/objectives/test_objectives_calibration.py tests/objectives/test_objectives_shared.py",
    "mezo/objectives/packing.py": "tests/objectives/test_objectives_shared.py",
    "mezo/objectives/tokens.py": "tests/objectives/test_tokens.py",
    "mezo/objectives/generation.py": "tests/objectives/test_generation.py",
    "mezo/tasks/metrics.py": "tests/tasks/test_tasks_metrics.py",
    "mezo/tasks/sampling.py": "tests/tasks/test_tasks_sampling.py",
    "mezo/tasks/template.py": "tests/tasks/test_tasks_golden.py",
    "mezo/tasks/formats.py": "tests/tasks/test_tasks_published.py",
    "mezo/compare/paper_grids.py": "tests/compare/test_paper_grids.py",
    "mezo/runs/rates.py": "tests/runs/test_rates.py",
    "mezo/runs/task_trainer.py": "tests/runs/test_dev_metrics.py",
    "mezo/evaluation/evaluate.py": "tests/evaluation/test_evaluate.py",
    "mezo/trajectory/columns.py": "tests/trajectory/test_compact.py",
    "mezo/trajectory/program.py": "tests/trajectory/test_trajectory.py",
    "mezo/trajectory/start_values.py": "tests/trajectory/test_start_values.py",
}
COMPARED = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")}
COMPARED |= {ast.Eq: ("==", "!="), ast.NotEq: ("!=", "==")}
COMPUTED = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
SKIPPED = ("raise ", "InputError", "import ", "lru_cache", "def ", '"""', "assert ", 'f"')


def edits(tree: ast.AST) -> Iterator[tuple[ast.AST, int, int, str, str]]:
    """(node, first and last column to look between, text, replacement) on one line each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
            old, new = COMPARED[type(node.ops[0])]
            yield node, node.left.end_col_offset, node.comparators[0].col_offset, old, new
        elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
            old, new = COMPUTED[type(node.op)]
            yield node, node.left.end_col_offset, node.right.col_offset, old, new
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield node, node.values[0].end_col_offset, node.values[1].col_offset, old, new
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, node.col_offset, node.operand.col_offset, "not ", ""
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            value = node.value
            new = (
                not value if type(value) is bool else value + 1 if type(value) is int else 3 * value
            )
            text = ast.unparse(node)
            yield node, node.col_offset, node.end_col_offset, text, str(new)
        elif isinstance(node, ast.Name) and node.id in NAMES:
            yield node, node.col_offset, node.end_col_offset, node.id, NAMES[node.id]


def mutants(source: str) -> list[tuple[str, str]]:
    """(line, mutated line), without the white space around, of lines that are there once."""
    lines, found = source.splitlines(), []
    stripped = [line.strip() for line in lines]
    for node, start, end, old, new in edits(ast.parse(source)):
        if node.lineno != node.end_lineno:
            continue
        line = lines[node.lineno - 1]
        at = line.encode()[:end].decode().find(old, len(line.encode()[:start].decode()))
        code = line.split("  #")[0]
        if at < 0 or at >= len(code) or any(word in line for word in SKIPPED):
            continue
        changed = line[:at] + new + line[at + len(old) :]
        if stripped.count(line.strip()) == 1 and changed != line:
            found.append((line.strip(), changed.strip()))
    return sorted(set(found))


def main() -> None:
    for name, tests in TARGETS.items():
        known = mutants((ROOT / name).read_text())
        for line, changed in random.Random(name).sample(known, min(EACH, len(known))):
            print(name, line, changed, tests, sep="\t")


if __name__ == "__main__":
    sys.exit(main())
