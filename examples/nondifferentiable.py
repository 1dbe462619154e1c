"""Accuracy as the objective: a number without a gradient, and MeZO goes up it all the same."""

import torch

from mezo import MeZO, tasks
from mezo.evaluation.evaluate import evaluate
from mezo.models.arguments import ModelArguments
from mezo.models.frozen import FrozenLower
from mezo.models.loading import load
from mezo.objectives import form_for

model, tokenizer = load(ModelArguments("minilm"))
task = tasks.get("opinions")
form = form_for(model, tokenizer, task)
train = tasks.load_examples(task, "train")[:48]
batch = form.collate([form.encode(example) for example in train])


def negative_accuracy() -> torch.Tensor:
    right = form.scores(model, batch).argmax(-1) == batch["labels"]
    return -right.float().mean()


with FrozenLower(model, layers=5):  # the last layer alone: a step costs a sixth
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and ("bias" in name or "LayerNorm" in name))
    optimizer = MeZO(model.named_parameters(), lr=0.1, eps=0.1, seed=0)
    print(f"accuracy {evaluate(model, form, train).accuracy:.3f}")
    for _ in range(40):
        optimizer.step(negative_accuracy)
    print(f"accuracy {evaluate(model, form, train).accuracy:.3f}")
