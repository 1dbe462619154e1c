"""The hyperparameters of the paper (arXiv:2305.17333), as options of `mezo train`.

    mezo train --paper table16 --task squad                  # the row for the method and the task
    mezo train --grid table16-mezo-generation --task squad   # the same row by its name

An option whose value is a list is an axis. E.4 and E.6 are sections of the appendix: the grids of
head tuning and of training on F1. docs/paper.md says what of the paper has no grid, and why.
"""

from dataclasses import dataclass
from typing import Any

from mezo.errors import InputError
from mezo.models.adapters import QUERY_VALUE

Grid = dict[str, Any]
_ROBERTA, _OPT = "FacebookAI/roberta-large", "facebook/opt-13b"
_SIX = ("sst2", "sst5", "snli", "mnli", "rte", "trec")
_ABLATED = ("sst2", "snli", "trec")
TABLES = {  # table -> the model of its results, and its tasks
    "table4": (_ROBERTA, _ABLATED),  # the grid of the ablations in Appendices A and B
    "table6": (_ROBERTA, _ABLATED),  # n-SPSA, with n constant or growing
    "table7": (_ROBERTA, _SIX),  # MeZO-Adam
    "table8": (_ROBERTA, _ABLATED),  # variance modified, by norms of gradients
    "table9": (_ROBERTA, _ABLATED),  # variance modified, by norms of weights
    "table10": (_ROBERTA, _ABLATED),  # expectation modified, by norms of gradients
    "table15": (_ROBERTA, _SIX),
    "table16": (
        _OPT,
        ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop"),
    ),
}
GENERATION = ("squad", "drop")  # Table 16 has rates of their own for them
HEAD_TUNED = ("copa", "record", "squad", "drop")  # E.4; the others are probed
FEW = 128  # examples a label: below is the table's k = 16, above its k = 512

