"""An Example is a row of data with a label, a Task the words that turn it into text.

A task is data. Its templates name the columns in braces, as lm-evaluation-harness's doc_to_text
does; {{ and }} stand for braces. A task may serve up to three kinds of models, by three pairs of
fields:

    prompt, candidates          causal: "{sentence} It was" and " terrible", " great"
    mask_prompt, verbalizers    masked: "{sentence} It was {mask}." and "terrible", "great"
    text, descriptions          sentence encoders: "{sentence}" and one description per label

Its kind says where the candidates are and what is predicted:

    classification      candidates: the task's, the same for all examples, one per label
    multiple_choice     candidates: templates over the example's columns, or Example.candidates
    generation          no candidates: the model writes after the prompt; Example.answers are right
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezo.errors import InputError
from mezo.tasks.metrics import METRICS
from mezo.tasks.template import fields_of, fill

__all__ = ["KINDS", "MASK", "OBJECTIVES", "Example", "Hub", "Task", "fields_of", "fill"]

UNANSWERED = -2  # a label that is not a candidate; -1 is the prediction of a score that is NaN
MASK = "mask"  # the field of mask_prompt that stands for the tokenizer's mask token
KINDS = ("classification", "multiple_choice", "generation")
OBJECTIVES = ("candidates", "tokens")
Row = dict[str, Any]  # column -> value
Reader = Callable[[Path], Iterable[tuple[str, Row]]]  # rows of a file, each with its place, "row 3"


@dataclass(frozen=True)
class Example:
    """One row: the columns that the task names, as strings, and the right answer.

    Args:
        label: index of the right candidate, the first one if several are right; -1 for generation.
        origin: "train.tsv row 12", for error messages.
        candidates: those of this example alone, filled in; () stands for the task's own.
        choices: what each of the candidates stands for, where that is not the candidate itself:
            ReCoRD's entities, each of which makes a whole sentence. They are compared with answers.
        answers: all accepted answers, beginning with the one that is trained; () for
            classification.
        group: what examples have in common that are judged together, such as a question of MultiRC.
    """

    fields: dict[str, str]
    label: int = 0
    origin: str = field(default="", compare=False)
    candidates: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    group: str = ""
    choices: tuple[str, ...] = ()

    def is_right(self, candidate: int) -> bool:
        """Return whether a candidate, by its index, is one of the right ones."""
        if self.choices and self.answers:
            return 0 <= candidate < len(self.choices) and self.choices[candidate] in self.answers
        return candidate == self.label

    def label_for(self, candidate: int) -> int:
        """Return the label that a prediction is compared with.

        It is the candidate itself where that is right, and otherwise the first right one, so that
        every metric of labels accepts any of several answers. Where no candidate is right, it is
        UNANSWERED, which no prediction equals.
        """
        if self.is_right(candidate):
            return candidate
        return self.label if self.is_right(self.label) else UNANSWERED


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub without a loading script."""

    id: str
    config: str | None = None
    train: str = "train"
    dev: str = "validation"
    test: str = "validation"  # the paper's choice where the test labels are not published
    revision: str | None = None  # a branch or commit; None is the newest
    columns: Mapping[str, str] = field(default_factory=dict)  # ours -> theirs, where they differ
    labels: tuple[str, ...] = ()  # names of its classes 0, 1, ..., as the task spells them


