"""A task of a user's own, in a YAML file with the field names of lm-evaluation-harness.

    task: films
    dataset_path: json                   # json, csv or parquet with data_files; or a set of the hub
    dataset_kwargs: {data_files: {train: train.jsonl, validation: val.jsonl}}
    training_split: train
    validation_split: validation
    output_type: multiple_choice         # or generate_until
    doc_to_text: "{{text}} It was"
    doc_to_choice: [terrible, great]     # or a column that holds a list of them
    doc_to_target: label                 # a column: the index of the right one, or itself
    metric_list: [{metric: acc}]

Nothing in the file is executed. A template is text with {{column}}. No other Jinja, no functions
and no YAML tags are understood, and what has no counterpart here is refused by name. Two things
differ from the harness: scores are means over a candidate's tokens, where its acc takes sums, and
exact_match is SQuAD's, without regard to case, articles and punctuation.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mezo.errors import InputError
from mezo.foreign import check_name, read_options
from mezo.tasks.task import Hub, Row, Task, custom_task

FIELDS = {  # what is read
    "task", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
    "test_split", "output_type", "doc_to_text", "doc_to_choice", "doc_to_target",
    "target_delimiter", "metric_list", "generation_kwargs",
}  # fmt: skip
WITHOUT_EFFECT = {  # here: shots are --demonstrations, and come from the training split
    "tag", "group", "task_alias", "metadata", "fewshot_split", "fewshot_delimiter", "num_fewshot",
    "should_decontaminate", "doc_to_decontamination_query",
}  # fmt: skip
_SPLITS = {"training_split": "train", "validation_split": "dev", "test_split": "test"}
_FILES = ("json", "csv", "parquet")
_COLUMN = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")
_METRICS = {
    ("multiple_choice", "acc"): "accuracy",
    ("generate_until", "exact_match"): "exact_match",
    ("generate_until", "f1"): "f1",
}


def is_file(name: str) -> bool:
    """Return whether a task's name is that of a file."""
    return Path(name).suffix in (".yaml", ".yml")


def read(path: str | Path) -> Task:
    """Read the task of a file. Raise InputError for whatever the file asks for
    that cannot be done."""
    path = Path(path)
    given = _fields(path)
    try:
        task = _task(path, given)
        return replace(task, **_data(path, given))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _fields(path: Path) -> dict[str, Any]:
    given = read_options(path, f"task {path}", "lines 'field: value'")  # no tag: !function is none
    for name, value in given.items():
        if name in FIELDS | WITHOUT_EFFECT or value in (None, "", [], {}):
            continue
        near = get_close_matches(str(name), FIELDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"task {path}: field {name!r} has no counterpart here{hint}")
    return {name: value for name, value in given.items() if name in FIELDS and value is not None}


def _task(path: Path, given: Mapping[str, Any]) -> Task:
    name, kind = str(given.get("task", path.stem)), given.get("output_type", "generate_until")
    if kind not in ("multiple_choice", "generate_until"):
        raise InputError(f"output_type {kind!r}: multiple_choice and generate_until are understood")
    prompt, columns = _template("doc_to_text", given.get("doc_to_text", ""))
    if not columns:
        raise InputError("doc_to_text names no column: write {{column}}")
    delimiter = given.get("target_delimiter", " ")
    if not isinstance(delimiter, str):
        raise InputError(f"target_delimiter must be text, got {delimiter!r}")
    metric = _metric(kind, given.get("metric_list"))
    if kind == "generate_until":
        return _generating(name, prompt, columns, delimiter, given, metric)
    choices, target = given.get("doc_to_choice"), _column("doc_to_target", given)
    if isinstance(choices, list):
        return _choosing(name, prompt, [delimiter + str(one) for one in choices], choices, target)
    if not isinstance(choices, str):
        raise InputError("doc_to_choice must be a list of texts, or a column that holds one")
    return Task(
        name=name,
        version=0,
        source="the user",
        columns=tuple(columns),
        prompt=prompt,
        kind="multiple_choice",
        rows=_listed(_column("doc_to_choice", given), target, delimiter),
    )


def _choosing(
    name: str, prompt: str, candidates: list[str], choices: list[Any], target: str
) -> Task:
    """Make a task with one list of candidates for all rows; they may name columns."""
    filled = [_template("doc_to_choice", candidate)[0] for candidate in candidates]
    labels = [str(i) for i in range(len(filled))]
    task = custom_task(prompt, filled, labels=labels, label_column=target, name=name)
    spelled = {str(one): label for one, label in zip(choices, labels, strict=True)}
    own = {word: label for word, label in spelled.items() if word not in labels}
    return replace(task, label_aliases=own)


def _listed(column: str, target: str, delimiter: str) -> Callable[[Row], Iterator[Row]]:
    """Return a function that makes rows whose candidates are in a column of their own."""

    def rows(row: Row) -> Iterator[Row]:
        choices = row[column]
        if not isinstance(choices, list) or len(choices) < 2:
            raise InputError(f"column {column!r} must be a list of two choices or more")
        choices = [str(one) for one in choices]
        right = row[target]
        if str(right) not in choices:
            if not str(right).isdecimal() or int(right) >= len(choices):
                raise InputError(
                    f"column {target!r}: {right!r} is neither a choice nor the index of one"
                )
            right = choices[int(right)]
        made = {"candidates": [delimiter + one for one in choices], "choices": choices}
        yield row | made | {"answers": [str(right)]}

    return rows


