"""What MeZO refuses at the door."""

import pytest
import torch
from test_mezo import Regression

from mezo import MeZO
from mezo.errors import InputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"eps": -1e-3}, "eps must be positive, got -0.001"),
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"seed": 2**64}, "seed must be in"),
        ({"distribution": "normal"}, "distribution must be gaussian or rademacher, got 'normal'"),
    ],
)
def test_bad_options_are_refused_by_value(options, message):
    with pytest.raises(InputError, match=message):
        MeZO(Regression().named_parameters(), **options)


def test_tensors_that_cannot_be_trained_are_refused_by_name():
    def refused(tensor, message, **options):
        with pytest.raises(InputError, match=message):
            MeZO([("w", torch.nn.Parameter(tensor))], **options)

    refused(torch.zeros(3, device="meta"), "parameter w is on the meta device")
    for dtype in (torch.float16, torch.bfloat16):
        refused(torch.zeros(3, dtype=dtype), f"parameter w is {str(dtype)[6:]}: perturbing it")
        MeZO([("w", torch.nn.Parameter(torch.zeros(3, dtype=dtype)))], in_place=True)
    refused(torch.zeros(3, dtype=torch.complex64), "parameter w is complex64")
    refused(torch.eye(3).to_sparse(), "parameter w is sparse")
    MeZO([("w", torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))])


def test_two_parameters_on_one_memory_are_refused():
    """Each walk would move it twice (tied weights are one parameter, and fine)."""
    w = torch.zeros(3)
    with pytest.raises(InputError, match="parameters a and b share memory"):
        MeZO([("a", torch.nn.Parameter(w)), ("b", torch.nn.Parameter(w))])


def test_settings_of_the_direction_are_one_for_all_groups():
    model = Regression()
    groups = [{"params": [("a", model.first)]}, {"params": [("b", model.last)], "eps": 1e-2}]
    with pytest.raises(
        InputError, match=r"eps is one for all parameter groups, got 0.001 and 0.01"
    ):
        MeZO(groups)
