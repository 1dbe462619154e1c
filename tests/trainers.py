"""Tiny models, data and trainers for the tests of the Trainer face."""

import torch
from models import llama, weights
from transformers import TrainerCallback

from mezo import MeZOConfig, MeZOTrainer, trajectory

LR = 1e-3
UNIT = 2.0**-24  # rounding of float32


def sentences(count=64, length=8):
    """Sentences whose number of labels differs, so that weighting by tokens matters."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        tokens = torch.randint(0, 64, (length,), generator=generator)
        labels = torch.where(torch.arange(length) < index // 4 % length, -100, tokens)
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def settings(path, kind=MeZOConfig, **changes):
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": LR}
    options |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1}
    options |= {"save_strategy": "no", "train_sampling_strategy": "sequential"}
    return kind(str(path), **(options | changes))


def trainer_at(path, model=None, callbacks=None, kind=MeZOTrainer, data=None, **changes):
    data = sentences() if data is None else data
    more = {"train_dataset": data, "eval_dataset": data[:8], "callbacks": callbacks}
    return kind(model or llama(), settings(path, **changes), **more)


def trained(path, **options):
    trainer = trainer_at(path, **options)
    trainer.train()
    return weights(trainer.model)


def grads(path):
    steps = trajectory.read(path / "run.mezo").steps
    return [step.record.projected_grads for step in steps]


def points(count=64):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [{"x": row, "labels": row.sum()} for row in x]


class Watch(TrainerCallback):
    """Calls `look(model)` at one event."""

    def __init__(self, event, look):
        setattr(self, event, lambda args, state, control, model, **rest: look(model))


class PairedTrainer(MeZOTrainer):
    def pair_loss(self, model, inputs, both):
        with both(len(inputs["x"])):
            found = model.layer(torch.cat([inputs["x"], inputs["x"]])).squeeze(-1)
        return [(half - inputs["labels"]).square().mean() for half in found.chunk(2)]
