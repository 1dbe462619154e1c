"""Examples from the hub, from a folder, from the package or from a user's own files.

    load_examples(task, "train")                          the hub, or the package's own data
    load_examples(task, "dev", data_dir="glue/SST-2")     train.tsv, dev.tsv, ... in a folder
    load_examples(task, "train", files="reviews.csv")     JSONL, CSV, TSV or parquet

A folder may hold a data set as it is published; the task knows the names and formats of its files.
A mistake in the data raises an InputError that names file and row; row 1 is a file's first line.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mezo.errors import InputError
from mezo.foreign import check_dataset_reach, check_name, reason_of
from mezo.tasks.reading import READERS, read
from mezo.tasks.task import Example, Hub, Row, Task

SPLITS = {  # split -> names of its file; GLUE's test sets have no labels: dev takes their place
    "train": ("train",),
    "dev": ("dev", "validation", "val"),
    "test": ("test", "dev", "validation", "val"),
}
FIRST = 100  # rows that show whether a test set has labels


def load_examples(
    task: Task,
    split: str,
    *,
    data_dir: str | Path | None = None,
    files: str | Path | Sequence[str | Path] | None = None,
) -> list[Example]:
    """Return all examples of a split ("train", "dev" or "test"), in the order of the source.

    Args:
        data_dir: a folder that holds the data set as it is published, or a file named after the
            split in one of the formats above.
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
    if task.paths:
        path = task.paths.get(split) or (task.paths.get("dev") if split == "test" else None)
        if path is None:
            raise InputError(f"task {task.name} names no file for {split}")
        return _from_file(task, Path(path))
    if task.folder:
        return _from_file(task, _find(task, split, Path(__file__).parent.parent / task.folder))
    if task.hub is None:
        raise InputError(f"task {task.name} has no data of its own: give files or data_dir")
    return _from_hub(task, task.hub, split)


def has_own_dev(task: Task, data_dir: str | Path) -> bool:
    """Return whether a folder has a dev set beside a labelled test set, as the few-shot folders do.

    GLUE's and SuperGLUE's folders do not: their dev set takes the place of the test set.
    """
    dev = _files(task, "dev", Path(data_dir))
    return bool(dev) and _find(task, "test", Path(data_dir)) not in dev


def _from_hub(task: Task, hub: Hub, split: str) -> list[Example]:
    where, part = f"{hub.id} {hub.config or ''}".strip(), getattr(hub, split)
    if not part:
        raise InputError(f"{where} has no {split} split: take a part of train")
    from datasets import load_dataset  # seconds to import

    options = {} if hub.revision is None else {"revision": hub.revision}
    try:
        check_dataset_reach(hub.id)
        data = load_dataset(hub.id, hub.config, split=part, **options)
    except Exception as error:  # offline, no such data set or part, or files that are damaged
        reason = reason_of(error)
        raise InputError(f"cannot load {where} from the hub ({reason}); give data_dir") from error
    return _examples(task, where, ((f"row {i}", row) for i, row in enumerate(data)), hub)


def _find(task: Task, split: str, folder: Path) -> Path:
    """Return the file of a split in a folder: one of the published names, or split and suffix."""
    check_name(folder, "data_dir")
    if not folder.is_dir():
        raise InputError(f"data_dir {folder} is not a folder")
    found = _files(task, split, folder)
    if split == "test":  # an unlabelled test set counts only if there is nothing else
        found = [path for path in found if _has_labels(path, task)] or found
    if not found:
        expected = [*task.files.get(split, ()), f"{' or '.join(SPLITS[split])} with a suffix of"]
        suffixes = ", ".join({**READERS, **task.readers})
        raise InputError(
            f"{folder} has no {split} file of task {task.name}: expected "
            f"{', '.join(expected)} {suffixes}; it holds {_listing(folder)}"
        )
    return found[0]


def _files(task: Task, split: str, folder: Path) -> list[Path]:
    """Return files that may hold the split: first those of published names, then
    split and suffix."""
    names = [name + end for name in SPLITS[split] for end in {**READERS, **task.readers}]
    names = [*task.files.get(split, ()), *names]
    return [path for name in names for path in sorted(folder.glob(name)) if path.is_file()]