def _generating(
    name: str,
    prompt: str,
    columns: list[str],
    delimiter: str,
    given: Mapping[str, Any],
    metric: str,
) -> Task:
    target = _column("doc_to_target", given)
    options = given.get("generation_kwargs", {})
    if not isinstance(options, dict):
        raise InputError("generation_kwargs must be 'option: value'")
    plain = {"do_sample": (False,), "temperature": (0, 0.0)}
    for option, value in options.items():
        if option not in ("until", "max_gen_toks") and value not in plain.get(option, ()):
            raise InputError(f"generation_kwargs: {option} {value!r} has no counterpart here")
    until = options.get("until", ["\n\n"])  # the harness's defaults
    stop = tuple([until] if isinstance(until, str) else until)
    length = options.get("max_gen_toks", 256)
    if not stop or not all(isinstance(one, str) and one for one in stop):
        raise InputError(f"generation_kwargs: until must be texts, got {until!r}")
    if type(length) is not int:
        raise InputError(f"generation_kwargs: max_gen_toks must be a number, got {length!r}")

    def rows(row: Row) -> Iterator[Row]:
        answers = row[target]
        yield row | {"answers": answers if isinstance(answers, list) else [answers]}

    return Task(
        name=name,
        version=0,
        source="the user",
        columns=tuple(columns),
        prompt=prompt,
        kind="generation",
        objective="tokens",
        metric=metric,
        completion=f"{_literal(delimiter)}{{answer:whole}}{_literal(stop[0])}",
        max_new_tokens=length,
        stop=stop,
        rows=rows,
    )


def _metric(kind: str, given: Any) -> str:
    default = {"multiple_choice": "acc", "generate_until": "exact_match"}[kind]
    rows = [{"metric": default}] if given is None else given
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows:
        raise InputError("metric_list must be a list of 'metric: name'")
    known = sorted(name for k, name in _METRICS if k == kind)
    for row in rows:
        if (kind, row.get("metric")) not in _METRICS:
            raise InputError(
                f"metric_list: {row.get('metric')!r} has no counterpart for {kind} here; known: "
                f"{', '.join(known)}"
            )
        if row.get("aggregation", "mean") != "mean" or row.get("higher_is_better") is False:
            raise InputError(f"metric_list: {row['metric']} is a mean here, and higher is better")
    return _METRICS[kind, rows[0]["metric"]]  # the first one is the task's


def _template(field: str, text: Any) -> tuple[str, list[str]]:
    """Return a field as a task's template, and its columns. A bare name is a
    column, as in the harness."""
    if not isinstance(text, str):
        raise InputError(f"{field} must be text, got {text!r}")
    if field != "doc_to_choice" and text.isidentifier():
        return f"{{{text}:whole}}", [text]
    parts, columns, end = [], [], 0
    for match in _COLUMN.finditer(text):
        parts += [_literal(text[end : match.start()]), f"{{{match[1]}:whole}}"]
        columns.append(match[1])
        end = match.end()
    rest = "".join([*_COLUMN.split(text)[::2]])
    for mark in ("{{", "{%", "{#"):
        if mark in rest:
            raise InputError(
                f"{field}: {rest[rest.index(mark) :]!r:.60} is more than {{{{column}}}}"
            )
    return "".join([*parts, _literal(text[end:])]), list(dict.fromkeys(columns))


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _column(field: str, given: Mapping[str, Any]) -> str:
    """Return the column that a field names, as `label` or `{{label}}`."""
    text = given.get(field)
    match = _COLUMN.fullmatch(text.strip()) if isinstance(text, str) else None
    name = match[1] if match else text
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"{field} must name a column, got {text!r}")
    return name


def _data(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the rows are, as Task.paths or Task.hub."""
    source = given.get("dataset_path")
    splits = {ours: given[name] for name, ours in _SPLITS.items() if name in given}
    if source is None or not splits:
        raise InputError("dataset_path and training_split, validation_split, test_split say where "
                         "the rows are")  # fmt: skip
    options = given.get("dataset_kwargs", {})
    if not isinstance(options, dict) or set(options) - {"data_files"}:
        raise InputError(f"dataset_kwargs: only data_files is understood, got {options!r}")
    if source not in _FILES:
        if options:
            raise InputError(f"data_files goes with dataset_path {', '.join(_FILES)}")
        names = {"train": "", "dev": "", "test": splits.get("dev", "")} | splits
        return {"hub": Hub(str(source), given.get("dataset_name"), **names)}
    files = options.get("data_files")
    files = {"train": files} if isinstance(files, str) else files
    if not isinstance(files, dict):
        raise InputError("data_files must be 'split: file'")
    found = {}
    for ours, split in splits.items():
        if not isinstance(files.get(split), str):
            raise InputError(f"data_files has no file {split!r}")
        check_name(files[split], "data file")
        file = Path(files[split])  # in the working directory, as in the harness; else beside ours
        found[ours] = str(file if file.is_file() else path.parent / file)
    if "train" not in found:
        found["train"] = next(iter(found.values()))
    return {"paths": found}
