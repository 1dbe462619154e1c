"""The health of a run on rewards: its figures against brute force, its rules one by one."""

import logging
import statistics

import pytest
import torch

from mezo import noise
from mezo.errors import InputError
from mezo.rewards.health import Bounds, Health, advantages, repetition, share_changed


def rows(*tensors):
    return [(f"p{i}", t, noise.tensor_key(0, f"p{i}")) for i, t in enumerate(tensors)]


def test_repetition_is_the_share_of_grams_seen_before():
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == 1 / 5
    assert repetition([[7] * 10, list(range(10))]) == pytest.approx(6 / 14)
    assert repetition([[1, 2, 3]]) == 0


def test_the_share_that_an_update_changes_is_that_of_a_real_update():
    """bfloat16 near 1 has steps of 2^-8: an update of 2^-12 z changes few weights to nearest."""
    weight = torch.ones(3000).bfloat16()
    moves = [noise.Move(0, 0, 1.0, 2.0**-10)]
    after = weight.clone()
    noise.apply_(after, noise.tensor_key(0, "p0"), moves)
    expected = float((after != weight).double().mean())
    assert 0 < expected < 0.5
    assert share_changed(rows(weight), moves, "gaussian") == expected
    assert share_changed(rows(torch.ones(3000)), moves, "gaussian") == pytest.approx(1, abs=1e-2)
    assert torch.equal(weight, torch.ones(3000).bfloat16())


def test_advantages_are_grpos_over_a_population():
    """Per prompt: centred, divided by the standard deviation; prompts without a spread count 0."""
    members = [[1.0, 5.0, 0.0], [3.0, 5.0, None], [2.0, 5.0, 1.0]]
    first = [(r - 2) / statistics.pstdev([1, 3, 2]) for r in (1, 3, 2)]
    third = [-1, 0, 1]
    expected = [(a + b) / 3 for a, b in zip(first, third, strict=True)]
    assert advantages(members) == pytest.approx(expected)
    assert advantages([[None], [None]]) == [0, 0]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"ties": 0.95}, "95 % of estimates tied"),
        ({"changed": 0.001}, "changes 0.1 % of weights"),
        ({"repetition": 0.6}, "60 % of 4-grams"),
        ({"clipped": 1.0}, "100 % of texts are cut"),
        ({"held_out": 3.5}, "risen by 0.50 nats"),
    ],
)
def test_a_rule_warns_once(figures, words, caplog):
    health = Health()
    fine = {"ties": 0.1, "changed": 0.9, "repetition": 0.1, "clipped": 0.2, "held_out": 3.0}
    with caplog.at_level(logging.WARNING, "mezo"):
        assert not health.judge(fine, 100)
        assert caplog.messages == []
        assert not health.judge(figures, 100)
        assert not health.judge(figures, 100)
    (message,) = caplog.messages
    assert words in message
    assert message.startswith("health: ")


def test_few_estimates_are_not_judged_by_their_ties(caplog):
    Health().judge({"ties": 1.0}, 19)
    assert caplog.messages == []


def test_texts_that_repeat_from_the_start_are_no_finding(caplog):
    """A base model that repeats itself is not made to by the reward."""
    health = Health()
    for share in (0.5, 0.6):
        health.judge({"repetition": share})
    assert caplog.messages == []


def test_a_run_stops_where_it_was_told_to():
    health = Health(Bounds(stop_forgotten=1.0))
    assert not health.judge({"held_out": 2.0})
    assert not health.judge({"held_out": 2.9})
    assert health.judge({"held_out": 3.0})
    with pytest.raises(InputError, match="stop_forgotten must be positive"):
        Bounds(stop_forgotten=0.0)
