"""Equal budgets: the steps and batches that make forward passes, time or memory equal."""

import math

import pytest

from mezo.compare import recipes, referee
from mezo.compare.page import html_of_several, table
from mezo.errors import InputError

METHODS = ("zero-shot", "mezo", "fzoo", "ft", "lora-checkpointing", "prefix")
SIZES = {"in_place": lambda batch: 100 + batch, "adam_checkpointing": lambda batch: 300}
SIZES["lora_checkpointing"] = lambda batch: 105 + 2 * batch


def grids(methods=METHODS):
    return {method: recipes.recipe(method, 10**7, 100, 10) for method in methods}


def memory(plan, batch):
    return SIZES[plan](batch) * 2**20


def at_equal(kind, methods=METHODS, seconds=lambda method, grid: 1.0):
    return referee.at_equal(kind, grids(methods), memory, seconds)


def test_at_equal_passes_all_methods_take_as_many_examples_through_the_model():
    """MeZO's 100 steps are 3,200 examples forward; Adam's step at 8 is 24, checkpointed 32."""
    made, refused = at_equal("passes")
    assert not refused
    assert {name: grid.get("max_steps") for name, grid in made.items()} == {
        "zero-shot": None,
        "mezo": 100,
        "fzoo": round(3200 / (9 * 16)),
        "ft": round(3200 / 24),
        "lora-checkpointing": 100,
        "prefix": round(3200 / 24),
    }


def test_at_equal_time_steps_are_as_many_as_the_seconds_allow():
    took = {"mezo": 2.0, "fzoo": 8.0, "ft": 0.5, "lora-checkpointing": 1.0, "prefix": 4.0}
    made, _ = at_equal("time", seconds=lambda method, grid: took[method])
    assert [made[name]["max_steps"] for name in took] == [100, 25, 400, 200, 50]


def test_at_equal_memory_the_largest_batch_that_fits_is_taken():
    """LoRA takes 105 + 2 b, where MeZO has 116 at its batch of 16: b = 4, of the batches tried."""
    made, refused = at_equal("memory")
    own = made["lora-checkpointing"]
    assert own["per_device_train_batch_size"] == 4
    assert own["max_steps"] == 100 * 32 // (4 * 4)
    assert refused == {
        "ft": "does not fit: 300 MiB at batch 1, where MeZO takes 116 at 16",
        "prefix": "its memory is not estimated",
    }
    assert made["mezo"] == grids()["mezo"]


def test_a_budget_needs_a_mezo_run_and_one_batch():
    with pytest.raises(InputError, match="add mezo to --methods"):
        at_equal("passes", ("ft", "lora"))
    with pytest.raises(InputError, match="equal must be one of steps, passes"):
        at_equal("money")
    several = grids() | {"mezo": grids()["mezo"] | {"per_device_train_batch_size": [8, 16]}}
    with pytest.raises(InputError, match="one batch size"):
        referee.at_equal("passes", several, memory, lambda method, grid: 1.0)
    assert at_equal("steps", ("ft",)) == (grids(("ft",)), {})


def test_memory_is_the_estimate_of_mezo_memory():
    """Of causal-lm in float32, at 40 tokens: weights of 73 MiB, and LoRA at 4 fits where it is."""
    estimated = referee.memory_of("causal-lm", "auto", 40)
    room = estimated("in_place", 16)
    assert 4 * 19_112_448 < room < 4 * 19_112_448 + 2**24
    assert estimated("lora_checkpointing", 1) < room < estimated("lora_checkpointing", 16)
    assert estimated("adam_checkpointing", 1) > 4 * 4 * 19_112_448


def test_intervals_are_students():
    """Of three values, 4.303 standard errors to either side."""
    low, high = referee.interval([0.7, 0.8, 0.9])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (low, high) == (pytest.approx(0.8 - half), pytest.approx(0.8 + half))
    assert referee.interval([0.7]) is None


def test_one_page_has_a_section_for_each_budget():
    row = {"method": "mezo", "mean": 0.8, "std": 0.1, "interval": (0.55, 1.05), "n": 3}
    row |= {"peak_memory": 1, "seconds": 1.0, "forward_passes": 200, "stored_bytes": 1}
    found = {"task": "sst2", "model": "m", "metric": "accuracy", "parameters": 7, "rows": [row]}
    found |= {"seeds": [13], "grid": "none", "refused": {"ft": "does not fit: <much>"}}
    found |= {"cells": [], "environment": {}}
    assert table(found)[1][2] == "55.0 to 100.0"
    page = html_of_several({"passes": found, "memory": found}, {"passes": {}, "memory": {}})
    assert page.count("<table>") == 2
    assert "Equal forward passes" in page
    assert "does not fit: &lt;much&gt;" in page
