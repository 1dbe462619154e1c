"""Names that other packages changed between the oldest and the newest release that we support.

Every difference lives here, with the release that brought it, so that the rest of the package is
written against one interface and a floor in pyproject.toml can be raised by deleting lines here.
The module imports nothing but torch: it looks at objects that its callers hold already.
"""

from copy import copy
from typing import Any

import torch

__all__ = ["CACHE_ARGUMENTS", "cache_of", "unpacked"]

# What a model's keys and values are called among its arguments: transformers 5.24 renamed
# `past_key_values` to `cache`, and accepts the old name with a warning; peft 0.21 still passes it.
CACHE_ARGUMENTS = ("past_key_values", "cache")


def cache_of(output: Any) -> Any:
    """Return the keys and values in a model's output, under the name that its release uses."""
    return output["cache" if "cache" in output else "past_key_values"]


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
