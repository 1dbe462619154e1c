"""Models, and their loss, for the tests of weights that wait elsewhere."""

import torch
from models import architecture, tiny_model

WORDS = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(0))
COPIES = {"device": "cpu"}  # which tests/offload/conftest.py makes another device


def made(name, dtype=torch.float32):
    model = architecture(name, dtype) if name == "mixtral" else tiny_model(name).to(dtype)
    model.config.use_cache = False
    return model


def loss_of(model):
    return lambda: model(input_ids=WORDS, labels=WORDS, use_cache=False).loss


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))
