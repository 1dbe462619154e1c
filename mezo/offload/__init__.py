"""Models larger than the memory: blocks of weights come and go."""

from mezo.offload.context import load_offloaded, offload

__all__ = ["load_offloaded", "offload"]
