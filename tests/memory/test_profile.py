"""The peak is what was measured, whatever was freed before the end."""

import os
import platform
import re
from pathlib import Path

import pytest
import torch

from mezo.memory.measured import PeakMemory

MIB = 2**20
linux = pytest.mark.skipif(
    platform.system() != "Linux", reason="the high-water mark cannot be reset"
)


def slack() -> int:
    """Bytes by which a right measurement may be off on this machine.

    Linux counts pages in batches: 64 a thread, or since 6.2 max(32, 2 n) for each of n processors.
    A tensor may have a huge page of 2 MiB at either end, and the interpreter takes some itself.
    """
    threads = int(re.search(r"Threads:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    processors = os.cpu_count() or 1
    pages = max(64 * threads, max(32, 2 * processors) * processors)
    return pages * os.sysconf("SC_PAGE_SIZE") + 2 * 2 * MIB + 2 * MIB


@linux
@pytest.mark.parametrize("earlier", [0, 512])
def test_a_tensor_is_seen_to_a_few_megabytes(earlier):
    """256 MiB that are gone at the end; an earlier, higher peak does not count."""
    torch.ones(earlier * MIB // 4)
    with PeakMemory() as peak:
        torch.ones(256 * MIB // 4)
    assert abs(peak.bytes - 256 * MIB) < slack()


@linux
def test_nothing_is_little():
    with PeakMemory() as peak:
        torch.ones(10)
    assert abs(peak.bytes) < slack()


@linux
def test_an_exception_is_measured_and_passed_on():
    def failing():
        torch.ones(256 * MIB // 4)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), PeakMemory() as peak:
        failing()
    assert abs(peak.bytes - 256 * MIB) < slack()


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_allocator_s():
    with PeakMemory() as peak:
        torch.ones(64 * MIB // 4, device="cuda")
    assert peak.bytes == 64 * MIB
