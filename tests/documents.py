"""The documents of the repository, and what a test reads in them."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = ("*.md", "docs/*.md", "experiments/*.md", "benchmarks/*.md")
DOCUMENTS = sorted(path for place in PLACES for path in ROOT.glob(place))
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


def code_blocks(path: Path) -> list[tuple[str, str]]:
    """The language and the text of each fenced block that is not marked `<!-- not run: why -->`."""
    return [
        (found["language"], found["text"])
        for found in BLOCK.finditer(path.read_text())
        if not (found["mark"] or "").startswith("not run: ")
    ]


def without_blocks(path: Path) -> str:
    return BLOCK.sub("", path.read_text())


def inline_code(path: Path) -> list[str]:
    """What stands between backticks in the text, a line break in it as a space."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(path))]


def told(path: Path) -> Iterator[str]:
    """Every line but those of blocks of output and of indented blocks."""
    for line in without_blocks(path).splitlines():
        if not line.startswith("    "):
            yield line
    for language, text in code_blocks(path):
        if language in ("python", "sh"):
            yield from text.splitlines()


def prose(path: Path) -> Iterator[str]:
    """Lines outside of blocks and tables, with links by their text alone where they are long."""
    for line in without_blocks(path).splitlines():
        if not line.startswith(("|", "    ", "![")):
            yield line
