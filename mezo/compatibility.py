"""Names that other packages changed between the oldest and the newest release that we support.

Every difference lives here, with the release that brought it, so that the rest of the package is
written against one interface and a floor in pyproject.toml can be raised by deleting lines here.
The module imports nothing but torch: it looks at objects that its callers hold already.
"""

from copy import copy
from typing import Any

import torch

__all__ = [
    "CACHE_ARGUMENTS",
    "TO_DISK",
    "accelerator",
    "cache_of",
    "checkpointing_option",
    "checkpoints_activations",
    "delete_adapter",
    "enable_checkpointing",
    "is_sharded_at_load",
    "loss_is_scaled",
    "unpacked",
]

# What a model's keys and values are called among its arguments: transformers 5.24 renamed
# `past_key_values` to `cache`, and accepts the old name with a warning; peft 0.21 still passes it.
CACHE_ARGUMENTS = ("past_key_values", "cache")

# A device map that leaves every weight in its file. transformers says where each one is by hooks;
# 5.6 attaches them only if a map names two devices (5.17 always does), hence the second entry,
# which names no module.
TO_DISK = {"": "disk", "-": "cpu"}


def accelerator() -> torch.device | None:
    """Return the device that computes beside the CPU, or None where there is none.

    A build of torch 2.6 for a device raises where there is none; newer builds may name one.
    """
    available = torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() if available else None


def cache_of(output: Any) -> Any:
    """Return the keys and values in a model's output, under the name that its release uses."""
    return output["cache" if "cache" in output else "past_key_values"]


def checkpointing_option(arguments: Any) -> str:
    """Return the name of activation checkpointing among TrainingArguments (a class or its object).

    transformers 5.23 renamed `gradient_checkpointing` to `activation_checkpointing`.
    """
    new = "activation_checkpointing"
    return new if hasattr(arguments, new) else "gradient_checkpointing"


def checkpoints_activations(arguments: Any) -> bool:
    """Return whether TrainingArguments ask for activation checkpointing."""
    return bool(getattr(arguments, checkpointing_option(arguments)))


def delete_adapter(model: Any, name: str) -> None:
    """Delete an adapter from a PeftModel.

    peft 0.19 hands this to the base model, which fails for prompts and prefixes: those lie in the
    PeftModel itself.
    """
    prompts = getattr(model, "prompt_encoder", {})
    if name not in prompts:
        model.delete_adapter(name)
        return
    for owner in (model.peft_config, prompts, model.prompt_tokens):
        del owner[name]


def enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    """Make a transformers model checkpoint its activations (the method was renamed in 5.23)."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(options)


def loss_is_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Return whether the trainer's loss is divided by the size of the whole accumulated batch.

    This is the rule of `Trainer.training_step`. A trainer states an exception of its own in
    `loss_is_scaled_for_ga` since transformers 5.19; no older release reads it.
    """
    stated = getattr(trainer, "loss_is_scaled_for_ga", None)
    if stated is not None:
        return stated
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return counted or trainer.compute_loss_func is not None


def is_sharded_at_load(trainer: Any) -> bool:
    """Return whether from_pretrained sharded the trainer's model, which it can since 5.19."""
    return bool(getattr(trainer, "is_distributed_loading_by_transformers", False))


def unpacked(p: torch.Tensor) -> torch.Tensor:
    """Return a 4-bit weight's bytes in the order of its file; return any other tensor as it is.

    On processors with AVX-512, bitsandbytes 0.49 and newer reorders a weight in the first forward
    pass. The copy here leaves the weight alone.
    """
    state: Any = getattr(p, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return p
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    return _convert_weight_packed_for_cpu_inverse(p.data, copy(state))[0]
