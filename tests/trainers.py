"""Tiny models, data and trainers for the tests of the Trainer face."""

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from mezo import MeZOConfig, MeZOTrainer, trajectory

LR = 1e-3
UNIT = 2.0**-24  # rounding of float32


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """Trainer.train() collects garbage: 0.4 s each, unless what was imported is left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def llama(seed=0, dropout=0.0):
    """Random weights: vocabulary 64, hidden 16, 2 layers; about 6,000 parameters."""
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "max_position_embeddings": 32}
        config = LlamaConfig(vocab_size=64, attention_dropout=dropout, **shape, **heads)
        return LlamaForCausalLM(config)


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


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def trained(path, **options):
    trainer = trainer_at(path, **options)
    trainer.train()
    return weights(trainer.model)


def grads(path):
    steps = trajectory.read(path / "run.mezo").steps
    return [step.record.projected_grads for step in steps]


class Toy(torch.nn.Module):
    """Regression in float64: a loss that is a plain mean and takes no number of items."""

    def __init__(self, broken_backward=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            self.layer = torch.nn.Linear(4, 1, dtype=torch.float64)
        self.broken_backward = broken_backward

    def forward(self, x, labels):
        y = Undifferentiable.apply(self.layer(x)) if self.broken_backward else self.layer(x)
        return {"loss": (y.squeeze(-1) - labels).square().mean()}


class Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("a backward pass ran")


def points(count=64):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [{"x": row, "labels": row.sum()} for row in x]


class Watch(TrainerCallback):
    """Calls `look(model)` at one event."""

    def __init__(self, event, look):
        setattr(self, event, lambda args, state, control, model, **rest: look(model))
