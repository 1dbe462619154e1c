"""Tasks: data sets with prompts. `get("sst2")`, `load_examples`, `sample`, `few_shot`.

To add a task, write one more `Task(...)` in a file of its kind and add it to TASKS below.

    classification.py   one sentence          SST-2, SST-5, TREC, Opinions
    inference.py        pairs of sentences    SNLI, MNLI, RTE, CB
    superglue.py        BoolQ, WSC, WiC, MultiRC, COPA, ReCoRD
    questions.py        generation            SQuAD, DROP
"""

from difflib import get_close_matches

from mezo.errors import InputError
from mezo.tasks import listing
from mezo.tasks import yaml_task as own
from mezo.tasks.classification import OPINIONS, SST2, SST5, TREC
from mezo.tasks.inference import CB, MNLI, MNLI_MM, RTE, SNLI
from mezo.tasks.loading import has_own_dev, load_examples
from mezo.tasks.metrics import METRICS
from mezo.tasks.questions import DROP, SQUAD
from mezo.tasks.sampling import (
    TEST_SEED,
    demonstration_sets,
    few_shot,
    few_shot_test,
    sample,
    train_dev,
)
from mezo.tasks.superglue import BOOLQ, COPA, MULTIRC, RECORD, WIC, WSC
from mezo.tasks.task import Example, Hub, Task, custom_task, fill

__all__ = ["METRICS", "TASKS", "TEST_SEED", "Example", "Hub", "Task"]
__all__ += [
    "custom_task",
    "demonstration_sets",
    "describe",
    "few_shot",
    "few_shot_test",
    "fill",
    "get",
    "load_examples",
]
__all__ += ["has_own_dev", "rendered", "sample", "show", "train_dev"]

SENTENCES = (OPINIONS, SST2, SST5, TREC)
PAIRS = (SNLI, MNLI, MNLI_MM, RTE, CB)
PASSAGES = (BOOLQ, WSC, WIC, MULTIRC, COPA, RECORD, SQUAD, DROP)
TASKS = {task.name: task for task in (*SENTENCES, *PAIRS, *PASSAGES)}


def get(name: str) -> Task:
    """Return the task of that name, or read the task of a YAML file (yaml_task.py).

    Raise InputError, with the nearest name, if there is no such task.
    """
    if own.is_file(name):
        return own.read(name)
    if name not in TASKS:
        word = name.lower().replace("-", "")
        near = [word] if word in TASKS else sorted(get_close_matches(word, TASKS, n=2))
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(TASKS)}"
        raise InputError(f"unknown task {name!r}; {hint}")
    return TASKS[name]


def describe() -> list[dict[str, str]]:
    """Return one row per task: name, kind, models that it serves, metric, labels and data."""
    return listing.describe(TASKS)


def show(name: str) -> str:
    """Return a task's facts, and its prompt and candidates on a real row, as text."""
    return listing.show(get(name))


def rendered(name: str) -> dict[str, object]:
    """Return a task's prompt and candidates on a real row, as data."""
    return listing.rendered(get(name))
