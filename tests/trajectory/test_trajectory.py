"""The run log: format, replay to the bit, damage, refusals."""

import copy
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import textwrap
import zlib

import pytest
import torch
from logs import run
from models import Regression, weights
from processes import SEARCHED

from mezo import MeZO, trajectory
from mezo.errors import InputError
from mezo.trajectory.program import Write, program_of


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_samples": 3, "weight_decay": 0.1},
        {"distribution": "rademacher", "eps": 1e-2},
        {"rule": "adam"},
        {"perturbation": "low_rank", "interval": 9},  # the last of ten steps has one of its own
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_replay_has_the_bits_of_the_run(tmp_path, options, dtype):
    options = options | ({"perturbation": "in_place"} if dtype == torch.bfloat16 else {})
    base, model = run(tmp_path / "run.mezo", model=Regression(dtype), **options)
    assert not torch.equal(weights(base), weights(model))
    trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(base), weights(model))


def test_only_low_rank_updates_are_written(tmp_path):
    """Of ten steps with an interval of 4: after steps 3 and 7, and at the end."""
    found = {}
    for form in ("in_place", "low_rank"):
        run(tmp_path / f"{form}.mezo", perturbation=form, interval=4)
        log = trajectory.read(tmp_path / f"{form}.mezo")
        actions = program_of(log.header, log.steps, 0).actions
        found[form] = [action.step for action in actions if isinstance(action, Write)]
    assert found == {"in_place": [], "low_rank": [3, 7, 9]}


def test_replay_repeats_what_went_wrong_too(tmp_path):
    """A raised closure, a NaN loss, accumulation, a schedule, another eps: still to the bit."""
    model = Regression(torch.float32)
    base = copy.deepcopy(model)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=6, weight_decay=0.1, num_samples=2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        for step in range(20):
            if step == 5:
                with pytest.raises(ZeroDivisionError):
                    optimizer.step(lambda: 1 / 0)
            if step == 8:
                optimizer.step(lambda: float("nan"))
            if step == 10:
                for probe in (0, 0, 1):
                    optimizer.estimate(model, probe)
                optimizer.step()
            if step == 12:
                optimizer.param_groups[0]["eps"] = 2e-3
            optimizer.step(model)
            scheduler.step()
    trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(base), weights(model))


def test_replay_to_an_earlier_step(tmp_path):
    _, half = run(tmp_path / "half.mezo", steps=4)
    base, _ = run(tmp_path / "run.mezo", steps=9)
    trajectory.replay(tmp_path / "run.mezo", base, until=4)
    assert torch.equal(weights(base), weights(half))


def test_plain_mezo_costs_16_bytes_a_step(tmp_path):
    run(tmp_path / "a.mezo", steps=100)
    run(tmp_path / "b.mezo", steps=200)
    assert os.path.getsize(tmp_path / "b.mezo") - os.path.getsize(tmp_path / "a.mezo") == 1600


def test_the_file_is_what_the_specification_says(tmp_path):
    """A reader written from docs/trajectory.md, with nothing of the package."""
    _, model = run(tmp_path / "run.mezo", steps=3)
    log, data = trajectory.read(tmp_path / "run.mezo"), (tmp_path / "run.mezo").read_bytes()
    assert data[:8] == b"\x89MEZO\r\n\x1a"
    (length,) = struct.unpack_from("<I", data, 8)
    header = json.loads(data[12 : 12 + length])
    assert zlib.crc32(data[12 : 12 + length]) == struct.unpack_from("<I", data, 12 + length)[0]
    assert header["format"] == 1
    assert header["noise"] == 1
    assert header["seed"] == 6
    assert header["config"] == {"task": "toy"}
    assert [t["name"] for t in header["tensors"]] == ["first", "bias", "last"]
    at = 16 + length
    for step in range(3):
        g, loss, crc = struct.unpack_from("<dfI", data, at)
        assert zlib.crc32(struct.pack("<Qdf", step, g, loss)) == crc
        assert (g,) == log.steps[step].record.projected_grads
        at += 16
    assert data[at : at + 8] == data[:8]  # a segment without records: what the weights are now
    (length,) = struct.unpack_from("<I", data, at + 8)
    last = json.loads(data[at + 12 : at + 12 + length])
    assert at + 16 + length == len(data)
    expected = [hashlib.sha256(p.detach().numpy().tobytes()) for p in model.parameters()]
    assert last["digests"] == "".join(one.hexdigest()[:4] for one in expected)


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    """Steps after the checkpoint were lost with the process; their records go too."""
    path = tmp_path / "run.mezo"
    base, expected = run(path, steps=9)
    twin = copy.deepcopy(base)
    optimizer = MeZO(twin.named_parameters(), lr=1e-2, seed=6)
    for _ in range(4):
        optimizer.step(twin)
    with trajectory.record(optimizer, path, resume=True):
        for _ in range(5):
            optimizer.step(twin)
    assert len(trajectory.read(path).steps) == 9
    trajectory.replay(path, base)
    assert torch.equal(weights(base), weights(expected))


def test_resuming_another_run_is_refused(tmp_path):
    path = tmp_path / "run.mezo"
    base, _ = run(path, steps=3)
    optimizer = MeZO(base.named_parameters(), seed=7)
    with pytest.raises(InputError, match="log of another run"):
        trajectory.record(optimizer, path, resume=True)
    optimizer = MeZO(base.named_parameters(), seed=6)
    optimizer.param_groups[0]["step"] = 5
    with pytest.raises(InputError, match="ends at step 3, and the run to continue is at 5"):
        trajectory.record(optimizer, path, resume=True)
    with pytest.raises(InputError, match="no log to continue, and the run is at step 5"):
        trajectory.record(optimizer, tmp_path / "none.mezo")
    assert not (tmp_path / "none.mezo").exists()


