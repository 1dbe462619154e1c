"""Two processes with half of the batch each take the steps of one process with all of it.

Run by torchrun, this file is the worker: `torchrun --nproc_per_node=2 test_trainer_distributed.py`.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from trainers import UNIT, grads, llama, trainer_at, weights

from mezo import MeZOTrainer, trajectory
from mezo.distributed import broadcast_, mean_over_processes

TESTS = Path(__file__).parent


def digest(model):
    return hashlib.sha256(weights(model).numpy().tobytes()).hexdigest()


class PoisonedOnOne(MeZOTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        poisoned = self.args.process_index == 1 and self.state.global_step == 1
        return loss * float("nan") if poisoned else loss


def worker(path):
    rank = int(os.environ["RANK"])
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 8}
    # each process begins with other weights: those of rank 0 count
    trainer = trainer_at(path / "two", model=llama(seed=rank), **options)
    trainer.train()
    wrapped = type(trainer.model_wrapped).__name__
    poisoned = trainer_at(path / "poisoned", kind=PoisonedOnOne, **options)
    poisoned.train()
    seen = {
        "weights": digest(trainer.model),
        "poisoned": digest(poisoned.model),
        "wrapped": wrapped,
        "mean": mean_over_processes([0.1, 0.7][rank]),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    (path / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def torchrun(path):
    """Both processes, one thread each; returns what each has seen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        [*command, __file__, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((path / f"{rank}.json").read_text()) for rank in range(2)]


def test_without_a_process_group_it_is_the_identity():
    model = llama()
    before = weights(model)
    broadcast_(model)
    assert torch.equal(weights(model), before)
    assert mean_over_processes(0.1) == 0.1


COLLECTIVES = """
import sys, torch
from torch import distributed as dist
from mezo.distributed import broadcast_, mean_over_processes

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
print(mean_over_processes([0.1, 0.7][rank]).hex(), mean_over_processes([1.0, float("nan")][rank]))
module = torch.nn.BatchNorm1d(2)
module.transposed = torch.nn.Parameter(torch.full((3, 2), float(rank)).t())
module.running_mean.fill_(rank + 5)
broadcast_(module)
print(module.transposed.tolist(), module.transposed.stride(), module.running_mean.tolist())
dist.barrier()  # torch 2.6 may hang in the next line when the other process is gone
dist.destroy_process_group()
"""


def test_all_processes_get_the_same_bits(tmp_path):
    """Sums in rank order; NaN reaches everyone; strided parameters and buffers come from rank 0."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-c", COLLECTIVES]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0].splitlines() for process in running)
    assert first == second
    assert first[0] == f"{((0.1 + 0.7) / 2).hex()} nan"
    assert first[1] == "[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]] (1, 2) [5.0, 5.0]"


@pytest.mark.slow  # 20 to 60 s: both processes import transformers
def test_two_processes_are_one(tmp_path):
    """Traps 3, 9, 18: same z and bits on both ranks, no DDP, one log, refusals together.

    Tolerance: a mean over at most 112 tokens, summed in another order, is off by 112 roundings;
    from then on the weights differ by lr |z| (error of g) <= 5 lr (error of g) a step.
    """
    first, second = torchrun(tmp_path)
    assert first["weights"] == second["weights"]
    assert first["poisoned"] == second["poisoned"]
    assert first["wrapped"] == second["wrapped"] == "LlamaForCausalLM"
    assert first["mean"] == second["mean"] == pytest.approx(0.4, rel=1e-15)
    assert first["losses"] == second["losses"]

    one = trainer_at(tmp_path / "one", per_device_train_batch_size=16)
    one.train()
    error = 2 * 112 * UNIT * max(first["losses"]) / (2 * 1e-3)
    losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    assert abs(first["losses"][0] - losses[0]) <= 112 * UNIT * losses[0]
    pairs = list(zip(grads(tmp_path / "two"), grads(tmp_path / "one"), strict=True))
    assert abs(pairs[0][0][0] - pairs[0][1][0]) <= error
    replayed = trajectory.replay(tmp_path / "two/run.mezo", llama())
    assert digest(replayed) == first["weights"]
    moved = (weights(replayed) - weights(one.model)).abs().max()
    assert moved <= len(pairs) * 5 * 1e-3 * error
    finite = [g == g for (g,) in grads(tmp_path / "poisoned")]
    assert finite == [True, False, True, True]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
