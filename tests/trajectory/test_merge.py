"""Logs of one run, each of a range of its steps: begun in mid-run, replayed, and joined."""

import copy
import json
import math

import pytest
import torch
from logs import make_parts, steps
from models import Regression, weights

from mezo import MeZO, trajectory
from mezo.errors import InputError
from mezo.trajectory.files import read


@pytest.fixture
def parts(tmp_path):
    return make_parts(tmp_path)


def at(step, states, dtype=torch.float32):
    model = Regression(dtype)
    model.load_state_dict(states[step])
    return model


def test_a_log_may_begin_in_mid_run(tmp_path, parts):
    """It replays onto the weights at its first step, and onto no others."""
    _, states = parts
    log = read(tmp_path / "4-9.mezo")
    assert (log.start, log.end, len(log.steps)) == (4, 9, 5)
    assert [step.record.step for step in log.steps] == [4, 5, 6, 7, 8]
    found = trajectory.replay(tmp_path / "4-9.mezo", at(4, states))
    assert torch.equal(weights(found), weights(at(9, states)))
    found = trajectory.replay(tmp_path / "4-9.mezo", at(4, states), until=6)
    assert torch.equal(weights(found), weights(at(6, states)))
    with pytest.raises(InputError, match="starts from another base model: sha256 of first"):
        trajectory.replay(tmp_path / "4-9.mezo", at(0, states))
    with pytest.raises(InputError, match="5 steps, until must be from 4 to 9, got 3"):
        trajectory.replay(tmp_path / "4-9.mezo", at(4, states), until=3)


def test_a_log_begun_in_mid_run_goes_on(tmp_path, parts):
    _, states = parts
    model, path = at(6, states), tmp_path / "4-9.mezo"
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=6)
    optimizer.param_groups[0]["step"] = 6
    with trajectory.record(optimizer, path, resume=True):
        steps(model, optimizer, 9)
    assert torch.equal(weights(model), weights(at(9, states)))
    assert [s.record for s in read(path).steps][-1] == [s.record for s in whole(tmp_path)][-1]
    optimizer.param_groups[0]["step"] = 3
    with pytest.raises(InputError, match="begins at step 4, and the run to continue is at 3"):
        trajectory.record(optimizer, path, resume=True)
    model = at(4, states)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=6)
    optimizer.param_groups[0]["step"] = 4
    assert trajectory.catch_up(path, optimizer) == 5
    assert torch.equal(weights(model), weights(at(9, states)))


def whole(folder):
    return read(folder / "whole.mezo").steps


def told(steps):
    return [repr(step) for step in steps]  # a NaN is not equal to itself


@pytest.mark.parametrize(
    "names",
    [
        ["0-4", "4-9"],
        ["4-9", "0-6"],  # in any order, overlapping
        ["6-9", "0-4", "4-6"],
        ["0-4", "0-6", "4-9", "4-6", "6-9", "whole", "0-4"],
    ],
)
def test_logs_of_one_run_merge_into_the_uninterrupted_one(tmp_path, parts, names):
    base, states = parts
    out = tmp_path / "merged.mezo"
    trajectory.merge([tmp_path / f"{name}.mezo" for name in names], out)
    assert told(read(out).steps) == told(whole(tmp_path))
    assert read(out).header["tensors"] == read(tmp_path / "whole.mezo").header["tensors"]
    assert torch.equal(weights(trajectory.replay(out, base)), weights(at(9, states)))


def test_a_merged_log_goes_on(tmp_path, parts):
    _, states = parts
    out, model = tmp_path / "merged.mezo", at(9, states)
    trajectory.merge([tmp_path / "0-4.mezo", tmp_path / "4-9.mezo"], out)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=6)
    optimizer.param_groups[0]["step"] = 9
    with trajectory.record(optimizer, out, resume=True):
        steps(model, optimizer, 12)
    base = trajectory.replay(out, parts[0])
    assert torch.equal(weights(base), weights(model))


def test_the_first_log_may_itself_begin_in_mid_run(tmp_path, parts):
    trajectory.merge([tmp_path / "4-6.mezo", tmp_path / "6-9.mezo"], tmp_path / "merged.mezo")
    assert told(read(tmp_path / "merged.mezo").steps) == told(whole(tmp_path)[4:])


@pytest.mark.parametrize("rounding", ["compensated", "master"])
def test_buffers_of_a_rounding_are_in_no_log_that_begins_in_mid_run(tmp_path, rounding):
    """So it is not replayed alone, but as a part of the whole."""
    base, states = make_parts(tmp_path, torch.bfloat16, rounding=rounding, lr=1e-3)
    with pytest.raises(InputError, match=f"without the buffers of {rounding} rounding: merge it"):
        trajectory.replay(tmp_path / "4-9.mezo", at(4, states, torch.bfloat16))
    trajectory.merge([tmp_path / "0-4.mezo", tmp_path / "4-9.mezo"], tmp_path / "merged.mezo")
    found = trajectory.replay(tmp_path / "merged.mezo", base)
    assert torch.equal(weights(found), weights(at(9, states, torch.bfloat16)))