# Tables 15 and 16: r = 8, alpha = 16; E.5: on queries and values
_LORA = {
    "use_peft": True,
    "peft_type": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_modules": QUERY_VALUE,
}
_PREFIX = {"use_peft": True, "peft_type": "prefix", "num_virtual_tokens": 5}
_TENTHS = {"eval_steps": 0.1, "save_steps": 0.1}
_MASKED = _TENTHS | {  # Table 15: RoBERTa-large, k = 16 and 512; validated every tenth of the steps
    "method": "mezo",
    "per_device_train_batch_size": 64,
    "max_steps": 100_000,
    "lr_scheduler_type": "constant",
}
_MASKED_FT = _TENTHS | {"method": "adam", "max_steps": 1000, "lr_scheduler_type": "linear"}
_MASKED_SGD = _MASKED_FT | {"optim": "sgd", "learning_rate": [1e-4, 5e-4, 1e-3, 5e-3, 1e-2]}
_MASKED_ADAM = _MASKED_FT | {"learning_rate": [1e-5, 3e-5, 5e-5]}
_ABLATION = _MASKED | {  # Table 4, and Appendix A: 10,000 forward passes
    "per_device_train_batch_size": [16, 64],
    "learning_rate": [1e-5, 1e-6, 1e-7],
    "mezo_eps": [1e-3, 1e-5],
    "weight_decay": [0.0, 0.1],
    "max_steps": 5_000,
}
_SCALED = _ABLATION | {"scale_lr_with_samples": True}  # Table 6: the rate grows with n
_CAUSAL = {  # Table 16: OPT, 1,000 training examples; validated every fifth of the steps
    "method": "mezo",
    "per_device_train_batch_size": 16,
    "max_steps": 20_000,
    "lr_scheduler_type": "constant",
    "eval_steps": 0.2,
    "save_steps": 0.2,
    "num_train": 1000,
    "num_test": 1000,
    "split_seed": 0,  # mezo.sh of the published code
}
_CAUSAL_FT = _CAUSAL | {
    "method": "adam",
    "per_device_train_batch_size": 8,
    "max_steps": -1,
    "num_train_epochs": 5,
    "lr_scheduler_type": "linear",
}
GRIDS: dict[str, Grid] = {
    "table4-mezo": _ABLATION,
    # 10,000 forward passes: n from 1 to 4 is 2.5 at the mean, and n from 1 to 16 is 8.5
    "table6-n4": _SCALED | {"num_samples": 4, "max_steps": 1250},
    "table6-n4-linear": _SCALED | {"num_samples_end": 4, "max_steps": 2000},
    "table6-n16": _SCALED | {"num_samples": 16, "max_steps": 312},
    "table6-n16-linear": _SCALED | {"num_samples_end": 16, "max_steps": 588},
    "table7-mezo-adam": _MASKED
    | {"rule": "adam", "learning_rate": [1e-6, 1e-5, 1e-4, 5e-4, 1e-3], "mezo_eps": 1e-3},
    "table8-mezo": _ABLATION | {"modified": "variance", "modified_norms": "gradients"},
    "table9-mezo": _ABLATION | {"modified": "variance", "modified_norms": "parameters"},
    "table10-mezo": _ABLATION | {"modified": "expectation", "modified_norms": "gradients"},
    "table15-mezo": _MASKED | {"learning_rate": [1e-7, 1e-6, 1e-5], "mezo_eps": 1e-3},
    "table15-mezo-prefix": _MASKED
    | _PREFIX
    | {"learning_rate": [1e-2, 5e-3, 1e-3], "mezo_eps": 1e-1},
    "table15-mezo-lora": _MASKED
    | _LORA
    | {"learning_rate": [1e-5, 5e-5, 1e-4], "mezo_eps": 1e-3, "weight_decay": 0.1},
    "table15-ft-k16": _MASKED_ADAM | {"per_device_train_batch_size": [2, 4, 8]},
    "table15-ft-k512": _MASKED_ADAM | {"per_device_train_batch_size": [8, 16, 32]},
    "table15-sgd-k16": _MASKED_SGD | {"per_device_train_batch_size": [2, 4, 8]},
    "table15-sgd-k512": _MASKED_SGD | {"per_device_train_batch_size": [8, 16, 32]},
    "table15-ft-prefix": _MASKED_FT
    | _PREFIX
    | {"learning_rate": [1e-2, 3e-2, 5e-2], "per_device_train_batch_size": [8, 16, 32]},
    "table15-ft-lora": _MASKED_FT
    | _LORA
    | {"learning_rate": [1e-4, 3e-4, 5e-4], "per_device_train_batch_size": [4, 8, 16]},
    "table16-mezo": _CAUSAL | {"learning_rate": [1e-6, 1e-7], "mezo_eps": 1e-3},
    "table16-mezo-generation": _CAUSAL | {"learning_rate": [1e-6, 5e-7, 1e-7], "mezo_eps": 1e-3},
    "table16-mezo-prefix": _CAUSAL | _PREFIX | {"learning_rate": [1e-2, 1e-3], "mezo_eps": 1e-1},
    "table16-mezo-prefix-generation": _CAUSAL
    | _PREFIX
    | {"learning_rate": [5e-2, 1e-2, 5e-3], "mezo_eps": 1e-1},
    "table16-mezo-lora": _CAUSAL | _LORA | {"learning_rate": [1e-4, 5e-5], "mezo_eps": 1e-2},
    "table16-mezo-lora-generation": _CAUSAL
    | _LORA
    | {"learning_rate": [1e-4, 5e-5, 1e-5], "mezo_eps": 1e-2},
    "table16-ft": _CAUSAL_FT | {"learning_rate": [1e-5, 5e-5, 8e-5]},
    "e4-head": _CAUSAL_FT | {"trainable": "head", "learning_rate": [1e-4, 5e-4]},
    "e6-f1": _CAUSAL | {"objective": "f1", "learning_rate": [1e-6, 5e-6, 1e-5], "mezo_eps": 1e-3},
    "e6-f1-prefix": _CAUSAL
    | _PREFIX
    | {"objective": "f1", "learning_rate": [1e-1, 5e-2, 1e-2], "mezo_eps": 1e-1},
}


