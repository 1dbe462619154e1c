"""What a device does at once: compute, take copies in, give copies out.

A lane is a queue of work; an event is a point in one, for another lane or a thread to wait for.
On a CPU a call has done its work when it returns, and there is nothing to wait for.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Lanes:
    """One lane: the thread's own."""

    def on(self, name: str) -> AbstractContextManager:
        """Work asked for within goes to lane "in" or "out"; outside, to the one that computes."""
        return nullcontext()

    def event(self) -> Any:
        """The point up to which work was asked of the current lane."""
        return None

    def wait(self, event: Any) -> None:
        """The current lane goes on after that point."""

    def join(self, event: Any) -> None:
        """This thread goes on after that point."""

    def use(self, tensors: Iterable[torch.Tensor]) -> None:
        """Their memory is not given to others before the current lane is done with them."""


class CudaLanes(Lanes):
    def __init__(self, device: torch.device):
        self.device = device
        self._lanes = {name: torch.cuda.Stream(device) for name in ("in", "out")}

    def on(self, name: str) -> AbstractContextManager:
        return torch.cuda.stream(self._lanes[name])

    def event(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def join(self, event: Any) -> None:
        event.synchronize()

    def use(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(self.device))


def lanes_of(device: torch.device) -> Lanes:
    return CudaLanes(device) if device.type == "cuda" else Lanes()
