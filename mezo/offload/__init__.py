"""Train models that are larger than the device's memory, block by block."""

from mezo.offload.context import load_offloaded, offload

__all__ = ["load_offloaded", "offload"]
