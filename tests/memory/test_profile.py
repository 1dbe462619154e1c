"""The peak is what was measured, whatever was freed before the end."""

import platform

import pytest
import torch

from mezo.memory.measured import PeakMemory

MIB = 2**20


@pytest.mark.skipif(platform.system() != "Linux", reason="the high-water mark cannot be reset")
@pytest.mark.parametrize("earlier", [0, 128])
def test_a_tensor_is_seen_to_a_few_megabytes(earlier):
    """64 MiB that are gone at the end; an earlier, higher peak does not count."""
    torch.ones(earlier * MIB // 4)
    with PeakMemory() as peak:
        torch.ones(64 * MIB // 4)
    # pages of 4 KB, counted in batches a thread; what the interpreter takes meanwhile
    assert peak.bytes == pytest.approx(64 * MIB, abs=4 * MIB)


@pytest.mark.skipif(platform.system() != "Linux", reason="the high-water mark cannot be reset")
def test_nothing_is_little():
    with PeakMemory() as peak:
        torch.ones(10)
    assert abs(peak.bytes) < 4 * MIB


def test_an_exception_is_measured_and_passed_on():
    with pytest.raises(RuntimeError, match="inside"), PeakMemory() as peak:
        raise RuntimeError("inside")
    assert peak.bytes < 4 * MIB


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_allocator_s():
    with PeakMemory() as peak:
        torch.ones(64 * MIB // 4, device="cuda")
    assert peak.bytes == 64 * MIB
