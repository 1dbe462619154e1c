"""A model's modes, its device and its wrapper: what each caller of a forward pass must handle."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def to_device(batch: Batch, model: torch.nn.Module) -> Batch:
    """Return the batch on the model's device.

    A batch for an offloaded model, whose parameters are on the meta device, is returned as it is:
    the model's hooks move it.
    """
    device = next(model.parameters()).device
    return batch if device.type == "meta" else {key: t.to(device) for key, t in batch.items()}


def unwrap(model: torch.nn.Module) -> "PreTrainedModel":
    """Return the transformers model inside peft's wrapper, or the model itself without one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore
