"""The training methods of `mezo train`; every method returns the same result fields.

    mezo        trains all weights, a part of them, or an adapter with forward passes alone
    adam        trains the same weights with backpropagation
    lp          linear probing: logistic regression on the frozen model's features
    zero-shot   evaluates the model as it is
    icl         does so with --demonstrations training examples before each question

The fields are test, dev, steps, forward_passes (of one batch each; a backward pass counts as two),
stored_bytes (what must be kept besides the base model: a run log, weights or a probe) and
peak_memory_above_model. Training adds peak_memory_of_steps, which excludes evaluation and saving,
and curve, with one row per evaluation on the dev examples.
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch

from mezo.compatibility import checkpointing_option, checkpoints_activations
from mezo.errors import InputError
from mezo.estimators import passes_of
from mezo.evaluation.linear_probe import linear_probe, zero_shot
from mezo.memory.measured import PeakMemory
from mezo.models import adapters as tuners
from mezo.models.arguments import ModelArguments
from mezo.objectives import Form
from mezo.objectives.progress import SILENT, Progress
from mezo.tasks import METRICS, Example

if TYPE_CHECKING:
    from mezo.runs.arguments import TrainArguments

WITHOUT_TRAINING = {"lp": linear_probe, "zero-shot": zero_shot, "icl": zero_shot}
METHODS = ("mezo", "adam", *WITHOUT_TRAINING)


def check(args: "TrainArguments", model_args: ModelArguments) -> None:
    """Raise InputError for an unknown method or for options that it cannot be combined with."""
    if args.method not in METHODS:
        near = get_close_matches(args.method, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METHODS)}"
        raise InputError(f"method {args.method!r} is unknown; {hint}")
    if args.method in WITHOUT_TRAINING and model_args.use_peft:
        raise InputError(f"method {args.method} trains no adapter: leave out --use_peft")
    if args.objective is not None and args.method != "mezo":
        raise InputError(f"objective {args.objective} has no gradient, which {args.method} needs")
    if args.label_smoothing_factor:
        raise InputError("label_smoothing_factor has no effect on a task, whose loss is its own")
    if args.offload and args.method != "mezo":
        raise InputError(f"offload is for the method mezo, not for {args.method}")
    prompt = tuners.is_prompt(model_args)
    if model_args.freeze_layers and prompt:
        raise InputError(f"freeze_layers cannot be combined with peft_type {model_args.peft_type}")
    if prompt and args.method == "adam" and checkpoints_activations(args):
        raise InputError(
            f"{checkpointing_option(args)} cannot be combined with peft_type "
            f"{model_args.peft_type}: "
            "it drops the cache that holds the prefix"
        )


def check_adapter(model_args: ModelArguments) -> None:
    """Raise InputError for a peft_type without --use_peft, which would train all weights."""
    if not model_args.use_peft and model_args.peft_type != ModelArguments.peft_type:
        raise InputError(f"peft_type {model_args.peft_type} needs --use_peft")


def without_training(
    model: torch.nn.Module,
    form: Form,
    splits: dict[str, list[Example]],
    args: "TrainArguments",
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Return the result fields of a method that changes no weights."""
    with PeakMemory() as peak:
        size, folder = args.per_device_eval_batch_size, args.output_dir
        found = WITHOUT_TRAINING[args.method](model, form, splits, size, folder, progress)
    return {"steps": 0, "kept_step": 0, **found, "peak_memory_above_model": peak.bytes}


def curve_of(log_history: list[dict[str, float]], passes: int) -> list[dict[str, float]]:
    """Return one row per evaluation in the Trainer's log.

    A row has step, forward_passes, dev_loss, dev_accuracy and the task's metric, if that is another
    one. A task that generates text has only the loss. Steps that a resumed run repeated count once.
    """
    rows: dict[int, dict[str, float]] = {}
    for entry in log_history:
        if "eval_loss" in entry:
            step = int(entry["step"])
            rows[step] = {"step": step, "forward_passes": step * passes}
            given = [name for name in ("loss", *METRICS) if f"eval_{name}" in entry]
            rows[step] |= {f"dev_{name}": entry[f"eval_{name}"] for name in given}
    return [rows[step] for step in sorted(rows)]


def passes_of_a_step(args: Any) -> int:
    """Return the forward passes of a step, each over one batch; a backward pass counts as two."""
    again = checkpoints_activations(args)  # the forward pass runs a second time
    if getattr(args, "method", "mezo") != "mezo":  # SFT and DPO have no other
        return (3 + again) * args.gradient_accumulation_steps
    share = args.num_samples if args.fresh_batches else 1  # of the batch, for each direction
    each = passes_of(args.estimator, args.num_samples)
    return each * args.gradient_accumulation_steps // share
