"""Queues of a device's work: computing, copying blocks in, and copying blocks out.

On a GPU each queue is a CUDA stream, and an event is a point in one for which another stream or a
thread can wait. On a CPU a call has done its work when it returns, so that nothing has to wait.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class CopyStreams:
    """The queues of a CPU, which has one: each method does nothing."""

    def on(self, name: str) -> AbstractContextManager:
        """Queue work on the stream "in" or "out" within the context; outside it, on the default."""
        return nullcontext()

    def event(self) -> Any:
        """Return the current end of the current stream, to be waited for."""
        return None

    def wait(self, event: Any) -> None:
        """Let the current stream continue only after the event."""

    def join(self, event: Any) -> None:
        """Block this thread until the event has been reached."""

    def use(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keep the tensors' memory from being reused before the current stream is done with it."""


class CudaCopyStreams(CopyStreams):
    """The same with CUDA streams: one copies in, one copies out, the default one computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self._streams = {name: torch.cuda.Stream(device) for name in ("in", "out")}

    def on(self, name: str) -> AbstractContextManager:
        return torch.cuda.stream(self._streams[name])

    def event(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def join(self, event: Any) -> None:
        event.synchronize()

    def use(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(self.device))


def copy_streams_of(device: torch.device) -> CopyStreams:
    """Return the streams of a device."""
    return CudaCopyStreams(device) if device.type == "cuda" else CopyStreams()
