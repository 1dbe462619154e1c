"""Values of a run's start that a log holds: checked when read, and never forced on a model."""

import base64

import pytest
import torch

from mezo.trajectory import start_values

ENTRY = {"name": "w", "shape": [2, 3], "dtype": "float32"}
VALUE = torch.arange(6.0).view(2, 3)


def header(values):
    return {"tensors": [ENTRY], "start_values": values}


def text(tensor):
    return base64.b64encode(tensor.numpy().tobytes()).decode()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([], "not an object"),
        ({"w": 3}, "not in base64"),
        ({"w": "?"}, "not in base64"),
        ({"w": text(VALUE[0])}, "not those of its tensors"),
        ({"w": ""}, "not those of its tensors"),
        ({"v": text(VALUE)}, "not those of its tensors"),
        ({"w": text(VALUE)}, None),
    ],
)
def test_values_that_are_not_a_tensor_s_are_damage(values, problem):
    """A log may come from anybody: a value that does not fit must not reach a tensor."""
    assert start_values.problem_of(header(values)) == problem


def test_the_values_are_put_in_place_and_only_where_they_fit():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    start_values.put_(header({"w": text(VALUE)}), {"w": weight})
    assert torch.equal(weight, VALUE)
    for other in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.bfloat16)):
        start_values.put_(header({"w": text(VALUE)}), {"w": other})
        assert not other.any()
    start_values.put_(header({"w": text(VALUE)}), {})


def test_a_model_without_an_adapter_keeps_nothing():
    assert start_values.encoded(torch.nn.Linear(2, 2), {"weight": VALUE}) == {}
    assert start_values.encoded(None, {"weight": VALUE}) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_kept_is_put_back_to_the_bit(monkeypatch, dtype):
    """Row by row, whatever the memory's order; a tensor that is not kept stays."""
    monkeypatch.setattr(start_values, "kept_start", lambda model, named: ["w"])
    weight = torch.arange(6.0).view(3, 2).t().to(dtype) / 7
    found = start_values.encoded(None, {"w": weight, "v": VALUE})
    name = str(dtype).removeprefix("torch.")
    entry = {"name": "w", "shape": [2, 3], "dtype": name}
    made = torch.zeros(2, 3, dtype=dtype)
    head = {"tensors": [entry, ENTRY | {"name": "v"}]} | found
    assert start_values.problem_of(head) is None
    other = torch.zeros(2, 3)
    start_values.put_(head, {"w": made, "v": other})
    assert torch.equal(made, weight)
    assert not other.any()
