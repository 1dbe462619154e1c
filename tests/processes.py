"""Several processes of one test: forked from a server that has imported torch, joined by gloo."""

import multiprocessing
import os
import pickle
import traceback
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

TESTS = Path(__file__).parent
SEARCHED = os.pathsep.join([str(TESTS.parent), str(TESTS)])  # PYTHONPATH of a test's programs


def run(work, size, folder, *args, dying=False):
    """What `work(rank, *args)` returns in each of `size` processes, by rank.

    An exception in one of them is raised here; `dying` lets them fail, and returns the messages.
    The process group meets in a file: no port is taken.
    """
    context = _server()
    store = Path(folder, f"store-{work.__name__}-{len(list(Path(folder).iterdir()))}")
    running = [
        context.Process(target=_child, args=(work, rank, size, str(store), args), daemon=True)
        for rank in range(size)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(600)  # no test takes a minute, but the machine may have much else to do
    found = []
    for rank, process in enumerate(running):
        result = Path(f"{store}-{rank}")
        ended = pickle.loads(result.read_bytes()) if result.exists() else (True, process.exitcode)
        assert dying or not ended[0], f"rank {rank}: {ended[1]}"
        found.append(ended[1])
    return found


def _server():
    """It imports tests/warm.py: Python 3.11's finds modules by the environment alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SEARCHED)
        forkserver.ensure_running()
    return context


def _child(work, rank, size, store, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        found = False, work(rank, *args)
        dist.barrier()
    except BaseException as error:
        found = True, f"{error!r}\n{traceback.format_exc()}"
    Path(f"{store}-{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()