@dataclass(frozen=True)
class Asked:
    """The options of `mezo train` by which the rows of a table differ.

    `part` is what is trained: "" for all weights, "lora", "prefix" or "head". `k` is the number of
    examples per label.
    """

    task: str
    method: str = "mezo"
    part: str = ""
    k: int | None = None
    rule: str = "sgd"
    optim: str = "adamw"
    objective: str | None = None
    num_samples: int = 1
    num_samples_end: int | None = None


def name_of(table: str, asked: Asked) -> str:
    """Return the name in GRIDS of a table's row.

    Raises InputError for a table that the paper does not have or that has no hyperparameters, and
    for a task, method or part without a row.
    """
    if table not in TABLES:
        raise InputError(f"paper {table!r} is unknown: {', '.join(TABLES)}")
    model, known = TABLES[table]
    if asked.task not in known:
        raise InputError(
            f"{table} has the tasks {', '.join(known)}, not {asked.task}; "
            f"--grid {next(name for name in GRIDS if name.startswith(table))} takes any task"
        )
    if model == _ROBERTA and asked.k is None:
        raise InputError(f"{table} trains on k examples per label: add --k 16 or --k 512")
    if asked.method not in ("mezo", "adam"):
        raise InputError(f"{table} has no hyperparameters of the method {asked.method}")
    rows = {"table15": _row_of_15, "table16": _row_of_16}.get(table)
    name = rows(asked) if rows else _row_of_mezo(table, asked)
    if name not in GRIDS:
        raise InputError(f"{table} has no row {name}: give --learning_rate, and leave out --paper")
    return name


def _row_of_mezo(table: str, asked: Asked) -> str:
    """Return the row of a table of MeZO with all weights."""
    if asked.method != "mezo" or asked.part:
        return "-".join(word for word in (table, asked.method, asked.part) if word)
    if table == "table6":
        end = asked.num_samples_end
        return f"table6-n{end}-linear" if end else f"table6-n{asked.num_samples}"
    return "table7-mezo-adam" if table == "table7" else f"{table}-mezo"


def _row_of_15(asked: Asked) -> str:
    if asked.method == "mezo" and asked.rule == "adam" and not asked.part:
        return "table7-mezo-adam"
    name = f"table15-{_kind(asked)}" + (f"-{asked.part}" if asked.part else "")
    if name in ("table15-ft", "table15-sgd"):
        name += "-k16" if (asked.k or 0) < FEW else "-k512"
    return name


def _row_of_16(asked: Asked) -> str:
    part = f"-{asked.part}" if asked.part else ""
    if asked.method == "adam" and asked.part == "head":
        return "e4-head" if asked.task in HEAD_TUNED else f"e4-head of {asked.task}"
    if asked.objective is not None:
        name = f"e6-{asked.objective}{part}"
        return name if asked.task == "squad" else f"{name} of {asked.task}"
    name = f"table16-{_kind(asked)}{part}"
    generates = asked.task in GENERATION and asked.method == "mezo"
    return f"{name}-generation" if generates else name


def _kind(asked: Asked) -> str:
    if asked.method == "mezo":
        return "mezo" if asked.rule == "sgd" else f"mezo-{asked.rule}"
    return "sgd" if asked.optim == "sgd" else "ft"


def on_task(name: str, num_dev: int) -> Grid:
    """Return the grid of that name for a task which validates on `num_dev` examples.

    OPT takes 500, and 100 for CB and COPA, which have too few training examples.
    """
    own = {"num_dev": num_dev} if "num_train" in GRIDS[name] else {}
    return GRIDS[name] | own
