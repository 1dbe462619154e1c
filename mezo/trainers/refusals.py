"""Refuse, by name, settings of a Trainer and kinds of Trainers that MeZO cannot honour."""

import logging
from typing import Any

from transformers import Trainer

from mezo.compatibility import checkpointing_option
from mezo.errors import InputError
from mezo.mezo import MeZO
from mezo.trainers.config import MeZOConfig, check_modified


def check(trainer: Trainer) -> None:
    """Raise InputError for settings that MeZO cannot honour, and warn of those without effect."""
    args, mezo = trainer.args, (type(None), MeZO)
    refused = {
        "fp16=True": (args.fp16, "it scales gradients, and there are none: use bf16=True"),
        "deepspeed": (trainer.is_deepspeed_enabled, "use torchrun alone"),
        "fsdp": (
            args.fsdp or trainer.is_fsdp_enabled,
            "load the model with distributed_config=DistributedConfig(fsdp_size=...)",
        ),
        "parallelism_config": (args.parallelism_config, "use torchrun alone"),
        "DataParallel": (args.n_gpu > 1, f"use torchrun --nproc_per_node={args.n_gpu}, or one GPU"),
        "optimizer_cls_and_kwargs": (trainer.optimizer_cls_and_kwargs, "the optimizer is MeZO"),
        "optimizers": (not isinstance(trainer.optimizer, mezo), "the optimizer must be a MeZO"),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha is not None,
            "its noise is added in train mode, and both passes run in eval mode",
        ),
    }
    for option, (given, instead) in refused.items():
        if given:
            raise InputError(f"{option} cannot be combined with MeZO: {instead}")
    if isinstance(args, MeZOConfig):
        check_modified(args)
    if args.optim != type(args).optim and args.optim not in _DEFAULT_OPTIM:
        name = getattr(args.optim, "value", args.optim)
        raise InputError(f"optim {name} cannot be combined with MeZO: the optimizer is MeZO")
    logger = logging.getLogger("mezo")
    option = checkpointing_option(type(args))
    if getattr(args, option):  # TRL's default
        logger.warning("%s has no effect: no activations are kept anyway", option)
    if args.max_grad_norm != type(args).max_grad_norm:
        logger.warning("max_grad_norm has no effect: there is no gradient; clip is MeZO's limit")
    if not isinstance(args, MeZOConfig) and args.learning_rate == type(args).learning_rate:
        message = "learning_rate %s is the default for Adam; MeZO wants 1e-6 for all weights"
        logger.warning(message, args.learning_rate)


_DEFAULT_OPTIM = ("adamw_torch", "adamw_torch_fused")  # transformers' own, which nobody asked for
# TRL's that wrap training_step in a context for activations, and change nothing that MeZO replaces.
_WRAPPING = {"SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer"}


def check_kind(kind: type) -> None:
    """Raise InputError for a Trainer class with its own training step, which MeZO would replace.

    This is checked before the class's own __init__, which may load models or ask for arguments.
    """
    for base in kind.__mro__:
        if base is Trainer:
            return
        ours = base.__module__.startswith("mezo.") or base.__name__ in _WRAPPING
        if ours or not issubclass(base, Trainer):
            continue
        if "_prepare_inputs" in vars(base):
            raise InputError(
                f"{base.__name__} generates in _prepare_inputs, for the gradients of what it "
                "generates: MeZOPolicyTrainer trains on reward functions by forward passes"
            )
        if "training_step" in vars(base) and not _is_hosted(kind, base):
            raise InputError(
                f"{base.__name__} has a training_step of its own, which MeZO would take the place "
                "of: override compute_loss instead; MeZOPolicyTrainer is for generated text"
            )


def freeze_still_(groups: list[dict[str, Any]]) -> list[int]:
    """Freeze the parameters of groups whose rate is 0 while others' is not; return their numbers.

    Other optimizers leave such weights as they are. MeZO would perturb them with all others, which
    adds noise to its estimates, and in place the walk would round them.
    """
    still = [i for i, group in enumerate(groups) if float(group["lr"]) == 0]
    if len(still) == len(groups):  # no group is held back from the others
        return []
    for i in still:
        for _, p in groups[i]["params"]:
            p.requires_grad_(False)
        logging.getLogger("mezo").warning(
            "parameter group %d has a learning rate of 0: its %d tensors are frozen "
            "(requires_grad is False from here on), as MeZO would perturb them with the others",
            *(i, len(groups[i]["params"])),
        )
    return still


def check_still(optimizer: MeZO, still: list[int]) -> None:
    """Raise InputError if a group that `freeze_still_` has frozen was given a rate since."""
    for i in still:
        if rate := float(optimizer.param_groups[i]["lr"]):
            raise InputError(
                f"parameter group {i} began with a learning rate of 0, so that its tensors were "
                f"frozen, and now has {rate:g}: begin another run to train them"
            )


def _is_hosted(kind: type, base: type) -> bool:
    """Return whether `base` precedes the mixin, so that its own training_step is called."""
    names = [one.__name__ for one in kind.__mro__]
    return names.index(base.__name__) < names.index("MeZOMixin")
