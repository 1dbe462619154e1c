"""The list of tasks, and one of them shown on a real row: the command `mezo tasks`."""

from collections.abc import Mapping

from mezo.tasks.loading import SPLITS, example_of
from mezo.tasks.task import MASK, Example, Hub, Task, fill


def models_of(task: Task) -> tuple[str, ...]:
    """Return the kinds of models that the task serves."""
    serves = {
        "causal": task.prompt,
        "masked": task.mask_prompt,
        "encoder": task.text,
    }
    return tuple(kind for kind, template in serves.items() if template)


def describe(tasks: Mapping[str, Task]) -> list[dict[str, str]]:
    """Return one row per task: name, kind, models, metric, labels and data."""
    return [
        {
            "name": name,
            "kind": task.kind,
            "models": ", ".join(models_of(task)),
            "metric": task.metric,
            "labels": ", ".join(task.labels) or "-",
            "data": _data(task),
        }
        for name, task in tasks.items()
    ]


def _data(task: Task) -> str:
    if task.hub is None:
        return "in the package" if task.folder else "files"
    return f"{task.hub.id} {task.hub.config or ''}".strip()


def shown_example(task: Task) -> Example:
    """Return the example made of the real row that documents the task."""
    row = next(iter(task.rows(task.shown))) if task.rows else task.shown
    example = example_of(task, row, f"row shown for {task.name}", Hub(""))
    assert example is not None
    return example


def show(task: Task) -> str:
    """Return facts of the task, and what its row becomes for each kind of model. "|" marks the
    beginning of what is scored or trained, "*" marks the right candidate."""
    example = shown_example(task)
    lines = [f"{task.name}, version {task.version}: {task.kind}, {task.metric}"]
    lines += [f"templates: {task.source}", f"data: {_data(task)}; {_files(task)}", ""]
    if task.prompt and task.kind == "generation":
        lines += ["causal", fill(task.prompt, example.fields) + "|" + task.completion_of(example)]
        lines += [f"all right answers: {'; '.join(example.answers)}", ""]
    elif task.prompt:
        lines += ["causal", fill(task.prompt, example.fields)]
        candidates = task.candidates_of(example)
        lines += [f"{_mark(example, i)}|{text}" for i, text in enumerate(candidates)] + [""]
    if task.mask_prompt:
        lines += ["masked", fill(task.mask_prompt, {**example.fields, MASK: "[MASK]"})]
        lines += [f"{_mark(example, i)} {word}" for i, word in enumerate(task.verbalizers)] + [""]
    if task.text:
        lines += ["encoder", fill(task.text, example.fields)]
        lines += [f"{_mark(example, i)} {text}" for i, text in enumerate(task.descriptions)] + [""]
    return "\n".join(lines).rstrip("\n")


def rendered(task: Task) -> dict[str, object]:
    """Return what the task's row becomes, as data: a text for each kind of model,
    candidates, label."""
    example = shown_example(task)
    found: dict[str, object] = {"label": example.label}
    if task.prompt:
        found |= {"prompt": fill(task.prompt, example.fields)}
        found |= {"candidates": task.candidates_of(example), "answers": example.answers}
    if task.mask_prompt:
        found |= {"mask_prompt": fill(task.mask_prompt, {**example.fields, MASK: "[MASK]"})}
        found |= {"verbalizers": task.verbalizers}
    if task.text:
        found |= {"text": fill(task.text, example.fields), "descriptions": task.descriptions}
    return found


def _mark(example: Example, candidate: int) -> str:
    return "*" if example.is_right(candidate) else " "


def _files(task: Task) -> str:
    """Return a line that names the files in which a folder may hold the task."""
    names = dict.fromkeys(name for split in SPLITS for name in task.files.get(split, ()))
    return f"files: {', '.join([*names, 'train, dev and test .tsv, .csv, .jsonl or .parquet'])}"
