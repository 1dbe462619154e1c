"""Low-rank directions under the Trainer."""

import pytest
import torch
from models import Toy, llama, weights
from trainers import PairedTrainer, grads, points, trainer_at

from mezo import MeZOTrainer, trajectory
from mezo.trainers.task import MeZOTaskTrainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainer_saves_and_evaluates_what_was_trained(tmp_path, dtype):
    """Checkpoints within intervals have the whole model; resumed, and replayed, it is the run's."""
    options = {"perturbation": "low_rank", "interval": 5, "rank": 2, "max_steps": 9}
    options |= {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps"}
    options |= {"eval_steps": 2, "weight_decay": 0.1}
    model = llama().to(dtype)
    whole = trainer_at(tmp_path / "a", model=model, **options)
    whole.train()
    for step in (3, 6, 9):
        base = llama().to(dtype)
        trajectory.replay(tmp_path / "a" / "run.mezo", base, until=step)
        kept = type(base).from_pretrained(tmp_path / "a" / f"checkpoint-{step}", dtype=dtype)
        assert torch.equal(weights(kept), weights(base))
    assert torch.equal(weights(model), weights(base))

    grads_before = grads(tmp_path / "a")
    (tmp_path / "a" / "checkpoint-9" / "trainer_state.json").unlink()
    again = trainer_at(tmp_path / "a", model=llama(seed=5).to(dtype), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert torch.equal(weights(again.model), weights(model))
    assert grads(tmp_path / "a") == grads_before


def test_the_best_model_is_not_added_to(tmp_path):
    """load_best_model_at_end with steps after the best one: they do not reach it."""
    options = {"perturbation": "low_rank", "interval": 50, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    options |= {"eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    options["learning_rate"] = 1e-2
    trainer = trainer_at(tmp_path, metric_for_best_model="step", **options)
    trainer.compute_metrics = lambda _: {"step": -trainer.state.global_step}
    trainer.train()
    kept = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(weights(trainer.model), weights(kept))


def test_a_trainer_that_knows_its_pair_takes_one_pass(tmp_path):
    """Micro-batches and directions as in two passes; the task trainer has its pair, too."""
    options = {"perturbation": "low_rank", "num_samples": 2, "gradient_accumulation_steps": 2}
    options |= {"data": points(), "interval": 3}
    for name, kind in (("one", PairedTrainer), ("two", MeZOTrainer)):
        trainer = trainer_at(tmp_path / name, model=Toy(), kind=kind, **options)
        trainer.train()
        paired = trainer.optimizer.optimizer.memory.paired
        assert paired is (True if name == "one" else None)
    expected = [pytest.approx(row, rel=1e-9) for row in grads(tmp_path / "two")]
    assert grads(tmp_path / "one") == expected
    assert MeZOTaskTrainer.pair_loss is not None
