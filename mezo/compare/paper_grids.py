"""The grids of the paper's Tables 15 and 16 (arXiv:2305.17333), as options of `mezo train`.

    mezo train --paper table16 --task squad                  # the row for the method and the task
    mezo train --grid table16-mezo-generation --task squad   # the same row by its name

An option whose value is a list is an axis. What a table of the paper has and this module lacks is
in MISSING, with the reason; asking for it is refused in these words.
"""

from typing import Any

from mezo.errors import InputError
from mezo.models.adapters import QUERY_VALUE

Grid = dict[str, Any]
TABLES = {  # table -> the model of its results, and its tasks
    "table15": ("FacebookAI/roberta-large", ("sst2", "sst5", "snli", "mnli", "rte", "trec")),
    "table16": (
        "facebook/opt-13b",
        ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop"),
    ),
}
GENERATION = ("squad", "drop")  # Table 16 has rates of their own for them
FEW = 128  # examples a label: below is the table's k = 16, above its k = 512

# Tables 15 and 16: r = 8, alpha = 16; the published code puts factors on queries and values
_LORA = {
    "use_peft": True,
    "peft_type": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_modules": QUERY_VALUE,
}
_PREFIX = {"use_peft": True, "peft_type": "prefix", "num_virtual_tokens": 5, "mezo_eps": 1e-1}
_MASKED = {  # Table 15: RoBERTa-large, k = 16 and 512; validated every tenth of the steps
    "method": "mezo",
    "per_device_train_batch_size": 64,
    "max_steps": 100_000,
    "lr_scheduler_type": "constant",
    "eval_steps": 0.1,
    "save_steps": 0.1,
}
_MASKED_FT = {  # Table 15, FT: linear decay, the scheduler of the published code's finetune.sh
    "method": "adam",
    "learning_rate": [1e-5, 3e-5, 5e-5],
    "max_steps": 1000,
    "lr_scheduler_type": "linear",
    "eval_steps": 0.1,
    "save_steps": 0.1,
}
_CAUSAL = {  # Table 16: OPT, 1,000 training examples; validated every fifth of the steps
    "method": "mezo",
    "per_device_train_batch_size": 16,
    "max_steps": 20_000,
    "lr_scheduler_type": "constant",
    "eval_steps": 0.2,
    "save_steps": 0.2,
    "num_train": 1000,
    "num_test": 1000,
    "split_seed": 0,  # mezo.sh
}
GRIDS: dict[str, Grid] = {
    "table15-mezo": _MASKED | {"learning_rate": [1e-7, 1e-6, 1e-5], "mezo_eps": 1e-3},
    "table15-mezo-prefix": _MASKED | _PREFIX | {"learning_rate": [1e-2, 5e-3, 1e-3]},
    "table15-mezo-lora": _MASKED
    | _LORA
    | {"learning_rate": [1e-5, 5e-5, 1e-4], "mezo_eps": 1e-3, "weight_decay": 0.1},
    "table15-ft-k16": _MASKED_FT | {"per_device_train_batch_size": [2, 4, 8]},
    "table15-ft-k512": _MASKED_FT | {"per_device_train_batch_size": [8, 16, 32]},
    "table16-mezo": _CAUSAL | {"learning_rate": [1e-6, 1e-7], "mezo_eps": 1e-3},
    "table16-mezo-generation": _CAUSAL
    | {"learning_rate": [1e-6, 5e-7, 1e-7], "mezo_eps": 1e-3},  # SQuAD and DROP
    "table16-mezo-prefix": _CAUSAL | _PREFIX | {"learning_rate": [1e-2, 1e-3]},
    "table16-mezo-lora": _CAUSAL | _LORA | {"learning_rate": [1e-4, 5e-5], "mezo_eps": 1e-2},
    "table16-ft": _CAUSAL
    | {
        "method": "adam",
        "learning_rate": [1e-5, 5e-5, 8e-5],
        "per_device_train_batch_size": 8,
        "max_steps": -1,
        "num_train_epochs": 5,
        "lr_scheduler_type": "linear",
    },
}
_UNSEEN = "its values are not recorded in this package"
MISSING = {  # what the paper has and GRIDS has not
    "table15-ft-prefix": _UNSEEN,
    "table15-ft-lora": _UNSEEN,
    "table15-sgd": _UNSEEN,
    "table16-mezo-prefix-generation": _UNSEEN,
    "table16-mezo-lora-generation": _UNSEEN,
    "table16-ft-prefix": _UNSEEN,
    "table16-ft-lora": _UNSEEN,
}


def name_of(table: str, method: str, part: str, task: str, k: int | None) -> str:
    """Return the name in GRIDS of a table's row for a method and a task.

    Args:
        table: "table15" or "table16".
        method: of `mezo train`: "mezo" or "adam".
        part: what is trained: "" for all weights, "lora", "prefix".
        task: its name.
        k: examples a label, which Table 15's fine-tuning depends on.

    Raises InputError for a table, method, task or k that the paper does not have, and for a row
    that is in MISSING.
    """
    if table not in TABLES:
        raise InputError(f"paper {table!r} is unknown: {' or '.join(TABLES)}")
    if task not in TABLES[table][1]:
        raise InputError(
            f"{table} has the tasks {', '.join(TABLES[table][1])}, not {task}; "
            f"--grid {table}-mezo takes any task"
        )
    if table == "table15" and k is None:
        raise InputError("table15 trains on k examples per label: add --k 16 or --k 512")
    if method not in ("mezo", "adam"):
        raise InputError(f"{table} has no hyperparameters of the method {method}")
    name = f"{table}-{'ft' if method == 'adam' else 'mezo'}" + (f"-{part}" if part else "")
    if table == "table16" and task in GENERATION and method == "mezo":
        name += "-generation"
    if name == "table15-ft":
        name += "-k16" if (k or 0) < FEW else "-k512"
    if name not in GRIDS:
        reason = MISSING.get(name, f"{table} has no such row")
        raise InputError(f"--paper {table} has no grid {name}: {reason}; give --learning_rate")
    return name


def on_task(name: str, num_dev: int) -> Grid:
    """Return the grid of that name for a task which validates on `num_dev` examples.

    Table 16 takes 500, and 100 for CB and COPA, which have too few training examples.
    """
    own = {"num_dev": num_dev} if name.startswith("table16") else {}
    return GRIDS[name] | own
