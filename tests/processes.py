"""Several processes of one test: forked from a server that has imported torch, joined by gloo."""

import faulthandler
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
LIMIT = 900  # seconds; no test takes a minute, but the machine may have much else to do
SEARCHED = os.pathsep.join([str(TESTS.parent), str(TESTS)])  # PYTHONPATH of a test's programs


def newer_torch(reason):
    """A mark of what the oldest torch that we support cannot do."""
    return pytest.mark.skipif(torch.__version__.startswith("2.6."), reason=f"torch 2.6 {reason}")


needs_fsdp = newer_torch("has no FSDP2 on CPUs")


def run(work, size, folder, *args, dying=False):
    """What `work(rank, *args)` returns in each of `size` processes, by rank.

    An exception in one of them is raised here; `dying` lets them fail, and returns the messages.
    A process that waits for ever ends after LIMIT seconds, and the error says where it waited.
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
        process.join()
    ended = [_end(process, f"{store}-{rank}") for rank, process in enumerate(running)]
    failed = [f"rank {rank}: {what}" for rank, (fault, what) in enumerate(ended) if fault]
    assert dying or not failed, "\n".join(failed)
    return [what for _, what in ended]


def _end(process, path):
    """Whether a process failed, and what it returned or said; else its exit status."""
    if Path(path).exists():
        return pickle.loads(Path(path).read_bytes())
    stack = Path(f"{path}-stack")
    return True, (stack.read_text() if stack.exists() else "") or process.exitcode


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
    stack = open(f"{store}-{rank}-stack", "w")  # noqa: SIM115 (open to the end of the process)
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=stack)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        found = False, work(rank, *args)
        dist.barrier()
    except BaseException as error:
        found = True, f"{error!r}\n{traceback.format_exc()}"
    Path(f"{store}-{rank}").write_bytes(pickle.dumps(found))
    os._exit(0)  # destroy_process_group waits for ever in torch 2.6, if there were subgroups
