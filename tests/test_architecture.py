"""The floors of the house: docs/architecture.md says who may import whom, and the code obeys.

A table that nothing checks is out of date within a week; an import that runs upwards becomes a
circle, and a circle becomes an import inside a function.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FLOORS = {
    unit: int(floor)
    for floor, units in re.findall(r"^floor (\d+) +(.+)$", PAGE, re.MULTILINE)
    for unit in units.split()
}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in (ROOT / "mezo").rglob("*.py")}


@cache
def imported(module: str) -> tuple[str, ...]:
    """The modules that a module imports, anywhere in it but for type checkers alone."""
    return tuple(
        found for node in live(ast.parse(MODULES[module].read_text())) for found in of(node)
    )


def live(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from live(node)


def of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if whole in MODULES else node.module


def unit_of(module: str) -> str:
    """The folder or file under mezo/; of the package itself, nothing."""
    return module.split(".")[1] if "." in module else ""


def reached(module: str) -> set[str]:
    """Everything that importing a module brings, of this package and of others."""
    found, left = set(), [module]
    while left:
        for one in imported(left.pop()):
            if one not in found:
                found.add(one)
                left += [one] if one in MODULES else []
    return found


def test_every_file_and_folder_has_one_floor():
    """A new one has to be put somewhere; one that is gone has to leave the table."""
    units = re.findall(r"^floor \d+ +(.+)$", PAGE, re.MULTILINE)
    names = " ".join(units).split()
    assert len(names) == len(set(names))
    assert set(names) == {unit_of(module) for module in MODULES} - {""}


def test_imports_go_down():
    """Imports inside of functions too: these are where circles hide."""
    upwards = [
        f"{module} imports {other}"
        for module in MODULES.keys() - {"mezo"}
        for other in imported(module)
        if other.startswith("mezo.")
        and unit_of(other) != unit_of(module)
        and FLOORS[unit_of(other)] >= FLOORS[unit_of(module)]
    ]
    assert upwards == []


def test_no_module_reaches_itself():
    """Within a folder there is no floor to look at: circles are looked for module by module."""
    circles = [module for module in MODULES if module in reached(module)]
    assert circles == []


def test_the_tree_is_the_tree():
    """Every file under mezo/ is in the page's tree, and nothing else is."""
    tree = PAGE[PAGE.index("```text\nmezo/\n") :]
    tree = tree[: tree.index("\n```\n")]
    folder, listed = "", set()
    for line in tree.splitlines()[2:]:
        if heading := re.match(r"  (\w+)/ ", line):
            folder = heading[1] + "/"
        elif file := re.match(r"( +)(\w+\.py) ", line):
            listed.add((folder if len(file[1]) > 2 else "") + file[2])
    files = {str(file.relative_to(ROOT / "mezo")) for file in MODULES.values()}
    markers = {
        one for one in files if one.endswith("/__init__.py")
    }  # one says what its folder does
    assert listed - markers == files - markers


def test_the_package_has_few_files_at_its_root():
    """Algorithm 1 and what it stands on; whatever is of one kind of run has a folder."""
    assert len(list((ROOT / "mezo").glob("*.py"))) <= 18


def test_no_file_of_code_is_longer_than_400_lines():
    """What is longer is two things, which a reader has to tell apart."""
    folders = ("mezo", "tests", "experiments", "benchmarks", "examples", "pretraining")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    lengths = {str(file.relative_to(ROOT)): file.read_text().count("\n") for file in files}
    assert {file: length for file, length in lengths.items() if length > 400} == {}
