"""Where a Trainer's weights are: on its device or, with `offload`, on the CPU or in a file.

Without offload there is nothing to do. With it, `Placement.open()` is entered around training,
evaluation and whatever else computes with the model; within it, blocks of weights are copied to the
device as they are needed (offload/context.py).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from mezo.compatibility import accelerator
from mezo.errors import InputError
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.offload.context import Offload, check_settings
from mezo.trainers.config import MeZOConfig, rounding_of, rule_of


class Placement:
    """The placement of a Trainer's model and of the reference model that a DPO trainer also has."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self.offloads = getattr(trainer.args, "offload", False)  # any TrainingArguments will do
        self._own: Offload | None = None  # created once, so that its file is written once
        self._opened = False
        self._unwritten = False  # whether updates are in the run log alone

    @contextmanager
    def open(self) -> Iterator[None]:
        """Compute with the model on the device within the context, which may be nested."""
        if not self.offloads or self._opened:
            yield
            return
        if self._unwritten:
            raise InputError(
                "with offload_write_every=0 the tuned weights are in the run log alone: train, "
                "evaluate and predict within one `with trainer.offloaded():`, or replay the log"
            )
        with ExitStack() as stack:
            own = stack.enter_context(self.own())
            if (reference := self._trainer.ref_model) is not None:
                device = self._trainer.args.device  # it is only read
                stack.enter_context(Offload(reference, device=device, write_every=0))
            self._opened = True
            try:
                yield
            finally:
                self._opened = False
                self._unwritten = not own.write_every and own.optimizer is not None

    def own(self) -> Offload:
        """Return the model's Offload. Raises InputError for a model or options it cannot handle."""
        args = self._trainer.args
        if self._own is None:
            self._own = Offload(
                self._trainer.model,
                device=args.device,
                folder=args.offload_folder,
                write_every=args.offload_write_every,
            )
        return self._own

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Enter `open`, and let reads of a weight in this thread get it from the device."""
        with self.open(), ExitStack() as stack:
            if self._own is not None:
                stack.enter_context(self._own.reading())
            yield

    def take(self, optimizer: Any) -> None:
        """Begin training with this optimizer, whose settings are final now."""
        if self._opened and self._own is not None:
            self._own.take(optimizer)

    def check_saved(self) -> None:
        """Raise InputError if the model's weights are not the tuned ones and so cannot be saved."""
        if self._unwritten or (self._own and self._own.optimizer and not self._own.write_every):
            raise InputError(
                "offload_write_every=0 leaves the tuned weights in the run log alone: "
                "`mezo replay --by_tensor` makes the model"
            )

    def flush(self) -> None:
        """Write all updates back, so that no weight is on the device."""
        if self._opened and self._own is not None:
            self._own.flush()


def place(model: torch.nn.Module, device: Any = None) -> None:
    """Move a model to `device` or the accelerator, unless loading has already placed it."""
    target = accelerator() if device is None else torch.device(device)
    placed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    if target is not None and not placed:
        model.to(target)


def load(model_args: ModelArguments, args: MeZOConfig) -> tuple[Any, Any]:
    """Load the model and tokenizer of a run; with `offload` no weight is read yet.

    Raises InputError if the output folder is the model's own folder.
    """
    folders = {Path(str(x)).resolve() for x in (model_args.model_name_or_path, args.output_dir)}
    if args.offload and len(folders) == 1:
        raise InputError(
            f"output_dir {args.output_dir} is the model's own folder, from which offload reads "
            "the weights while new ones are saved: choose another"
        )
    return models.load(model_args, args.seed, offload=args.offload, folder=args.offload_folder)


@contextmanager
def inference(model: torch.nn.Module, device: Any = None, offload: bool = True) -> Iterator[None]:
    """Compute with a model that is not trained, on `device` or the accelerator, in the context.

    With `offload` its weights stay where they are and are read block by block; nothing is moved,
    pinned or written. Without it they are moved to the device permanently.
    """
    if not offload:
        place(model, device)
        yield
        return
    with Offload(model, device=device, write_every=0) as there, there.reading():
        yield


def check(trainer: Any) -> None:
    """Raise InputError for arguments, a model or an optimizer that offload does not support."""
    args = trainer.args
    if not isinstance(args, MeZOConfig):
        return
    check_arguments(args)
    if not args.offload:
        return
    if trainer.model_init is not None:
        raise InputError("model_init cannot be combined with offload: give the model")
    half = any(p.element_size() == 2 for p in trainer.model.parameters() if p.requires_grad)
    check_settings(_settings(args) | {"rounding": rounding_of(args, trainer.model)}, half=half)
    trainer._placement.own()


def check_arguments(args: MeZOConfig) -> None:
    """Raise InputError for arguments that offload does not support, or that need offload."""
    if not args.offload:
        if args.offload_folder is not None or args.offload_write_every != 1:
            raise InputError("offload_folder and offload_write_every are for offload")
        return
    if not args.offload_write_every and (args.save_strategy != "no" or args.load_best_model_at_end):
        raise InputError(
            "offload_write_every 0 writes no weights, so that a checkpoint would hold the base "
            "model: set save_strategy no and load_best_model_at_end false; the run log is enough "
            "to resume"
        )
    refused = {
        "torch_compile": args.torch_compile,
        "fp16_full_eval": args.fp16_full_eval,
        "bf16_full_eval": args.bf16_full_eval,
        "sync_ref_model": getattr(args, "sync_ref_model", False),  # TRL's
        f"a run of {args.world_size} processes": args.world_size > 1,
    }
    for option, given in refused.items():
        if given:
            raise InputError(f"{option} cannot be combined with offload")
    check_settings(_settings(args), half=False)


def _settings(args: MeZOConfig) -> dict[str, Any]:
    layers = args.modified or args.keep is not None
    return {"rule": rule_of(args), "estimator": args.estimator, "layers": layers}
