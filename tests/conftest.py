"""No network and no telemetry in any test, one thread each: set before a library reads them."""

import gc
import os
import signal

import pytest

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # the tests run on all cores, file by file
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """Every Trainer.train() collects garbage: 0.4 s, unless what was imported is left out."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """Python's own reaction to Ctrl-C, also where a script started the tests in the background.

    Such a shell lets them ignore the signal, and so do the programs that they start.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