def test_a_gap_is_named(tmp_path, parts):
    with pytest.raises(InputError, match=r"6-9.mezo starts at step 6, and .*0-4.mezo ends at"):
        trajectory.merge([tmp_path / "6-9.mezo", tmp_path / "0-4.mezo"], tmp_path / "x.mezo")
    assert not (tmp_path / "x.mezo").exists()


def test_an_interrupted_step_gives_way_to_the_one_made_again(tmp_path, parts):
    """Ctrl-C ends a log with a refused step; the run that goes on elsewhere makes it."""
    base, states = parts
    for start, end in ((0, 4), (4, 6)):
        model, path = at(end, states), tmp_path / f"{start}-{end}.mezo"
        optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=6)
        optimizer.param_groups[0]["step"] = end
        with trajectory.record(optimizer, path, resume=True), pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert len(read(path).steps) == end - start + 1
    names = ["0-4", "4-6", "4-9"], ["0-6", "4-9", "0-4"], ["4-6", "whole"]
    for i, some in enumerate(names):
        trajectory.merge([tmp_path / f"{name}.mezo" for name in some], tmp_path / f"{i}.mezo")
        found = trajectory.replay(tmp_path / f"{i}.mezo", copy.deepcopy(base))
        assert torch.equal(weights(found), weights(at(9, states)))
    trajectory.merge([tmp_path / "0-6.mezo", tmp_path / "4-6.mezo"], tmp_path / "end.mezo")
    assert math.isnan(read(tmp_path / "end.mezo").steps[6].record.loss)  # nobody has made it


@pytest.mark.parametrize("change", ["loss", "lr", "eps"])
def test_a_contradiction_is_named_by_its_step(tmp_path, parts, change):
    _, states = parts
    model = at(4, states)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=6)
    optimizer.param_groups[0]["step"] = 4
    with trajectory.record(optimizer, tmp_path / "other.mezo", model=model, resume=True):
        steps(model, optimizer, 5)
        if change == "loss":
            optimizer.step(lambda: model() * 1.001)
        else:
            optimizer.param_groups[0][change] *= 1.5
        steps(model, optimizer, 7)
    match = r"0-6.mezo and .*other.mezo have different records of step 5"
    with pytest.raises(InputError, match=match):
        trajectory.merge([tmp_path / "0-6.mezo", tmp_path / "other.mezo"], tmp_path / "x.mezo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 7}, "their seed is 6 and 7"),
        ({"distribution": "rademacher"}, "their distribution is gaussian and rademacher"),
        ({"perturbation": "scratch"}, "their perturbation is in_place and scratch"),
        ({"rounding": "nearest"}, "their rounding is stochastic and nearest"),
    ],
)
def test_logs_of_two_runs_are_not_merged(tmp_path, parts, options, message):
    other = tmp_path / "other"
    other.mkdir()
    make_parts(other, **options)
    with pytest.raises(InputError, match=f"are not logs of one run: {message}"):
        trajectory.merge([tmp_path / "0-4.mezo", other / "4-9.mezo"], tmp_path / "x.mezo")


def test_logs_that_begin_with_other_weights_are_not_merged(tmp_path, parts):
    """At the same step; or with other frozen weights, at any."""
    for tensor, message in (("bias", "bias differs at step 0"), ("last", "frozen weights differ")):
        for start, name in ((0, "a"), (1, "b")):
            model = Regression(torch.float32)
            model.last.requires_grad_(tensor != "last")
            with torch.no_grad():
                getattr(model, tensor)[0] += start
            optimizer = MeZO([(n, p) for n, p in model.named_parameters() if p.requires_grad])
            with trajectory.record(optimizer, tmp_path / name, model=model):
                pass
        with pytest.raises(InputError, match=message):
            trajectory.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "x.mezo")


def test_losses_that_one_log_lacks_are_said_to_be_left_out(tmp_path, parts):
    base, states = parts
    small, out = tmp_path / "small.mezo", tmp_path / "merged.mezo"
    trajectory.compact(tmp_path / "0-6.mezo", small, losses=False)
    trajectory.merge([small, tmp_path / "4-9.mezo"], out)
    log = read(out)
    assert log.header["losses"] is False
    assert [math.isfinite(step.record.loss) for step in log.steps] == [False] * 6 + [
        True,
        False,
        True,
    ]
    assert torch.equal(weights(trajectory.replay(out, base)), weights(at(9, states)))
    with pytest.raises(InputError, match="exists: a log is not overwritten"):
        trajectory.merge([small], out)
    with pytest.raises(InputError, match="no log to merge"):
        trajectory.merge([], tmp_path / "x.mezo")


def test_the_start_is_in_the_file_as_the_specification_says(tmp_path, parts):
    data = (tmp_path / "4-9.mezo").read_bytes()
    assert json.loads(data[12 : 12 + int.from_bytes(data[8:12], "little")])["start"] == 4
