"""What the documents name exists: files, headings, names of the code, options; and they are short.

A document that names what is gone is worse than none. `docs/paper.md` named a class and a file for
weeks after both had gone, and examples of commands had options that no parser knew.
"""

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, code_blocks, inline_code, prose, told

SUFFIXES = ("py", "md", "json", "png", "tsv", "sh", "toml", "mezo", "yaml")
PATH = re.compile(
    r"(?<![\w/.-])(?:mezo|tests|docs|experiments|benchmarks|examples|pretraining)"
    rf"/[\w./=-]+\.(?:{'|'.join(SUFFIXES)})\b"
)
DOTTED = re.compile(r"(?<![\w./-])([a-z_]+(?:\.\w+)+)")
OPTION = re.compile(r"(?<!\S)--(\w+)")
VARIABLES = {"optimizer": "MeZO", "elastic": "distributed.elastic"}  # what documents call these
# Names of other packages that no code of ours has to use, and what we say we do not have.
FOREIGN = {"dp_replicate_size", "epsilon", "num_generations", "icl_sfc"}
FOREIGN |= {"no_deps", "multi_gpu", "cpu", "num_processes", "max_restarts", "nproc_per_node"}
# Methods of peft that its release 0.19, the oldest that we support, does not have.
NEWER = {"beft", "deft", "frod", "glora", "hira", "supertuning", "unilora"}


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def slugs(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids(DOCUMENTS))
def test_every_link_leads_somewhere(path):
    dead = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", path.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            there = path.parent / target if target else path
            if not there.exists() or (anchor and anchor not in slugs(there)):
                dead.append(f"{target}#{anchor}")
    assert dead == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids(DOCUMENTS))
def test_every_file_that_is_named_exists(path):
    named = {match for line in told(path) for match in PATH.findall(line) if "NAME" not in match}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@cache
def units() -> set[str]:
    """Files and folders under mezo/, as names of modules."""
    found = {file.stem for file in (ROOT / "mezo").iterdir() if file.suffix in ("", ".py")}
    return {name for name in found if not name.startswith("_")} | VARIABLES.keys()


def resolved(name: str) -> bool:
    """Whether a dotted name under the package leads to something."""
    head, *rest = name.removeprefix("mezo.").split(".")
    parts = [*VARIABLES.get(head, head).split("."), *rest]
    for end in range(len(parts), -1, -1):
        try:
            found = import_module(".".join(["mezo", *parts[:end]]))
        except ImportError:
            continue
        try:
            for part in parts[end:]:
                found = getattr(found, part)
        except (AttributeError, ImportError):
            continue
        return True
    return False


def dotted(path: Path) -> Iterator[str]:
    """Names of modules of ours and what is in them, in code spans and in blocks of Python."""
    python = [text for language, text in code_blocks(path) if language == "python"]
    for span in [*inline_code(path), *python]:
        for name in DOTTED.findall(span):
            if name.split(".")[-1] not in SUFFIXES and name.split(".")[0] in units():
                yield name


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids(DOCUMENTS))
def test_every_dotted_name_of_the_package_exists(path):
    """`objectives.metrics` had moved, and `from mezo import elastic` failed."""
    assert [name for name in sorted(set(dotted(path))) if not resolved(name)] == []


@cache
def words() -> set[str]:
    """All names that occur in the code, and those of packages, extras and peft's methods."""
    from peft import PeftType

    folders = ("mezo", "examples", "experiments", "benchmarks", "tests", "pretraining")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "pyproject.toml", ROOT / "Makefile"]
    found = {word for file in files for word in re.findall(r"\w+", file.read_text())}
    return found | {kind.value.lower() for kind in PeftType} | FOREIGN | NEWER


@cache
def others_options() -> set[str]:
    """Those of transformers, which ours extend."""
    from dataclasses import fields

    from transformers import TrainingArguments

    return {f.name for f in fields(TrainingArguments)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids(DOCUMENTS))
def test_every_name_in_a_code_span_is_in_the_code(path):
    """`Walk` was a class once."""
    spans = [span for span in inline_code(path) if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", span)]
    names = {re.sub(r"\(.*", "", span).split(".")[-1] for span in spans}
    assert sorted(names - words() - {*SUFFIXES, ""}) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids(DOCUMENTS))
def test_every_option_in_a_code_span_is_in_the_code(path):
    named = {option for span in inline_code(path) for option in OPTION.findall(span)}
    assert sorted(named - words() - others_options()) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids(DOCUMENTS))
def test_no_line_of_prose_is_longer_than_120_characters(path):
    assert [line for line in prose(path) if len(line) > 120] == []


def test_the_readme_is_short_and_names_every_document():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) < 200
    linked = set(re.findall(r"\(docs/(\w+\.md)", readme.read_text()))
    assert linked >= {file.name for file in (ROOT / "docs").glob("*.md")}
