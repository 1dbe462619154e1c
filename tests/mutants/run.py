"""`make mutants`: applies each mutant of mutants.tsv to a copy of the sources, and runs its tests.

    python tests/mutants/run.py [--results FILE] [words that a mutant's file or line must hold]

A line of mutants.tsv is: file, line of source, mutated line, tests; comments do not count. A mutant
is killed if a test fails, or if the tests take more than LIMIT seconds of the processor; it
survives if all pass. Survivors that survivors.tsv names with a reason are expected. Exit
code 1 if another survives, if less than SHARE are killed, or if a line of the list is no longer in
its file.

With --results the run can be stopped and taken up again, or shared by several processes: what FILE
says was killed, or was expected to survive, is not run once more.

Each mutant is a forked process that has the heavy libraries loaded already: seconds, not minutes.
"""

import argparse
import importlib
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
Row = list[str]  # file, line, mutated line, tests
LIMIT, SHARE = 120, 0.95  # seconds of the processor, which do not depend on who else works
HEAVY = ("numpy", "torch", "transformers", "peft", "tokenizers", "safetensors.torch", "pytest")
HEAVY += ("transformers.trainer", "transformers.models.opt", "sklearn.linear_model", "numba")


def rows(name: str) -> list[list[str]]:
    """The lines of a table, without comments."""
    text = (HERE / name).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]


def tree(folder: Path) -> Path:
    """A copy of what tests need."""
    for name in ("mezo", "tests", "experiments", "docs", "examples", "benchmarks"):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def passes(folder: Path, tests: list[str]) -> bool:
    """Whether the tests pass in the copy, within the limit; in a process of its own."""
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]) != 0))
    return os.waitpid(child, 0)[1] == 0


def bare(line: str) -> str:
    """A line of code without the space and the comment around it."""
    return line.split("  #")[0].strip()


def mutate(path: Path, line: str, changed: str) -> str | None:
    """Changes the line in the file; the file as it was, or None if it has no such line."""
    before = path.read_text(encoding="utf-8")
    lines = before.splitlines(keepends=True)
    places = [i for i, one in enumerate(lines) if bare(one) == line]
    if not places:
        return None
    one = lines[places[0]]
    lines[places[0]] = one.replace(line, changed)
    path.write_text("".join(lines), encoding="utf-8")
    return before


def verdict(folder: Path, row: Row, expected: bool) -> str:
    """Runs one mutant in the copy, and leaves the copy as it was."""
    file, line, changed, tests = row
    before = mutate(folder / file, line, changed)
    if before is None:
        return "STALE"
    try:
        survives = passes(folder, tests.split())
    finally:
        (folder / file).write_text(before, encoding="utf-8")
    return ("expected" if expected else "SURVIVED") if survives else "killed"


def known_results(results: Path | None) -> dict[tuple[str, ...], str]:
    """What an earlier run found, without what has to be run again."""
    if results is None or not results.exists():
        return {}
    lines = [line.split("\t") for line in results.read_text(encoding="utf-8").splitlines()]
    return {tuple(row): word for word, *row in lines if word in ("killed", "expected")}


def failing(folder: Path, tests: set[str]) -> list[str]:
    """The tests that fail without a mutant, and so would kill everything."""
    return [one for one in sorted(tests) if not passes(folder, one.split())]


def report(found: list[tuple[str, Row]]) -> int:
    """Prints the figures of each file and of all; the exit code."""
    files = dict.fromkeys(row[0] for _, row in found)
    for file in files:
        words = [word for word, row in found if row[0] == file]
        print(f"{words.count('killed'):4} of {len(words):3} killed  {file}")
    words = [word for word, _ in found]
    killed, share = words.count("killed"), words.count("killed") / max(len(words), 1)
    print(
        f"{killed} of {len(words)} killed ({100 * share:.1f} %), "
        f"{words.count('expected')} expected to survive"
    )
    return int("SURVIVED" in words or "STALE" in words or share < SHARE)


def main(words: list[str], results: Path | None = None) -> int:
    for name in HEAVY:
        importlib.import_module(name)
    expected = {tuple(row[:3]) for row in rows("survivors.tsv")}
    chosen = [row for row in rows("mutants.tsv") if all(word in "\t".join(row) for word in words)]
    found: list[tuple[str, Row]] = []
    with tempfile.TemporaryDirectory(prefix="mezo-mutants-") as name:
        folder = tree(Path(name))
        for row in chosen:
            began, known = time.perf_counter(), known_results(results)  # others may write it, too
            word = known.get(tuple(row)) or verdict(folder, row, tuple(row[:3]) in expected)
            found.append((word, row))
            print(f"{word:9} {time.perf_counter() - began:5.1f} s  {row[0]}  {row[2]}", flush=True)
            if results is not None and tuple(row) not in known:
                with results.open("a", encoding="utf-8") as file:
                    file.write("\t".join((word, *row)) + "\n")
        passing = {row[3] for word, row in found if word in ("expected", "SURVIVED")}
        broken = failing(folder, {row[3] for row in chosen} - passing)
    for tests in broken:
        print(f"FAILS WITHOUT A MUTANT  {tests}")
    return report(found) or int(bool(broken))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path)
    parser.add_argument("words", nargs="*")
    given = parser.parse_args()
    sys.exit(main(given.words, given.results))
