"""Which options may change when a run is resumed, with or without a checkpoint.

Options that do not affect the weights (steps, saving, evaluating, logging, where things run) may
change freely. Those in HONOURED may change, too, and take effect from the resumed step on; the log
records the values in force at every step, and a warning names them. Every other option that differs
is refused by name: with another batch size, seed, rule or data set it would be another run.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from mezo import trajectory
from mezo.errors import InputError
from mezo.options.option import Resume
from mezo.options.table import OPTIONS

_MAY_CHANGE = [option for option in OPTIONS if option.resume is Resume.HONOURED]
_SETTINGS = ("initial_lr", *(option.name for option in _MAY_CHANGE if option.argument))
HONOURED = (*(option.flag for option in _MAY_CHANGE), "warmup_steps", "warmup_ratio")
_FREE_OPTIONS = {option.flag for option in OPTIONS if option.resume is Resume.FREE}
_FREE = [  # of transformers' and TRL's options, and of the command line's
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "do_train",
    "do_eval",
    "do_predict",
    "max_steps",
    "num_train_epochs",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "per_device_eval_batch_size",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "batch_eval_metrics",
    "prediction_loss_only",
    "include_for_metrics",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "report_to",
    "run_name",
    "project",
    "disable_tqdm",
    "push_to_hub",
    "use_cpu",
    "local_rank",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "ignore_data_skip",
    "restore_callback_states_from_checkpoint",
    "skip_memory_metrics",
    "include_num_input_tokens_seen",
    "include_tokens_per_second",
    "enable_jit_checkpoint",
    "torch_empty_cache_steps",
    "auto_find_batch_size",
    "engine",
    "engine_options",
    "stop_forgotten",
    "held_out_file",
    "max_grad_norm",
    "optim",
    "optim_args",
    "gradient_checkpointing",
    "activation_checkpointing",
    "debug",
    "remove_unused_columns",
    "label_names",
    "trust_remote_code",
    "test_file",
    "num_test",
    "reward_timeout",
    "dataset_num_proc",
]
_FREE_PREFIXES = ("logging_", "log_", "save_", "hub_", "ddp_", "trackio_", "jit_mode")


def is_free(name: str) -> bool:
    """Return whether an option does not affect the weights of a run."""
    return name in _FREE or name in _FREE_OPTIONS or name.startswith(_FREE_PREFIXES)


def check(had: Mapping[str, Any], now: Mapping[str, Any], args: Any, told: str) -> list[str]:
    """Return a line for each option in HONOURED whose value has changed.

    Args:
        had: The options in the run's log that differ from their defaults.
        now: The same options of the resumed run.
        args: The dataclass with the defaults of options that `had` or `now` lacks.
        told: The name of the run in messages.

    Raises InputError that names the first option that differs and must not. A log whose options are
    of another kind, such as a user's own `run_config`, is not checked.
    """
    if not {"seed", "learning_rate"} <= had.keys() or not {"seed", "learning_rate"} <= now.keys():
        return []
    defaults = defaults_of(args)
    lines = []
    for name in sorted(had.keys() | now.keys()):
        before, after = (_plain(options.get(name, defaults.get(name))) for options in (had, now))
        if before == after or is_free(name):
            continue
        plateau = now.get("lr_scheduler_type") == "reduce_lr_on_plateau"
        if name not in HONOURED or (plateau and name == "learning_rate"):
            raise InputError(
                f"{told} has {name} {before}, not {after}: leave it as it was to resume that run, "
                "or begin a new run in another --output_dir"
            )
        lines.append(f"{name} is {after} from here on; {told} had {before}")
    return lines


def check_log(log: Path, now: Mapping[str, Any], args: Any) -> None:
    """Raise InputError for options that contradict the run of `log`, if it has begun.

    Options of that run that this version of the package does not know are left out.
    """
    if trajectory.begun(log):
        had = trajectory.read(log, recover=True).header["config"]
        known = now.keys() | defaults_of(args).keys()
        had = {name: value for name, value in had.items() if name in known}
        check(had, now, args, f"the run of {log}")


def defaults_of(args: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass's options."""
    made = {f.name: f.default_factory() for f in fields(args) if f.default_factory is not MISSING}
    return made | {f.name: f.default for f in fields(args) if f.default is not MISSING}


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return the present values of the settings that may change, for each parameter group."""
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    return [{name: group.get(name) for name in _SETTINGS} for group in groups]


def reinstate_(optimizer: Any, scheduler: Any, settings: list[dict[str, Any]]) -> None:
    """Restore settings that loading a checkpoint overwrote; `settings` come from `settings_of`.

    The schedule continues at its place, with the learning rate that is given now.
    """
    groups = getattr(optimizer, "optimizer", optimizer).param_groups
    bases = getattr(scheduler, "base_lrs", None)
    for i, (group, given) in enumerate(zip(groups, settings, strict=True)):
        group |= {name: x for name, x in given.items() if name not in ("lr", "initial_lr")}
        if bases is None:  # reduce_lr_on_plateau: its rate is the result of the run so far
            continue
        before, base = group["initial_lr"], given["initial_lr"]
        if isinstance(scheduler, LambdaLR):
            group["lr"] = base * scheduler.lr_lambdas[i](scheduler.last_epoch)
        elif before != base:
            group["lr"] *= base / before
        group["initial_lr"] = bases[i] = base
    if bases is not None:
        scheduler._last_lr = [group["lr"] for group in groups]


def _plain(value: Any) -> Any:
    """Return a value as a log holds it, after a round trip through JSON."""
    value = value.value if isinstance(value, Enum) else value
    return json.loads(json.dumps(value, default=str))
