"""Checkpoints of small models as folders, and runs that begin from them."""

import torch
from models import tiny_model
from safetensors.torch import load_file
from tiny_tokenizers import byte_bpe

from mezo import MeZO, trajectory


def base(path, kind="opt", dtype=torch.float32, **options):
    """A base model's folder, in its own dtype; the model as loading it gives it."""
    model = tiny_model(kind).to(dtype)
    model.save_pretrained(path, **options)
    byte_bpe().save_pretrained(path)
    return loaded(path, type(model), dtype)


def loaded(path, kind, dtype="auto"):
    return kind.from_pretrained(path, dtype=dtype).eval()


def tune(model, path, steps=3, keep=lambda name: True, **options):
    """A run on a loss that changes with every weight; its log, at `path`."""
    named = [(name, p) for name, p in model.named_parameters() if keep(name)]
    for name, p in model.named_parameters():
        p.requires_grad_(keep(name))
    optimizer = MeZO(named, **({"lr": 1e-2, "seed": 3, "weight_decay": 0.1} | options))
    ids = torch.arange(12).view(2, 6)
    with trajectory.record(optimizer, path, model=model):
        for _ in range(steps):
            optimizer.step(lambda: model(input_ids=ids, labels=ids).loss)
    return model


def weights(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )
