"""How the tests themselves are laid out."""

import ast
from pathlib import Path

TESTS = Path(__file__).parents[1]


def imported(path):
    """The names of all modules that a file imports, at its top or inside of a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_no_test_file_imports_another():
    """What two of them need has a module with a name of its own, and each runs alone."""
    files = sorted(TESTS.rglob("test_*.py"))
    names = {path.stem for path in files}
    assert len(names) == len(files) > 60  # pytest imports them by their last names
    for path in TESTS.rglob("*.py"):
        others = {name.split(".")[-1] for name in imported(path)} & names
        assert not others, f"{path.relative_to(TESTS)} imports {others}"
