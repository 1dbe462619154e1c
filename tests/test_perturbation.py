"""Scratch perturbation: the forward pass sees theta + eps z, and theta is untouched."""

import copy

import pytest
import tiny
import torch

from mezo import MeZO, noise
from mezo.noise import Move
from mezo.perturbation import perturb

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scratch(model, eps=1e-2, seed=3):
    """Direction 0 of step 0 for all of a model's parameters, and its optimizer."""
    optimizer = MeZO(model.named_parameters(), eps=eps, seed=seed, perturbation="scratch")
    return perturb(optimizer.trained(), optimizer.param_groups[0], 0)


def materialised(model, sign, eps=1e-2, seed=3):
    """A copy of the model whose weights are theta + sign eps z."""
    moved = copy.deepcopy(model)
    move = Move(0, 0, 1.0, sign * eps, noise.ROUND_PERTURBED)
    for name, p in moved.named_parameters():
        noise.apply_(p.detach(), noise.tensor_key(seed, name), [move])
    return moved


def bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


def assert_materialised(model, call):
    """Both halves have the bits of a model whose weights are perturbed for good."""
    before, perturbed = bits(model), scratch(model)
    with torch.no_grad():
        plain = call(model)
        for sign in (+1, -1):
            with perturbed.at(sign):
                found = call(model)
            assert torch.equal(found, call(materialised(model, sign)))
            assert not torch.equal(found, plain)
        assert torch.equal(call(model), plain)
    assert same(bits(model), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["opt", "llama", "qwen2", "gpt2", "bert", "roberta"])
def test_models_see_the_perturbed_weights(name, dtype):
    """Tied embeddings, Conv1D, layer norms, RMS norms, positions: all of them."""
    model = tiny.model(name).to(dtype)
    words = torch.randint(5, 90, (3, 20), generator=torch.Generator().manual_seed(0))
    assert_materialised(model, lambda m: m(input_ids=words).logits)