def _listing(folder: Path, limit: int = 8) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") or "nothing"


def _has_labels(path: Path, task: Task) -> bool:
    """Return whether one of the first rows has a label."""
    for place, raw in islice(read(path, {**READERS, **task.readers}), FIRST):
        for row in _flat(task, raw, f"{path.name} {place}"):
            right = row.get("answers") or row.get(_name(task, row, task.label_column, Hub("")))
            if right is not None and _label(right) not in ("", "-1", *task.unlabelled):
                return True
    return False


def _from_file(task: Task, path: Path) -> list[Example]:
    return _examples(task, path.name, read(path, {**READERS, **task.readers}), Hub(""))


def _examples(task: Task, where: str, rows: Iterable[tuple[str, Row]], hub: Hub) -> list[Example]:
    examples, without = [], 0
    for place, raw in rows:
        origin = f"{where} {place}"
        for row in _flat(task, raw, origin):
            example = example_of(task, row, origin, hub)
            if example is None:
                without += 1
            else:
                examples.append(example)
    if without:
        logging.getLogger("mezo").info("%s: %d rows without a label left out", where, without)
    if not examples:
        raise InputError(f"{where} is empty" if not without else f"{where} has no labels")
    return examples


def _flat(task: Task, raw: Row, origin: str) -> Iterator[Row]:
    """Yield the rows that one row of a file holds; name the place of a row that is malformed."""
    if task.rows is None:
        yield raw
        return
    try:
        yield from task.rows(raw)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    except KeyError as error:
        raise InputError(
            f"{origin} has no {error.args[0]!r}: it is not as task {task.name} is published"
        ) from None
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(f"{origin} is not as task {task.name} is published: {error}") from None


def example_of(task: Task, row: Row, origin: str, hub: Hub) -> Example | None:
    """Return the example of a row, or None if the row has no label."""
    judged = task.kind == "generation" or "choices" in row  # by answers, not by a label
    columns = task.columns if judged else (*task.columns, task.label_column)
    found: dict[str, Any] = {}
    for column in columns:
        name = _name(task, row, column, hub)
        if name not in row:
            known = " or ".join(map(repr, (column, *task.aliases.get(column, ()))))
            raise InputError(f"{origin} has no column {known}, it has {', '.join(row)}")
        if row[name] is None:
            raise InputError(f"{origin}: column {name!r} is null")
        found[column] = row[name]
    fields = {column: str(found[column]) for column in task.columns}
    own = {key: tuple(map(str, row.get(key) or ())) for key in ("candidates", "choices", "answers")}
    if judged:
        label = _right(own["answers"], own["choices"], origin)
    else:
        value = _label(found[task.label_column])
        if value in task.unlabelled:
            return None
        label = _index(task, value, origin, hub)
        own["answers"] = ()
    return Example(fields, label, origin, group=str(row.get("group", "")), **own)


def _name(task: Task, row: Row, column: str, hub: Hub) -> str:
    """Return the name that a column of the task has in this row."""
    names = (hub.columns.get(column, column), column, *task.aliases.get(column, ()))
    return next((name for name in names if name in row), column)


def _right(answers: tuple[str, ...], choices: tuple[str, ...], origin: str) -> int:
    if not answers:
        raise InputError(f"{origin} has no answer")
    if not choices:
        return -1
    for answer in answers:
        if answer in choices:
            return choices.index(answer)
    raise InputError(f"{origin}: none of its answers ({', '.join(answers)}) is a candidate")


def _index(task: Task, value: str, origin: str, hub: Hub) -> int:
    if hub.labels and value.isdigit() and int(value) < len(hub.labels):
        value = hub.labels[int(value)]
    label = task.label_aliases.get(value, value) if value not in task.labels else value
    if label not in task.labels:
        raise InputError(f"{origin}: label {value!r} is not one of {', '.join(task.labels)}")
    return task.labels.index(label)


def _label(value: Any) -> str:
    """Return a label as the file spells it: JSON's true is "true"."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()
