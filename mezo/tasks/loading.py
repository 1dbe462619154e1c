"""Examples from the hub, from a folder, from the package or from a user's own files.

    load_examples(task, "train")                          the hub, or the package's own data
    load_examples(task, "dev", data_dir="glue/SST-2")     train.tsv, dev.tsv, ... in a folder
    load_examples(task, "train", files="reviews.csv")     JSONL, CSV, TSV or parquet

A mistake in the data is an InputError that names file and row; row 1 is the first line of a file.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .task import Example, Task

SPLITS = {  # split -> names of its file; GLUE's test sets have no labels: dev takes their place
    "train": ("train",),
    "dev": ("dev", "validation", "val"),
    "test": ("test", "dev", "validation", "val"),
}
Row = tuple[int, dict[str, Any]]  # line in the file, column -> value


def load_examples(
    task: Task,
    split: str,
    *,
    data_dir: str | Path | None = None,
    files: str | Path | Sequence[str | Path] | None = None,
) -> list[Example]:
    """All examples of a split ("train", "dev" or "test"), in the order of the source.

    Args:
        data_dir: a folder with a file named after the split and one of the formats above.
        files: the file or files that are the split, whatever their names.

    For "test", dev takes the place of a file that is missing or has no labels.
    """
    if split not in SPLITS:
        raise InputError(f"split must be {', '.join(SPLITS)}, got {split!r}")
    if files is not None:
        paths = [files] if isinstance(files, str | Path) else files
        return [example for path in paths for example in _from_file(task, Path(path))]
    if data_dir is not None:
        return _from_file(task, _find(task, split, Path(data_dir)))
    if task.folder:
        return _from_file(task, _find(task, split, Path(__file__).parent.parent / task.folder))
    if task.hub is None:
        raise InputError(f"task {task.name} has no data of its own: give files or data_dir")
    return _from_hub(task, split)


def _from_hub(task: Task, split: str) -> list[Example]:
    from datasets import load_dataset  # seconds to import

    assert task.hub is not None
    where = f"{task.hub.id} {task.hub.config or ''}".strip()
    try:
        data = load_dataset(task.hub.id, task.hub.config, split=getattr(task.hub, split))
    except OSError as error:  # offline, or no such data set
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot load {where} from the hub ({reason}); give data_dir") from error
    return _examples(task, where, enumerate(data))


def _find(task: Task, split: str, folder: Path) -> Path:
    """The file of a split in a folder."""
    if not folder.is_dir():
        raise InputError(f"data_dir {folder} is not a folder")
    found = [
        folder / (n + s) for n in SPLITS[split] for s in READERS if (folder / (n + s)).exists()
    ]
    if split == "test":  # an unlabelled test set counts only if there is nothing else
        found = [path for path in found if _has_labels(path, task)] or found
    if not found:
        names = " or ".join(SPLITS[split])
        raise InputError(f"{folder} has no file {names} with a suffix of {', '.join(READERS)}")
    return found[0]


def _has_labels(path: Path, task: Task) -> bool:
    _, first = next(iter(_read(path)), (0, {}))
    return task.label_column in first


def _from_file(task: Task, path: Path) -> list[Example]:
    return _examples(task, path.name, _read(path))


def _read(path: Path) -> Iterator[Row]:
    """Rows of a file by its suffix, each with its line."""
    if path.suffix not in READERS:
        raise InputError(f"{path.name} is none of {', '.join(READERS)}")
    if not path.is_file():
        raise InputError(f"file not found: {path}")
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8: {error}") from None


def _examples(task: Task, where: str, rows: Iterable[Row]) -> list[Example]:
    index = {label: i for i, label in enumerate(task.labels)}
    examples = []
    for line, row in rows:
        origin = f"{where} row {line}"
        for column in (*task.columns, task.label_column):
            if column not in row:
                raise InputError(f"{where} has no column {column!r}, it has {', '.join(row)}")
            if row[column] is None:
                raise InputError(f"{origin}: column {column!r} is null")
        label = _label(row[task.label_column])
        if label not in index:
            raise InputError(f"{origin}: label {label!r} is none of {', '.join(task.labels)}")
        fields = {column: str(row[column]) for column in task.columns}
        examples.append(Example(fields, index[label], origin))
    if not examples:
        raise InputError(f"{where} is empty")
    return examples


def _label(value: Any) -> str:
    """As the file spells it: JSON's true is "true"."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _read_tsv(path: Path) -> Iterator[Row]:
    """Fields split at tabs, no quoting: GLUE's files hold single quotation marks."""
    with path.open(encoding="utf-8-sig") as file:
        header = next(file, "").rstrip("\n").split("\t")
        for line, text in enumerate(file, start=2):
            if text.strip():
                yield line, _row(path, line, header, text.rstrip("\n").split("\t"))


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            for values in reader:
                if values:
                    yield reader.line_num, _row(path, reader.line_num, header, values)
        except csv.Error as error:
            raise InputError(f"{path.name} row {reader.line_num}: {error}") from None


def _row(path: Path, line: int, header: list[str], values: list[str]) -> dict[str, str]:
    if len(values) != len(header):
        raise InputError(
            f"{path.name} row {line} has {len(values)} columns, its header has {len(header)}"
        )
    return dict(zip(header, values, strict=True))


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(f"{path.name} row {line} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path.name} row {line} is no JSON object: write one a line")
            yield line, row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path.name} is not parquet: {error}") from None


READERS = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
}
