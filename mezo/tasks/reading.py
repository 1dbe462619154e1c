"""Rows of a file by its suffix: TSV, CSV, JSONL, parquet, and compressed JSONL.

A reader yields (place, row): "row 3", and a dictionary from column to value. Row 1 is the first
line of a file. What is not in the format is an InputError that names file and row.
"""

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from mezo.errors import InputError
from mezo.tasks.task import Reader, Row


def read(path: Path, readers: Mapping[str, Reader]) -> Iterator[tuple[str, Row]]:
    """Rows of a file, each with its place in it."""
    if path.suffix not in readers:
        raise InputError(f"{path.name} is none of {', '.join(readers)}")
    if not path.is_file():
        raise InputError(f"file not found: {path}")
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8: {error}") from None


def read_tsv(path: Path) -> Iterator[tuple[str, Row]]:
    """Fields split at tabs, no quoting: GLUE's files hold single quotation marks."""
    with path.open(encoding="utf-8-sig") as file:
        header = next(file, "").rstrip("\n").split("\t")
        for line, text in enumerate(file, start=2):
            if text.strip():
                yield f"row {line}", _row(path, line, header, text.rstrip("\n").split("\t"))


def read_csv(path: Path, columns: list[str] | None = None) -> Iterator[tuple[str, Row]]:
    """Columns are those of the header; with `columns` there may be none, and a header that is
    the columns' names in any order is understood."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            rows: Iterable[list[str]] = reader
            if columns is not None and not set(columns) <= set(header):
                rows, header = chain([header], reader), columns  # chain: line_num is of this row
            for values in rows:
                if values:
                    line = reader.line_num
                    yield f"row {line}", _row(path, line, header, values)
        except csv.Error as error:
            raise InputError(f"{path.name} row {reader.line_num}: {error}") from None


def _row(path: Path, line: int, header: list[str], values: list[str]) -> Row:
    if len(values) != len(header):
        raise InputError(
            f"{path.name} row {line} has {len(values)} columns, its header has {len(header)}"
        )
    return dict(zip(header, values, strict=True))


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        yield from _objects(path, file)


def read_gzip(path: Path) -> Iterator[tuple[str, Row]]:
    """JSONL, compressed."""
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") as file:
            yield from _objects(path, file)
    except (gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path.name} is not gzip: {error}") from None


def _objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Row]]:
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path.name} row {line} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path.name} row {line} is no JSON object: write one a line")
        yield f"row {line}", row


def read_json(path: Path) -> Any:
    """The one JSON value that is the whole file."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise InputError(f"{path.name} is not JSON: {error}") from None


def read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path.name} is not parquet: {error}") from None
    yield from ((f"row {line}", row) for line, row in enumerate(rows, start=1))


READERS: dict[str, Reader] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".parquet": read_parquet,
    ".gz": read_gzip,
}
