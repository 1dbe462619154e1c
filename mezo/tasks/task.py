"""An Example is a row of data with a label, a Task the words that turn it into text.

A task is data. Its templates name the columns in braces, as doc_to_text of lm-evaluation-harness;
{{ and }} stand for braces. A task may serve up to three kinds of models, by three pairs of fields:

    prompt, candidates          causal: "{sentence} It was" and " terrible", " great"
    mask_prompt, verbalizers    masked: "{sentence} It was {mask}." and "terrible", "great"
    text, descriptions          sentence encoders: "{sentence}" and one description a label
"""

from dataclasses import dataclass, field
from string import Formatter

from ..errors import InputError

MASK = "mask"  # the field of mask_prompt that stands for the tokenizer's mask token


@dataclass(frozen=True)
class Example:
    """One row: the columns that the task names, as strings, and the index of its label."""

    fields: dict[str, str]
    label: int  # index into the task's labels
    origin: str = field(default="", compare=False)  # "train.tsv row 12", for error messages


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub, without loading script."""

    id: str
    config: str | None = None
    train: str = "train"
    dev: str = "validation"
    test: str = "validation"  # the paper's choice where the test labels are not published


@dataclass(frozen=True)
class Task:
    """Templates and data of one task. Raises InputError if they do not fit together."""

    name: str
    version: int  # of the templates: results of two versions are not comparable
    source: str  # of the templates
    columns: tuple[str, ...]
    labels: tuple[str, ...]  # the label values as the data spells them, in the candidates' order
    label_column: str = "label"
    prompt: str = ""
    candidates: tuple[str, ...] = ()  # may name columns too; a leading space is part of the token
    mask_prompt: str = ""
    verbalizers: tuple[str, ...] = ()  # each one token at the mask, without leading space
    text: str = ""
    descriptions: tuple[str, ...] = ()
    hub: Hub | None = None
    folder: str = ""  # inside the package, of a data set that comes with it
    metric: str = "accuracy"

    def __post_init__(self):
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise InputError(f"task {self.name} needs two or more distinct labels: {self.labels}")
        for kind in ("candidates", "verbalizers", "descriptions"):
            number = len(getattr(self, kind))
            if number not in (0, len(self.labels)):
                raise InputError(
                    f"task {self.name} has {number} {kind} for {len(self.labels)} labels "
                    f"({', '.join(self.labels)})"
                )
        for template in (self.prompt, self.text, *self.candidates):
            self._check(template, self.columns)
        if self.mask_prompt:
            self._check(self.mask_prompt, (*self.columns, MASK))
            if fields_of(self.mask_prompt).count(MASK) != 1:
                raise InputError(f"template {self.mask_prompt!r} must hold {{mask}} exactly once")

    def _check(self, template: str, columns: tuple[str, ...]) -> None:
        for name in fields_of(template):
            if name not in columns:
                raise InputError(
                    f"template {template!r} names the column {name!r}, "
                    f"but task {self.name} has {', '.join(columns) or 'none'}"
                )


def fields_of(template: str) -> list[str]:
    """The column names in a template, in order. Unbalanced braces: InputError."""
    return [name for _, name in _parse(template) if name is not None]


def fill(template: str, fields: dict[str, str]) -> str:
    """The template with its fields filled in; white space around a value is dropped.

    >>> fill("{sentence} It was", {"sentence": "a charming journey . "})
    'a charming journey . It was'
    """
    parts = []
    for literal, name in _parse(template):
        parts += [literal, "" if name is None else fields[name].strip()]
    return "".join(parts)


def _parse(template: str) -> list[tuple[str, str | None]]:
    try:
        return [(literal, name) for literal, name, _, _ in Formatter().parse(template)]
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; write {{{{ for a brace") from None


def custom_task(
    prompt: str,
    candidates: tuple[str, ...] | list[str],
    *,
    labels: tuple[str, ...] | list[str] | None = None,
    label_column: str = "label",
    name: str = "custom",
) -> Task:
    """A task for a user's own files.

    Args:
        prompt: template over the files' columns. With {mask} it serves masked models alone;
            without, causal models as it is, masked ones with the mask behind it, and encoders.
        candidates: one a label. For causal models a leading space is part of the token (" great"),
            and they may name columns ("{choice1}"), which other kinds of models do not take.
        labels: values of the label column, in the order of the candidates; None is 0, 1, 2, ...
        label_column: the column that holds the label.
    """
    if not candidates:
        raise InputError("a custom task needs candidates: one string a label")
    masked = MASK in fields_of(prompt)
    chosen = [name for candidate in candidates for name in fields_of(candidate)]
    columns = dict.fromkeys(name for name in (*fields_of(prompt), *chosen) if name != MASK)
    if not columns:
        raise InputError(f"prompt {prompt!r} names no column: write the column's name in braces")
    words = () if chosen else tuple(candidate.strip() for candidate in candidates)
    return Task(
        name=name,
        version=0,
        source="the user",
        columns=tuple(columns),
        labels=tuple(labels) if labels else tuple(str(i) for i in range(len(candidates))),
        label_column=label_column,
        prompt="" if masked else prompt,
        candidates=() if masked else tuple(candidates),
        mask_prompt=prompt if masked else prompt.rstrip() + " {mask}",
        verbalizers=words,
        text="" if masked else prompt,
        descriptions=() if masked else words,
    )
