"""The CPU stands for a device with a memory of its own."""

import pytest

from mezo.offload import blocks


@pytest.fixture(autouse=True)
def other_memory(monkeypatch):
    """Weights are copied to the device and back, which a CPU has no need of."""
    monkeypatch.setattr(blocks, "must_copy", lambda device, write_every: True)
