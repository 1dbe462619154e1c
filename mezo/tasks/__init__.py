"""Tasks: data sets with prompts. `get("sst2")`, `load_examples`, `sample`, `few_shot`.

A new task is one more `Task(...)` in a file of its kind, and its name in TASKS below.
"""

from difflib import get_close_matches

from ..errors import InputError
from .classification import OPINIONS, SST2
from .loading import load_examples
from .sampling import few_shot, sample
from .task import Example, Hub, Task, custom_task, fill

__all__ = ["TASKS", "Example", "Hub", "Task"]
__all__ += ["custom_task", "few_shot", "fill", "get", "load_examples", "sample"]

TASKS = {task.name: task for task in (SST2, OPINIONS)}


def get(name: str) -> Task:
    """The task of that name. An unknown one is an InputError with the nearest name."""
    if name not in TASKS:
        near = get_close_matches(name.lower().replace("-", ""), TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(TASKS)}"
        raise InputError(f"unknown task {name!r}; {hint}")
    return TASKS[name]