def test_two_writers_of_one_log_are_refused(tmp_path):
    base = Regression()
    optimizer = MeZO(base.named_parameters(), seed=6)
    with (
        trajectory.record(optimizer, tmp_path / "run.mezo"),
        pytest.raises(InputError, match="another run is writing this log"),
    ):
        trajectory.record(optimizer, tmp_path / "run.mezo")


def test_a_wrong_base_model_is_refused_by_the_first_tensor_that_differs(tmp_path):
    base, _ = run(tmp_path / "run.mezo")
    with torch.no_grad():
        base.bias[3] += 1e-6
    before = weights(base)
    with pytest.raises(InputError, match="another base model: sha256 of bias is"):
        trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(base), before)
    with pytest.raises(InputError, match="no parameter first"):
        trajectory.replay(tmp_path / "run.mezo", torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="dtype of first is float64, the log has float32"):
        trajectory.replay(tmp_path / "run.mezo", Regression(torch.float64))


def test_a_torn_record_at_the_end_is_left_out(tmp_path):
    """Whatever byte a killed run stopped at, all whole records are read."""
    path = tmp_path / "run.mezo"
    run(path, steps=3)
    data, ends = path.read_bytes(), trajectory.read(path).ends
    for size in range(ends[0], len(data)):
        path.write_bytes(data[:size])
        log = trajectory.read(path)
        assert len(log.steps) == sum(end <= size for end in ends)
        assert log.torn == size - max(end for end in ends if end <= size)


def test_damage_is_found_and_what_stands_before_it_is_kept(tmp_path):
    """Any flipped bit of any byte is noticed, by message, never by another exception."""
    path = tmp_path / "run.mezo"
    run(path, steps=5)
    data, ends = path.read_bytes(), trajectory.read(path).ends
    generator = random.Random(0)
    for at in [*generator.sample(range(ends[0] - 16), 200), *range(ends[0] - 16, len(data) - 16)]:
        broken = bytearray(data)
        broken[at] ^= 1 << generator.randrange(8)
        path.write_bytes(broken)
        with pytest.raises(InputError):
            trajectory.read(path)
        if at >= ends[0]:
            kept = trajectory.read(path, recover=True)
            assert len(kept.steps) == sum(end <= at for end in ends)
            assert kept.torn == len(data) - kept.ends[-1]


def test_damage_in_a_later_header_is_not_taken_for_its_end(tmp_path):
    """A length that reaches beyond the end of the file would hide all records behind it."""
    path, model = tmp_path / "run.mezo", Regression()
    optimizer = MeZO(model.named_parameters(), seed=6)
    writer = trajectory.record(optimizer, path)
    for eps in (1e-3, 2e-3):
        optimizer.param_groups[0]["eps"] = eps
        optimizer.step(model)
    writer.close()
    data, first = path.read_bytes(), trajectory.read(path).ends[0]
    for at in range(first, len(data) - 16):
        for bit in (0, 3, 6):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            path.write_bytes(broken)
            with pytest.raises(InputError):
                trajectory.read(path)
    for size in range(first, len(data) - 16):
        path.write_bytes(data[:size])
        log = trajectory.read(path)
        assert (len(log.steps), log.torn) == (1, size - first)


def test_bytes_that_are_no_log_are_refused(tmp_path):
    path = tmp_path / "run.mezo"
    with pytest.raises(InputError, match="No such file"):
        trajectory.read(path)
    generator = random.Random(1)
    for size in (0, 1, 7, 8, 11, 12, 100):
        path.write_bytes(generator.randbytes(size))
        with pytest.raises(InputError):
            trajectory.read(path)
        path.write_bytes(trajectory.format.MAGIC + generator.randbytes(size))
        with pytest.raises(InputError):
            trajectory.read(path)


def test_a_newer_format_asks_for_an_upgrade(tmp_path, monkeypatch):
    path = tmp_path / "run.mezo"
    monkeypatch.setattr(trajectory.writer, "FORMAT", 2)
    run(path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="upgrade mezo-lm"):
        trajectory.read(path)


def test_another_base_under_the_trained_weights_is_refused(tmp_path):
    """The frozen weights (an adapter's base) are part of what a run started from."""
    model = Regression(torch.float32)
    model.last.requires_grad_(False)
    base, _ = run(tmp_path / "run.mezo", model=model)
    with torch.no_grad():
        base.last.add_(1e-3)
    with pytest.raises(InputError, match="frozen are not those of this model"):
        trajectory.replay(tmp_path / "run.mezo", base)


def test_killing_the_process_loses_at_most_the_step_in_flight(tmp_path):
    """kill -9 at a random moment: the log holds every finished step, and replays."""
    script = textwrap.dedent(
        """
        import os, sys, torch
        from models import Regression
        from mezo import MeZO, trajectory
        model = Regression(torch.float32)
        optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=6)
        with trajectory.record(optimizer, sys.argv[1]):
            for step in range(10**9):
                optimizer.step(model)
                os.write(1, b".")
        """
    )
    path = tmp_path / "run.mezo"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": SEARCHED},
    )
    assert process.stdout is not None
    process.stdout.read(57)
    process.kill()
    finished = 57 + len(process.stdout.read())
    process.stdout.close()
    process.wait()
    steps = len(trajectory.read(path).steps)
    assert finished <= steps <= finished + 1
    base, expected = run(tmp_path / "whole.mezo", steps=steps)
    trajectory.replay(path, base)
    assert torch.equal(weights(base), weights(expected))
