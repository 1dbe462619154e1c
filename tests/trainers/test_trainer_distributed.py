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
from models import llama, weights
from processes import LIMIT, SEARCHED
from torch import distributed as dist
from trainers import UNIT, grads, trainer_at
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from mezo import MeZOTrainer, trajectory


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
    probes = {"num_samples": 2, "probe_groups": -1, "max_steps": 3}
    several = trainer_at(path / "probes", **probes, **options)
    several.train()
    seen = {
        "sharded": sharded(path, options),
        "probes": digest(several.model),
        "weights": digest(trainer.model),
        "poisoned": digest(poisoned.model),
        "wrapped": wrapped,
        "grad_norms": [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    (path / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def sharded(path, options):
    """Digests of a model that from_pretrained has sharded, and of one that it has not.

    The first is evaluated before, and stopped in between: it goes on from the log alone.
    """
    found = []
    for name, config in (("loaded", None), ("sharded", DistributedConfig(fsdp_size=2))):
        for steps in (4,) if config is None else (2, 4):
            model = LlamaForCausalLM.from_pretrained(path / "base", distributed_config=config)
            changes = {"max_steps": steps, "perturbation": "scratch", "num_samples": 2}
            trainer = trainer_at(path / name, model=model, **changes, **options)
            trainer.evaluate()
            trainer.train(resume_from_checkpoint=steps == 4 and config is not None)
            trainer.evaluate()
        trained = [p for _, p, _ in trainer.optimizer.optimizer.trained()]
        found.append([(p.full_tensor() if config else p).detach().tolist() for p in trained])
    return [hashlib.sha256(repr(numbers).encode()).hexdigest() for numbers in found]


def torchrun(path):
    """Both processes, one thread each; returns what each has seen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": SEARCHED}
    done = subprocess.run(
        [*command, __file__, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((path / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow  # 20 to 60 s: both processes import transformers
def test_two_processes_are_one(tmp_path):
    """Traps 3, 9, 18: same z and bits on both ranks, no DDP, one log, refusals together.

    Tolerance: a mean over at most 112 tokens, summed in another order, is off by 112 roundings;
    from then on the weights differ by lr |z| (error of g) <= 5 lr (error of g) a step.
    """
    llama().save_pretrained(tmp_path / "base")
    first, second = torchrun(tmp_path)
    assert len({*first["sharded"], *second["sharded"]}) == 1
    assert grads(tmp_path / "sharded") == grads(tmp_path / "loaded")
    assert first["weights"] == second["weights"]
    assert first["poisoned"] == second["poisoned"]
    several = grads(path := tmp_path / "probes")
    assert [len(set(row)) for row in several] == [2, 2, 2]  # directions of their own
    assert first["probes"] == second["probes"]
    assert first["probes"] == digest(trajectory.replay(path / "run.mezo", llama()))
    assert first["wrapped"] == second["wrapped"] == "LlamaForCausalLM"
    logged = [abs(g) for (g,) in grads(tmp_path / "two")]
    assert first["grad_norms"] == second["grad_norms"] == logged
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
