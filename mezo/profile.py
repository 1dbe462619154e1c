"""Peak memory of a stretch of code, measured: the device's allocator, or the process on a CPU."""

import contextlib
import ctypes
import gc
import platform
import resource
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory() as peak: ...` then `peak.bytes`: the most memory taken above the start.

    On CUDA to the byte. On a CPU from the process's resident pages: good to 10 or 20 MB, since
    memory that was freed before may be used again unseen; what can be given back is given back
    first. Where the high-water mark cannot be reset (macOS, some sandboxes), a stretch below an
    earlier peak reads 0.
    """

    bytes = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            if platform.system() == "Linux":
                with contextlib.suppress(AttributeError):  # musl has none
                    ctypes.CDLL(None).malloc_trim(0)
                with contextlib.suppress(OSError):  # a sandbox may forbid it
                    _RESET.write_text("5")  # the high-water mark is what is resident now
            self._start = _high_water()
        return self

    def __exit__(self, *exception) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _high_water()
        self.bytes = peak - self._start


def _high_water() -> int:
    if platform.system() == "Linux":
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
