"""Measure the peak memory of a stretch of code, from the allocator or, on a CPU, the process."""

import contextlib
import ctypes
import gc
import platform
import resource
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """After `with PeakMemory() as peak: ...`, `peak.bytes` is the peak above the start, in bytes.

    On CUDA it is exact. On a CPU it comes from the process's resident pages and is accurate to 10
    or 20 MB, since memory that was freed earlier may be reused unnoticed; freed memory is therefore
    returned to the system first where possible. Where the high-water mark cannot be reset (macOS,
    some sandboxes), a stretch below an earlier peak reads 0.
    """

    bytes = 0

    def __enter__(self) -> "PeakMemory":
        give_back()
        _reset()
        if torch.cuda.is_available():
            self._start = torch.cuda.memory_allocated()
        else:
            self._start = _high_water()
        return self

    def __exit__(self, *exception) -> None:
        self.bytes = _peak() - self._start


class PeakOfStretches:
    """Measures several stretches, each of them between `begin()` and `end()`.

    `bytes` is the largest peak of a stretch above the memory in use when this object was created.
    `whole` is the largest peak since then, including the time between stretches. `end()` updates
    both. Do not use it inside a PeakMemory, because it resets the high-water mark.
    """

    bytes = 0
    whole = 0

    def __init__(self) -> None:
        with PeakMemory() as peak:
            self._start = peak._start
        self._within = False

    def begin(self) -> None:
        self.end()
        _reset()
        self._within = True

    def end(self) -> None:
        taken = _peak() - self._start
        self.whole = max(self.whole, taken)
        if self._within:
            self.bytes, self._within = max(self.bytes, taken), False


def give_back() -> None:
    """Return freed memory to the system, as far as that is possible."""
    gc.collect()
    if platform.system() == "Linux" and not torch.cuda.is_available():
        with contextlib.suppress(AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)


def _reset() -> None:
    """Reset the high-water mark to the memory in use now."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif platform.system() == "Linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            _RESET.write_text("5")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _high_water()


def _high_water() -> int:
    if platform.system() == "Linux":
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
