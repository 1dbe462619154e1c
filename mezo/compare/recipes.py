"""The methods of `mezo compare`, each as options of `mezo train`.

    zero-shot, calibrated, icl, lp           nothing is trained
    ft, head, lora, prefix, prompt, ia3, ... Adam by back-propagation, on what the name says
    mezo, mezo-head, mezo-lora, ...          forward passes alone, on the same
    mezo-biases, -norms, -biases_and_norms   forward passes alone, on these weights
    ft-checkpointing, lora-checkpointing     Adam with activation checkpointing

Learning rates fall with the number N of the model's weights: rates.py.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from mezo.compare.paper_grids import GRIDS, Asked, Grid, name_of, on_task
from mezo.compatibility import checkpointing_option
from mezo.errors import InputError
from mezo.runs import rates
from mezo.tasks import Task

UNTRAINED = ("zero-shot", "icl", "lp")
LIKE = "like"  # in a section of a grid file: the method whose recipe it begins with
CALIBRATED = "calibrated"  # zero-shot, less the scores of an empty example
SELECTED = ("head", "biases", "norms", "biases_and_norms")  # by --trainable
PARTS = (*SELECTED, "lora", "prefix", "prompt")
CHECKPOINTING = ("ft-checkpointing", "lora-checkpointing")
DEFAULT = (*UNTRAINED, "ft", "lora", "prefix", "mezo", "mezo-lora", "mezo-prefix")
VARIANTS: dict[str, tuple[float, Grid]] = {  # of MeZO on all weights: its rate times, and options
    "n-spsa": (3.0, {"num_samples": 4}),
    "one-sided": (5.0, {"estimator": "one_sided", "num_samples": 8}),
    "fzoo": (27.0, {"estimator": "one_sided", "num_samples": 8, "shaping": "z_scores"}),
    "lozo": (1.0, {"perturbation": "low_rank", "rank": 2}),
    "momentum": (0.1, {"rule": "momentum"}),
    "zo-adam": (4.5, {"rule": "adam"}),
}  # the factors are those of the rates in docs/results.md, "Ablations"
VARIANTS["fzoo"][1]["distribution"] = "rademacher"
KNOWN: tuple[str, ...] = (*DEFAULT, "head", "prompt", "mezo-head", "mezo-prompt")
KNOWN += (*CHECKPOINTING, CALIBRATED, "mezo-biases_and_norms", *VARIANTS)
AROUND = (1 / 3, 1.0, 3.0)  # of the rate, in the default grid
SHOWN = 32  # demonstrations, as in the paper


def parts_of(method: str) -> tuple[str, str, bool]:
    """Return (method of mezo train, what is trained, checkpointing). Raise InputError, with the
    nearest name, for an unknown method."""
    if method in UNTRAINED:
        return method, "", False
    if method == CALIBRATED:
        return "zero-shot", "", False
    if method in CHECKPOINTING:
        part = method.removesuffix("-checkpointing")
        return "adam", "" if part == "ft" else part, True
    if method in VARIANTS:
        return "mezo", "", False
    trained, part = "adam", "" if method == "ft" else method
    if method == "mezo" or method.startswith("mezo-"):
        trained, part = "mezo", method[len("mezo-") :]
    if part and part not in PARTS:
        _known_to_peft(method, part)
    return trained, part, False


def _known_to_peft(method: str, part: str) -> None:
    from peft import PeftType

    from mezo.models.adapters import REFUSED, full_name

    known = {one.name.lower() for one in PeftType}
    if part in known:
        full_name(part)  # says why where it is refused
        return
    others = sorted(known - set(REFUSED))
    near = get_close_matches(method, [*KNOWN, *others, *(f"mezo-{one}" for one in others)], n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KNOWN)}, and peft's methods"
    raise InputError(f"method {method!r} is unknown; {hint}")


def is_known(method: str) -> bool:
    """Return whether a method has a recipe here: others are named in a grid file."""
    try:
        parts_of(method)
    except InputError:
        return False
    return True


def recipe(method: str, parameters: int, steps: int, adam_steps: int) -> Grid:
    """Return the options of mezo train; the learning rate is an axis of one value.

    Batches have 16 examples for MeZO and 8 for Adam (Table 16). Runs are validated every tenth of
    the steps, as in Table 15, and the best weights of these are tested.
    """
    trained, part, checkpointing = parts_of(method)
    made: Grid = {"method": trained}
    if method == "icl":
        made["demonstrations"] = SHOWN
    if method == CALIBRATED:
        made["calibrate"] = True
    if trained in UNTRAINED:
        return made
    if part in SELECTED:
        made["trainable"] = part
    elif part:
        made |= {"use_peft": True, "peft_type": part}
    if trained == "mezo":
        rate, eps = rates.mezo(parameters, part)
        factor, options = VARIANTS.get(method, (1.0, {}))
        rate, made = float(f"{rate * factor:.2g}"), made | options
        made |= {"mezo_eps": eps, "max_steps": steps, "per_device_train_batch_size": 16}
    else:
        rate = rates.adam(parameters, part)
        made |= {"max_steps": adam_steps, "per_device_train_batch_size": 8}
        made |= {"lr_scheduler_type": "linear"}
    made |= checkpointed() if checkpointing else {}
    return made | {"learning_rate": [rate], "eval_steps": 0.1, "save_steps": 0.1}


def checkpointed() -> Grid:
    """Return the option of activation checkpointing, by its name in this transformers."""
    from transformers import TrainingArguments  # slow to import, and most recipes need none

    return {checkpointing_option(TrainingArguments): True}


def searched(made: Grid) -> Grid:
    """Return the recipe with rates around its own: `--grid default`."""
    if "learning_rate" not in made:
        return made
    (rate,) = made["learning_rate"]
    return made | {"learning_rate": [float(f"{rate * factor:.2g}") for factor in AROUND]}


def of_paper(table: str, method: str, task: Task, k: int | None) -> Grid | None:
    """Return the grid of Table 15 or 16 for a method on a task; None where it has none.

    The comparison makes its own splits: seeds are an axis of `mezo compare`.
    """
    trained, part, _ = parts_of(method)
    if method in VARIANTS:
        return None
    try:
        name = name_of(table, Asked(task.name, trained, part, 512 if k is None else k))
    except InputError:
        name = f"{table}-{method}"
    grid = on_task(name, task.num_dev) if name in GRIDS else None
    return grid and {option: grid[option] for option in grid if option != "split_seed"}


def check(methods: Iterable[str]) -> tuple[str, ...]:
    """Return the methods, each once. Raise InputError for an unknown one."""
    chosen = tuple(dict.fromkeys(methods))
    for method in chosen:
        parts_of(method)
    if not chosen:
        raise InputError("no methods to compare")
    return chosen


def begins_with(path: str, given: Any) -> dict[str, str]:
    """Return the known method that each section of a grid file begins with: its own, or `like`.

    Raises InputError if the file is malformed or `like` names no known method.
    """
    if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
        raise InputError(f"grid {path}: expected sections 'method:' with lines 'option: value'")
    known = {str(method): str(section.get(LIKE, method)) for method, section in given.items()}
    for method, base in known.items():
        if LIKE in given[method] and not re.fullmatch(r"\w[\w.-]*", method):
            raise InputError(f"grid {path}: {method!r} cannot be the name of a folder")
        if base != method and is_known(method):
            raise InputError(f"grid {path}: {method} is a method already: it cannot be like {base}")
        if not is_known(base):
            add = "" if LIKE in given[method] else f"; if it is your own, add a line '{LIKE}: mezo'"
            raise InputError(f"grid {path}: {method}: method {base!r} is unknown{add}")
    return known


def of_file(path: str, given: Any, methods: Iterable[str]) -> dict[str, Grid]:
    """Return the sections of a YAML file by method: options of mezo train, with lists as axes."""
    from mezo.compare.grids import values_of

    for method in given:
        if method not in methods:
            raise InputError(
                f"grid {path}: {method} is not one of the methods {', '.join(methods)}"
            )
    return {
        method: {
            option: values_of(path, str(option), value)
            for option, value in section.items()
            if option != LIKE
        }
        for method, section in given.items()
    }
