"""Settings of a Trainer, and kinds of Trainers, that MeZO cannot honour: refused by name."""

import logging

from transformers import Trainer

from mezo.compatibility import checkpointing_option, checkpoints_activations
from mezo.errors import InputError
from mezo.mezo import MeZO
from mezo.trainers.config import MeZOConfig


def check(trainer: Trainer) -> None:
    """InputError for settings that MeZO cannot honour; a warning for those without effect."""
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
    }
    for option, (given, instead) in refused.items():
        if given:
            raise InputError(f"{option} does not go with MeZO: {instead}")
    logger = logging.getLogger("mezo")
    if checkpoints_activations(args):  # TRL's default
        option = checkpointing_option(args)
        logger.warning("%s has no effect: no activations are kept anyway", option)
    if not isinstance(args, MeZOConfig) and args.learning_rate == type(args).learning_rate:
        message = "learning_rate %s is the default for Adam; MeZO wants 1e-6 for all weights"
        logger.warning(message, args.learning_rate)
