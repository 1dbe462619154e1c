"""`make mutants`: applies each mutant of mutants.tsv to a copy of the sources, and runs its tests.

    python tests/mutants/run.py [words that a mutant's file or line must hold]

A line of mutants.tsv is: file, line of source, mutated line, tests. A mutant is killed if a test
fails, or if the tests take more than LIMIT seconds of the processor; it survives if all pass.
Survivors that survivors.tsv names with a reason are expected. Exit code 1 if another survives, if
less than SHARE are killed, or if a line of the list is no longer in its file.

Each mutant is a forked process that has the heavy libraries loaded already: seconds, not minutes.
"""

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


def mutate(path: Path, line: str, changed: str) -> str | None:
    """Changes the line in the file; the file as it was, or None if it has no such line."""
    before = path.read_text(encoding="utf-8")
    lines = before.splitlines(keepends=True)
    places = [i for i, one in enumerate(lines) if one.strip() == line]
    if not places:
        return None
    one = lines[places[0]]
    lines[places[0]] = one.replace(line, changed)
    path.write_text("".join(lines), encoding="utf-8")
    return before


def main(words: list[str]) -> int:
    for name in HEAVY:
        importlib.import_module(name)
    known = {(file, line, changed): reason for file, line, changed, reason in rows("survivors.tsv")}
    chosen = [row for row in rows("mutants.tsv") if all(word in "\t".join(row) for word in words)]
    killed, expected, bad = 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="mezo-mutants-") as name:
        folder = tree(Path(name))
        passing: set[str] = set()  # tests that a survivor, or the sources as they are, let pass
        for file, line, changed, tests in chosen:
            began = time.perf_counter()
            before = mutate(folder / file, line, changed)
            if before is None:
                word, bad = "STALE", bad + 1
            elif not passes(folder, tests.split()):
                word, killed = "killed", killed + 1
            elif (file, line, changed) in known:
                word, expected = "expected", expected + 1
            else:
                word, bad = "SURVIVED", bad + 1
            passing |= {tests} if word in ("expected", "SURVIVED") else set()
            if before is not None:
                (folder / file).write_text(before, encoding="utf-8")
            print(f"{word:9} {time.perf_counter() - began:5.1f} s  {file}  {changed}", flush=True)
        for tests in dict.fromkeys(row[3] for row in chosen):
            if tests not in passing and not passes(folder, tests.split()):
                print(f"FAILS WITHOUT A MUTANT  {tests}", flush=True)
                bad += 1
    share = killed / max(len(chosen), 1)
    print(f"{killed} of {len(chosen)} killed ({100 * share:.1f} %), {expected} expected to survive")
    return int(bad > 0 or share < SHARE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