@dataclass(frozen=True)
class Task:
    """Templates and data of one task. Raises InputError if they do not fit together.

    The last fields say how rows of published files and of the hub become examples.
    """

    name: str
    version: int  # of the templates; results of two versions are not comparable
    source: str  # where the templates come from
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()  # label values as the data spells them, in the candidates' order
    label_column: str = "label"
    prompt: str = ""
    candidates: tuple[str, ...] = ()  # may name columns; a leading space is part of the token
    mask_prompt: str = ""
    verbalizers: tuple[str, ...] = ()  # each one token at the mask, without leading space
    text: str = ""
    descriptions: tuple[str, ...] = ()
    hub: Hub | None = None
    folder: str = ""  # where the package holds a data set that comes with it
    metric: str = "accuracy"  # one of METRICS
    kind: str = "classification"
    objective: str = "candidates"  # what the paper trains; see form_for's `objective`
    sfc_prompt: str = ""  # the prompt in calibration; "": the candidate begins the text
    completion: str = ""  # generation: what is trained after the prompt, " {answer}\n"
    max_new_tokens: int = 0  # generation
    stop: tuple[str, ...] = ()  # generation: the text ends before the first of these
    num_dev: int = 500  # examples that the paper takes from the training set for validation

    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # columns in some files
    label_aliases: Mapping[str, str] = field(default_factory=dict)  # "0" -> "DESC"
    unlabelled: tuple[str, ...] = ()  # label values of rows to leave out, such as SNLI's "-"
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # split -> published names
    paths: Mapping[str, str] = field(default_factory=dict)  # split -> file, of a user's own task
    readers: Mapping[str, Reader] = field(default_factory=dict)  # readers of files, by suffix
    rows: Callable[[Row], Iterable[Row]] | None = (
        None  # makes several rows of one: a passage has many questions
    )
    shown: Row = field(default_factory=dict)  # a real row, for `mezo tasks NAME` and the tests

    def __post_init__(self):
        self._check_kind()
        if len(self.labels) == 1 or len(set(self.labels)) < len(self.labels):
            raise InputError(f"task {self.name} needs two or more distinct labels: {self.labels}")
        for kind in ("candidates", "verbalizers", "descriptions"):
            given = getattr(self, kind)
            number = len(given)
            if len(set(given)) < number:
                raise InputError(
                    f"task {self.name} has two equal {kind}, which no score tells apart: {given}"
                )
            if number not in (0, len(self.labels)):
                raise InputError(
                    f"task {self.name} has {number} {kind} for {len(self.labels)} labels "
                    f"({', '.join(self.labels)})"
                )
        for template in (self.prompt, self.text, self.sfc_prompt, *self.candidates):
            self._check(template, self.columns)
        self._check(self.completion, (*self.columns, "answer"))
        if self.mask_prompt:
            self._check(self.mask_prompt, (*self.columns, MASK))
            if fields_of(self.mask_prompt).count(MASK) != 1:
                raise InputError(f"template {self.mask_prompt!r} must hold {{mask}} exactly once")

    def _check_kind(self) -> None:
        for name, known in (("kind", KINDS), ("metric", METRICS), ("objective", OBJECTIVES)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"task {self.name}: {name} must be {', '.join(known)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.kind == "classification" and len(self.labels) < 2:
            raise InputError(f"task {self.name} needs two or more distinct labels: {self.labels}")
        if self.kind == "generation" and not (self.completion and self.max_new_tokens >= 1):
            raise InputError(f"task {self.name} generates: it needs completion and max_new_tokens")

    def _check(self, template: str, columns: tuple[str, ...]) -> None:
        for name in fields_of(template):
            if name not in columns:
                raise InputError(
                    f"template {template!r} names the column {name!r}, "
                    f"but task {self.name} has {', '.join(columns) or 'none'}"
                )

    def candidates_of(self, example: Example) -> tuple[str, ...]:
        """Return an example's candidates, filled in: its own, or the task's. () for generation."""
        if example.candidates:
            return example.candidates
        return tuple(fill(candidate, example.fields) for candidate in self.candidates)

    def completion_of(self, example: Example) -> str:
        """Return what is trained after the prompt, and what a demonstration shows there."""
        if self.kind == "generation":
            return fill(self.completion, example.fields | {"answer": example.answers[0]})
        return self.candidates_of(example)[example.label]


def custom_task(
    prompt: str,
    candidates: tuple[str, ...] | list[str],
    *,
    labels: tuple[str, ...] | list[str] | None = None,
    label_column: str = "label",
    name: str = "custom",
) -> Task:
    """Make a task for a user's own files.

    Args:
        prompt: a template over the files' columns. With {mask} it serves masked models only.
            Without, it serves causal models as it is, masked models with the mask added at the
            end, and encoders.
        candidates: one per label. For causal models a leading space is part of the token
            (" great"), and candidates may name columns ("{choice1}"), which other kinds of models
            do not take.
        labels: values of the label column, in the order of the candidates; None: 0, 1, 2, ...
        label_column: the column that holds the label.
    """
    if not candidates:
        raise InputError("a custom task needs candidates: one string per label")
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
