"""No network and no telemetry in any test, one thread each: set before a library reads them."""

import gc
import os
import signal
from pathlib import Path

import pytest

LONG = [  # files of 10 to 50 s, the longest first; all others take less
    "noise/test_noise_gpu.py",
    "memory/test_planning.py",
    "test_extending.py",
    "docs/test_blocks.py",
    "trainers/test_resume.py",
    "test_rules.py",
    "models/test_tuners.py",
    "demo/test_demo.py",
    "runs/test_methods.py",
    "test_estimators.py",
    "test_foreign_fuzz.py",
    "noise/test_all.py",
    "docs/test_examples.py",
    "hub/test_hub.py",
]

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # the tests run on all cores, file by file
}.items():
    os.environ.setdefault(name, value)


def pytest_configure(config):
    """pytest-xdist would deal out the files with the most tests first, and long ones last."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The long files come first: at the end no process waits for another's long file."""
    here = Path(__file__).parent
    place = {here / name: at for at, name in enumerate(LONG)}
    assert all(path.exists() for path in place)
    items.sort(key=lambda item: place.get(item.path, len(place)))


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
