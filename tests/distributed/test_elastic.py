"""A process that dies is started again and catches up by the log: the run is the uninterrupted one.

Run by torchrun, this file is the worker.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from perceptron import OPTIONS, digest, loss, model, points
from processes import LIMIT, SEARCHED, run
from torch import distributed as dist

from mezo import MeZO, trajectory
from mezo.distributed import elastic
from mezo.distributed import processes as distributed
from mezo.errors import InputError

STEPS, DEADLY = 12, 7


def training(rank, folder, deadly=None, *, size=3, options=OPTIONS):
    """12 steps of a batch that is dealt out to the processes; rank 1 dies in one of them."""
    net, (x, y) = model(), points(6)
    optimizer = MeZO(net.named_parameters(), num_samples=2, **options)
    path = f"{folder}/run.mezo"
    made = elastic.catch_up(optimizer, path)
    distributed.join(optimizer, net, check_every=1)

    def part():
        if rank == 1 and optimizer.param_groups[0]["step"] == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(net, x[rank::size], y[rank::size])

    with elastic.record(optimizer, path, model=net):
        for _ in range(optimizer.param_groups[0]["step"], STEPS):
            optimizer.step(part)
    return made, digest(net)


def records(path):
    return [step.record for step in trajectory.read(path).steps]


def test_a_killed_process_catches_up(tmp_path):
    """Rank 1 is killed in step 7, the others then stop; all are started again, as torchrun does."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(training, 3, tmp_path, str(tmp_path / "whole"))
    died = run(training, 3, tmp_path, str(tmp_path / "killed"), DEADLY, dying=True)
    assert died[1] == -signal.SIGKILL
    assert died[0].startswith("RuntimeError")  # of gloo: its connection is gone
    assert len(records(tmp_path / "killed/run.mezo")) == DEADLY
    again = run(training, 3, tmp_path, str(tmp_path / "killed"))
    assert whole == [(0, whole[0][1])] * 3
    assert again == [(DEADLY, whole[0][1])] * 3
    assert records(tmp_path / "whole/run.mezo") == records(tmp_path / "killed/run.mezo")


def test_alone_a_run_goes_on_too(tmp_path):
    net = model()
    optimizer = MeZO(net.named_parameters(), **OPTIONS)
    assert elastic.catch_up(optimizer, tmp_path / "run.mezo") == 0
    with elastic.record(optimizer, tmp_path / "run.mezo") as writer:
        assert isinstance(writer, trajectory.Writer)
        optimizer.step(lambda: loss(net, *points(4)))
    again = MeZO(model().named_parameters(), **OPTIONS)
    assert elastic.catch_up(again, tmp_path / "run.mezo") == 1
    other = MeZO(model().named_parameters(), **(OPTIONS | {"seed": 4}))
    with pytest.raises(InputError, match="another run: its seed is 3, not 4"):
        elastic.catch_up(other, tmp_path / "run.mezo")


@pytest.mark.slow  # 20 to 90 s: torchrun starts three processes twice
def test_torchrun_starts_a_killed_process_again(tmp_path):
    """ecosystem.md 5.5: in torch 2.13 gloo needs a store of its own after a restart."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment["PYTHONPATH"] = SEARCHED
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    done = subprocess.run(
        [*command, "--max-restarts=1", __file__, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    (tmp_path / "whole").mkdir()
    whole = run(training, 3, tmp_path, str(tmp_path / "whole"))
    assert found == [[DEADLY, whole[0][1]]] * 3


if __name__ == "__main__":
    dist.init_process_group("gloo")
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    own, where = dist.get_rank(), Path(sys.argv[1])
    result = training(own, where, DEADLY if first else None)
    (where / f"{own}.json").write_text(json.dumps(result))
    distributed.leave()
