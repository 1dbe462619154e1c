"""How the tests themselves are laid out, and the list of faults that they must notice."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


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


def test_every_mutant_is_of_a_line_that_there_is_and_of_tests_that_there_are():
    """A line that was rewritten was found only by the run of all, which takes most of an hour."""
    stale = []
    for row in (ROOT / "tests/mutants/mutants.tsv").read_text(encoding="utf-8").splitlines():
        if row.startswith("#"):
            continue
        file, line, _, tests = row.split("\t")
        source = (ROOT / file).read_text(encoding="utf-8").splitlines()
        if line not in [one.split("  #")[0].strip() for one in source]:
            stale.append((file, line))
        paths = [word.split("::")[0] for word in tests.split() if word.startswith("tests/")]
        stale += [(file, path) for path in paths if not (ROOT / path).exists()]
    assert stale == []
