"""Rows of a file by its suffix: TSV, CSV, JSONL, parquet, and compressed JSONL.

A reader yields (place, row): "row 3", and a dictionary from column to value. Row 1 is the first
line of a file. Anything that is not in the format raises an InputError that names file and row.
"""

import csv
import gzip
import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from mezo.errors import InputError
from mezo.foreign import check_file, check_name, foreign, parse_json
from mezo.tasks.task import Reader, Row

MAX_LINE = 2**26  # characters of a line: a few bytes of gzip can stand for gigabytes


def read(path: Path, readers: Mapping[str, Reader]) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, each with its place in it.

    Raise InputError, naming file and row, for a suffix without a reader, for anything but a regular
    file, and for anything that is not in the format.
    """
    if path.suffix not in readers:
        raise InputError(f"{path.name} is not one of {', '.join(readers)}")
    check_name(path, "file")
    if not path.exists():
        raise InputError(f"file not found: {path}")
    check_file(path)
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8: {error}") from None
    except OSError as error:
        raise InputError(f"{path.name}: {error.strerror or error}") from None


def lines_of(path: Path, file: io.TextIOBase) -> Iterator[str]:
    """Yield the lines of a file. Raise InputError for one that is absurdly long."""
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise InputError(f"{path.name} has a line of more than {MAX_LINE:,} characters")
        yield line


def read_tsv(path: Path) -> Iterator[tuple[str, Row]]:
    """Read fields split at tabs, without quoting: GLUE's files hold single quotation marks."""
    with path.open(encoding="utf-8-sig") as file:
        lines = lines_of(path, file)
        header = next(lines, "").rstrip("\n").split("\t")
        for line, text in enumerate(lines, start=2):
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
        yield from _objects(path, lines_of(path, file))


def read_array(path: Path) -> Iterator[tuple[str, Row]]:
    """Read a .json file: a list of objects, or one object per line."""
    with path.open(encoding="utf-8-sig") as file:
        first = file.read(2**16).lstrip()[:1]
    if first != "[":
        yield from read_jsonl(path)
        return
    rows = read_json(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path.name} row {number} is not a JSON object")
        yield f"row {number}", row


def read_gzip(path: Path) -> Iterator[tuple[str, Row]]:
    """Read compressed JSONL."""
    with gzip.open(path, "rt", encoding="utf-8-sig") as file:
        lines = _objects(path, lines_of(path, file))
        while True:
            with foreign(f"{path.name} is not gzip"):
                row = next(lines, None)
            if row is None:
                return
            yield row


def _objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Row]]:
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        row = parse_json(text, f"{path.name} row {line}")
        if not isinstance(row, dict):
            raise InputError(f"{path.name} row {line} is not a JSON object: write one per line")
        yield f"row {line}", row


def read_json(path: Path) -> Any:
    """Return the one JSON value that is the whole file."""
    return parse_json(path.read_text(encoding="utf-8-sig"), path.name)


def read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    from pyarrow import parquet

    with foreign(f"{path.name} is not parquet"):
        rows = parquet.read_table(path, partitioning=None).to_pylist()
    yield from ((f"row {line}", row) for line, row in enumerate(rows, start=1))


READERS: dict[str, Reader] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".json": read_array,
    ".parquet": read_parquet,
    ".gz": read_gzip,
}
