"""Runs whose processes come and go: a new process replays the steps it has missed from the log.

    dist.init_process_group("gloo")
    model = load()                                       # the base model
    optimizer = MeZO(model.named_parameters(), ...)
    elastic.catch_up(optimizer, "run.mezo")              # to the end of the run so far
    distributed.join(optimizer, model)
    with elastic.record(optimizer, "run.mezo", model=model):
        while optimizer.param_groups[0]["step"] < steps: ...

When a process dies or joins, `torchrun --max-restarts` restarts this script in all processes. Every
completed step is in the log and is replayed without a forward pass. A step during which a process
died is not recorded, and is repeated.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import distributed as dist

from mezo import trajectory
from mezo.distributed.exchange import Link
from mezo.errors import InputError
from mezo.mezo import MeZO
from mezo.noise.sharded import is_sharded
from mezo.optimizer import OneProcess


def catch_up(optimizer: MeZO, path: str | Path, *, group: dist.ProcessGroup | None = None) -> int:
    """Bring this process's weights to the run's end, by the longest log that any process has.

    Call it in all processes, before `distributed.join`. `path` may name a file on a shared disk or
    one on each machine. The log is sent to all processes (16 bytes per step for one direction), and
    rank 0, which continues it, keeps it. Returns the number of replayed steps, 0 if there is no
    log. Raises InputError as `trajectory.catch_up` does.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return trajectory.catch_up(path, optimizer) if Path(path).exists() else 0
    link = Link(optimizer.trained()[0][1].device, group)
    mine = _end(path)
    ends = [int(end) for (end,) in link.gather([float(mine)])]
    if max(ends) < 0:
        return 0
    source = ends.index(max(ends))
    data = link.send(Path(path).read_bytes() if link.rank == source else b"", source)
    with tempfile.TemporaryDirectory(prefix="mezo-") as folder:
        sent = Path(folder, "run.mezo")
        sent.write_bytes(data)
        if link.rank == 0 and source != 0:
            _replace(path, data)
        return trajectory.catch_up(sent, optimizer)


def _end(path: str | Path) -> int:
    """Return the step at which a log ends, or -1 if there is none."""
    if not (Path(path).exists() and Path(path).stat().st_size):
        return -1
    return trajectory.resumable(trajectory.read(path))


def _replace(path: str | Path, data: bytes) -> None:
    try:
        whole = Path(f"{path}.part")
        whole.write_bytes(data)
        os.replace(whole, path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


@contextmanager
def record(
    optimizer: MeZO, path: str | Path, *, model: Any = None, config: dict[str, Any] | None = None
) -> Iterator[trajectory.Writer | None]:
    """Call `trajectory.record` for all processes: rank 0 writes the log or continues one.

    The other processes get None. Call it in all processes, after `distributed.join`.
    """
    writer = writer_of(optimizer, path, model=model, config=config, resume=True)
    with nullcontext() if writer is None else writer:
        yield writer
        digest(optimizer, writer)


def digest(optimizer: MeZO, writer: trajectory.Writer | None) -> None:
    """Call `Writer.digest` from all processes: those without a writer help to read the shards."""
    if writer is not None:
        writer.digest()
        return
    tensors = [p for _, p, _ in optimizer.trained()]
    if any(map(is_sharded, tensors)) and not optimizer.directions:
        trajectory.fingerprints.digests_of(p for _, p in optimizer.weights.as_written(optimizer))


def writer_of(
    optimizer: MeZO, path: str | Path, *, model: Any, config: dict[str, Any] | None, resume: bool
) -> trajectory.Writer | None:
    """Call `trajectory.record` from all processes; return None in those that do not write the log.

    Fingerprints are of whole tensors, so that for sharded weights every process must take part.
    """
    processes: OneProcess = optimizer.processes
    if not isinstance(processes, Link):
        return trajectory.record(optimizer, path, model=model, config=config, resume=resume)
    if processes.rank == 0:
        begun = resume and Path(path).exists() and Path(path).stat().st_size
        processes.send(b"" if begun else b"fresh", 0)
        return trajectory.record(optimizer, path, model=model, config=config, resume=resume)
    fresh = processes.send(b"", 0) == b"fresh"
    tensors = [p for _, p, _ in optimizer.trained()]
    tensors += [] if model is None else model.parameters()
    if fresh and any(map(is_sharded, tensors)):
        trajectory.writer.header_of(optimizer, model, config)  # rank 0 waits for these shards
    return None
