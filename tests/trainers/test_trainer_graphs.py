"""The Trainer's forward passes as graphs: the same run, whatever the Trainer does around them."""

import pytest
import torch
from models import llama, weights
from recording import Recording
from trainers import grads, sentences, trainer_at

from mezo import MeZOTrainer
from mezo.forms.graphs import Graphs

PAST = torch.ones(1, 8, 8, dtype=torch.bool).tril()  # a mask that transformers does not look at


class Replayed(MeZOTrainer):
    backend: Recording

    def _replayed(self):
        return Graphs(backend=self.backend).around(self.model)


@pytest.mark.parametrize(
    "options",
    [
        {"perturbation": "scratch"},
        {"num_samples": 2, "gradient_accumulation_steps": 2},
        {"bf16": True, "eval_strategy": "steps", "eval_steps": 3},
    ],
)
def test_a_run_of_replays_is_a_run_of_the_trainer(options, tmp_path):
    """Losses are divided by the tokens of the whole batch, and evaluations lie in between."""
    data, found, rows = [row | {"attention_mask": PAST} for row in sentences()], {}, {}
    for kind in (MeZOTrainer, Replayed):
        backend = kind.backend = Recording()
        path = tmp_path / kind.__name__
        trainer = trainer_at(path, llama(), kind=kind, data=data, max_steps=6, **options)
        trainer.train()
        found[kind], rows[kind] = weights(trainer.model), grads(path)
        assert (backend.replays > 6) == (kind is Replayed)
        assert ("forward" in vars(trainer.model)) == ("bf16" in options)  # that is accelerate's
    assert torch.equal(found[MeZOTrainer], found[Replayed])
    assert rows[MeZOTrainer] == rows[Replayed]


def test_on_a_cpu_and_where_they_are_not_wanted_there_are_no_graphs(tmp_path):
    """graphs=False leaves the model's forward alone."""
    for options in ({}, {"graphs": False}):
        model = llama()
        trainer = trainer_at(tmp_path, model, **options)
        with trainer._replayed():
            assert "forward" not in vars(model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_device_a_run_with_graphs_is_one_without(dtype, tmp_path, caplog):
    data, found = [row | {"attention_mask": PAST} for row in sentences()], []
    for graphs in (True, False):
        options = {"graphs": graphs, "use_cpu": False, "max_steps": 6, "data": data}
        path = tmp_path / str(graphs)
        trainer = trainer_at(path, llama().to(dtype), **options)
        trainer.train()
        found.append((weights(trainer.model).cpu(), grads(path)))
    assert "no graph" not in caplog.text
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
