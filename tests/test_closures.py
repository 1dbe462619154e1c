"""Closures: the random numbers that they draw, and what they may return."""

import random

import numpy as np
import pytest
import torch

from mezo import MeZO
from mezo.closures import number
from mezo.errors import InputError


def draw(seen: list) -> float:
    """One number of each default generator, kept in `seen`."""
    seen.append((float(torch.rand(())), float(np.random.rand()), random.random()))
    return sum(seen[-1])


@pytest.mark.parametrize("form", ["in_place", "scratch", "low_rank"])
def test_common_random_numbers_are_the_same_in_both_passes_and_move_on_by_one(form):
    """Both passes see one noise, which cancels; the user's stream goes on from step to step."""
    p = torch.nn.Parameter(torch.ones(2, 2))
    how = {"common_random_numbers": True, "perturbation": form}
    optimizer = MeZO([("p", p)], lr=0.0, seed=1, num_samples=2, **how)
    optimizer.watch.looks = False  # it draws, too, and puts the generators back
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    seen: list = []
    for _ in range(2):
        optimizer.step(lambda: p.sum() + draw(seen))
    rest: list = []
    draw(rest)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    expected: list = []
    for _ in range(3):
        draw(expected)
    passes = len(seen) // 2
    assert [set(seen[:passes]), set(seen[passes:])] == [{x} for x in expected[:2]]
    assert rest == expected[2:]


def test_a_loss_that_draws_noise_gives_the_derivative_of_a_linear_loss():
    """Of n + w . x the derivative along z is z . x, whatever noise n was drawn."""
    found = []
    for noise in (0.0, 1.0):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = MeZO([("p", p)], lr=0.0, seed=1, common_random_numbers=True)

        def loss(p=p, noise=noise) -> torch.Tensor:
            return p.sum() + noise * torch.randn((), dtype=torch.float64)

        found.append(optimizer.estimate(loss).projected_grad)
    assert found[0] == pytest.approx(found[1], abs=1e-11)  # roundings of the losses, over 2 eps


@pytest.mark.parametrize("given", ["0.5", 1j])
def test_a_loss_that_is_no_number_is_refused_in_a_sentence(given):
    """float() would take the text, and end in a traceback for the complex number."""
    with pytest.raises(InputError, match=r"the closure returned a (str|complex): return the loss"):
        number(given)


class Router(torch.nn.Module):
    """A layer that converts itself in its forward pass, as routers of experts do."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.classifier, self.dtype = torch.nn.Linear(8, 4), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier.to(self.dtype)(x.to(self.dtype))


@pytest.mark.parametrize("form", ["scratch", "low_rank"])
def test_a_module_that_converts_itself_to_what_it_is_sees_one_perturbation(form):
    """It was perturbed by the conversion and by the product; the weight itself was moved."""
    torch.manual_seed(0)
    model, plain, x = Router(torch.float32), torch.nn.Linear(8, 4), torch.randn(16, 8)
    plain.load_state_dict(model.classifier.state_dict())
    before = plain.weight.detach().clone()
    options = {"lr": 0.0, "seed": 5, "perturbation": form}
    named = [("classifier." + name, p) for name, p in plain.named_parameters()]
    expected = MeZO(named, **options).estimate(lambda: plain(x).square().mean())
    found = MeZO(model.named_parameters(), **options).estimate(lambda: model(x).square().mean())
    assert found == expected
    assert torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize("form", ["scratch", "low_rank"])
def test_a_forward_pass_that_replaces_a_weight_is_refused_and_the_weight_stays(form):
    """The data would be theta + eps z for ever."""
    model = Router(torch.float64)
    before = model.classifier.weight.detach().clone()
    optimizer = MeZO(model.named_parameters(), lr=0.0, seed=5, perturbation=form)
    with pytest.raises(InputError, match=r"replaces the trained parameter classifier.weight"):
        optimizer.step(lambda: model(torch.ones(2, 8)).mean())
    assert torch.equal(model.classifier.weight, before)
