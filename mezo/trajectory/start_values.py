"""Start values in a log: those that the base model and the seed do not reproduce everywhere.

A run starts from the base model, and from an adapter that the seed draws. Some start values depend
on a floating-point forward pass or on torch's generator, such as the keys and values of a prefix.
Another processor or number of threads may round them differently, and the run could then be
replayed only on one kind of machine. The header of such a log holds the values themselves, so that
the log and the base model suffice anywhere:

    "start_values": {"prompt_encoder.default.embedding.weight": base64 of the elements' bytes}
"""

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import torch

from mezo.models.adapters import kept_start
from mezo.noise.sharded import is_sharded

KEY = "start_values"


def encoded(model: torch.nn.Module | None, named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the header's entry with the start values that must be kept; {} if there are none.

    `named` are the trained tensors by canonical name, with their values at the start.
    """
    values = {
        name: base64.b64encode(_bytes_of(named[name])).decode() for name in kept_start(model, named)
    }
    return {KEY: values} if values else {}


def put_(header: Mapping[str, Any], named: Mapping[str, torch.Tensor]) -> None:
    """Copy the start values that a header holds into the tensors, given by canonical name.

    `header` must have been checked. A tensor of another shape or dtype is left alone; the
    comparison of fingerprints refuses it later.
    """
    for entry in header["tensors"]:
        tensor = named.get(entry["name"])
        text = header.get(KEY, {}).get(entry["name"])
        if tensor is None or text is None or list(tensor.shape) != entry["shape"]:
            continue
        dtype = getattr(torch, entry["dtype"])
        if tensor.dtype == dtype:
            data = bytearray(base64.b64decode(text))
            value = torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(entry["shape"])
            _copy_(tensor, value)


def problem_of(header: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the start values in a header, or return None."""
    values = header.get(KEY, {})
    if not isinstance(values, dict):
        return "not an object"
    sizes = {
        entry["name"]: math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize
        for entry in header["tensors"]
    }
    for name, text in values.items():
        try:
            size = len(base64.b64decode(text, validate=True))
        except (TypeError, ValueError, binascii.Error):
            return "not in base64"
        if sizes.get(name) != size or not size:
            return "not those of its tensors"
    return None


@torch.no_grad()
def _copy_(tensor: torch.Tensor, value: torch.Tensor) -> None:
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        shard: Any = tensor
        tensor.copy_(distribute_tensor(value, shard.device_mesh, shard.placements))
    else:
        tensor.copy_(value)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the elements' bytes, row-major.

    For a DTensor they are those of the whole tensor, and every process must call this.
    """
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
