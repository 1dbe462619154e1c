"""Several processes that make one run together."""

from mezo.distributed.processes import join, leave

__all__ = ["join", "leave"]
