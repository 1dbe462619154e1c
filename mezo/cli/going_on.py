"""`--resume_from_checkpoint`: a resumed run takes its options from its log.

Options given on the command line take precedence; trainers/changes.py refuses or names those that
differ. A log may say which data and numbers a run used, but never what to execute: rewards, user
rules, user estimators and trust_remote_code must be given again.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mezo.cli.parsing import Parser, say, words_of
from mezo.errors import InputError

NOT_TAKEN = {"trust_remote_code", "reward", "output_dir", "resume_from_checkpoint"}
# The options of transformers and TRL that decide how a run trains, but not where files go.
_TAKEN = """max_steps num_train_epochs per_device_train_batch_size per_device_eval_batch_size
gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps warmup_ratio weight_decay
adam_beta1 adam_beta2 adam_epsilon seed data_seed eval_strategy eval_steps save_strategy save_steps
save_total_limit logging_strategy logging_steps bf16 train_sampling_strategy dataloader_drop_last
load_best_model_at_end metric_for_best_model greater_is_better max_length packing packing_strategy
padding_free assistant_only_loss completion_only_loss beta loss_type label_smoothing
precompute_ref_log_probs dataset_text_field truncation_mode"""
_KINDS = {"task": "task", "reward": "reward", "dataset_train_split": "text"}
_VERBS = {"task": "mezo train", "reward": "mezo train --reward", "text": "mezo sft or dpo"}


def with_log(words: Sequence[str], kinds: Sequence[Any], kind: str) -> list[str]:
    """Return `words` preceded by the options that the log of the resumed run holds.

    Args:
        words: All options, including the output folder.
        kinds: The dataclasses of options that the command takes.
        kind: What the command trains on: "task", "reward" or "text".

    Raises InputError if the log belongs to another kind of run.
    """
    parser = Parser(prog="mezo", add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default="")
    parser.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint", default="false")
    asked, _ = parser.parse_known_args(list(words))
    if not asked.output_dir or asked.resume_from_checkpoint.lower() == "false":
        return list(words)
    from mezo import trajectory  # imports torch

    log = Path(asked.output_dir, "run.mezo")
    if not (log.exists() and trajectory.begun(log)):
        return list(words)
    config = trajectory.read(log, recover=True).header["config"]
    of = next((name for key, name in _KINDS.items() if key in config), None)
    if of is None:
        return list(words)
    if of != kind:
        raise InputError(f"{log} is the log of a run of {_VERBS[of]}: resume with that command")
    taken = _options_of(config, kinds)
    say(f"resuming the run of {log}; its options apply where the command gives none")
    spelt = {name: str(x) if isinstance(x, bool) else x for name, x in taken.items()}
    return [*words_of(spelt), *words]


def _options_of(config: dict[str, Any], kinds: Sequence[Any]) -> dict[str, Any]:
    own = {name for one in kinds for base in one.__mro__[:-1] for name in _declared(base)}
    known = {f.name for one in kinds for f in fields(one)} & (own | set(_TAKEN.split()))
    scalar = (str, int, float)
    code = {name for name in ("rule", "estimator") if ":" in str(config.get(name))}  # module:Name
    good = {name: x for name, x in config.items() if name in known - NOT_TAKEN - code}
    return {
        name: x
        for name, x in good.items()
        if isinstance(x, scalar) or (isinstance(x, list) and all(isinstance(y, scalar) for y in x))
    }


def _declared(kind: Any) -> set[str]:
    """Return the options that a class of this package declares."""
    ours = kind.__module__.startswith("mezo.")
    return set(vars(kind).get("__annotations__", ())) if ours else set()
