"""The compact form of a run log: every bit of it, in few bytes, and readable from its document."""

import hashlib
import json
import lzma
import math
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from logs import eventful, run
from models import weights

from mezo import MeZO, trajectory
from mezo.errors import InputError
from mezo.trajectory import columns
from mezo.trajectory.format import Segment, encode


def same(left, right):
    """Every header, setting and bit."""
    assert [s.header for s in left.segments] == [s.header for s in right.segments]
    for one, other in zip(left.segments, right.segments, strict=True):
        for name in ("grads", "losses", "lrs"):
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes()
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reading_the_compact_form_gives_the_same_log(tmp_path, dtype):
    """And a replay of it the same weights; written out in full again, it is the same file."""
    base, model = eventful(tmp_path / "run.mezo", dtype)
    trajectory.compact(tmp_path / "run.mezo", tmp_path / "small.mezo")
    log, small = (trajectory.read(tmp_path / name) for name in ("run.mezo", "small.mezo"))
    assert same(log, small)
    assert list(log.steps)[:5] == list(small.steps)[:5]
    assert (small.compact, small.torn) == (True, 0)
    trajectory.replay(tmp_path / "small.mezo", base)
    assert torch.equal(weights(base), weights(model))
    trajectory.merge([tmp_path / "small.mezo"], tmp_path / "again.mezo")
    assert (tmp_path / "again.mezo").read_bytes() == (tmp_path / "run.mezo").read_bytes()


def test_numbers_take_as_many_planes_as_the_largest_needs():
    for largest, planes in ((0, 0), (1, 1), (255, 1), (256, 2), (2**16 - 1, 2), (2**63, 8)):
        values = np.array([0, largest], "<u8")
        found, stream = columns.planes_of(values)
        assert found == planes
        assert (columns.values_of(stream, 2, found) == values).all()


def test_without_losses_a_replay_is_the_same(tmp_path):
    base, model = eventful(tmp_path / "run.mezo")
    trajectory.compact(tmp_path / "run.mezo", tmp_path / "small.mezo", losses=False)
    small = trajectory.read(tmp_path / "small.mezo")
    assert small.header["losses"] is False
    assert all(math.isnan(step.record.loss) for step in small.steps)
    trajectory.compact(tmp_path / "small.mezo", tmp_path / "other.mezo")
    assert same(small, trajectory.read(tmp_path / "other.mezo"))
    trajectory.replay(tmp_path / "small.mezo", base)
    assert torch.equal(weights(base), weights(model))


def logged(path, grads, losses, lrs=None, tensors=2):
    """A log of 1 probe and 1 group, eps 1e-3, from its columns."""
    digest = hashlib.sha256
    entries = [
        {"name": f"model.layers.{i // 8}.mlp.{i % 8}.weight", "shape": [64, 64], "group": 0}
        | {"dtype": "float32", "sha256": digest(bytes([i % 256, i // 256])).hexdigest()[:16]}
        for i in range(tensors)
    ]
    header = {"format": 1, "noise": 1, "seed": 1, "distribution": "gaussian", "rule": "sgd"}
    header |= {"perturbation": "in_place", "rounding": "stochastic", "config": {}, "versions": {}}
    header |= {"frozen": None, "tensors": entries, "start": 0, "eps": 1e-3, "cycles": [1]}
    header |= {"lr": [1e-6], "weight_decay": [0.0], "lr_in_records": lrs is not None}
    n = len(grads)
    lrs = np.empty((n, 0)) if lrs is None else lrs.reshape(n, 1)
    segment = Segment(header, np.reshape(grads, (n, 1)), np.asarray(losses, "<f4"), lrs)
    path.write_bytes(encode([segment]))


def realistic(steps):
    """(grads, losses) as a language model has them: float32 losses from 0.8 to 0.35, g of 3."""
    generator = np.random.default_rng(0)
    loss = np.linspace(0.8, 0.35, steps) + generator.normal(0, 0.08, steps)
    change = 1e-3 * generator.normal(0, 3, steps)
    plus, minus = ((loss + sign * change).astype("f4").astype("f8") for sign in (1, -1))
    return (plus - minus) / (2 * 1e-3), (plus + minus) / 2


def test_20000_steps_take_under_60_kilobytes(tmp_path):
    """A header of 650 tensors included. The bits of noise in two losses are what is left."""
    logged(tmp_path / "run.mezo", *realistic(20_000), tensors=650)
    sizes = []
    for losses in (True, False):
        trajectory.compact(tmp_path / "run.mezo", tmp_path / f"{losses}.mezo", losses=losses)
        data = (tmp_path / f"{losses}.mezo").read_bytes()
        sizes.append((len(data) - struct.unpack_from("<I", data, 12)[0]) / 20_000)
        assert losses or len(data) < 60_000
    assert sizes[0] < 5.5
    assert sizes[1] < 2.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_of_the_learning_rate_takes_a_byte_a_step(tmp_path, schedule):
    grads, losses = realistic(5000)
    done = np.arange(5000) / 5000
    lrs = 1e-6 * (1 - done if schedule == "linear" else (1 + np.cos(np.pi * done)) / 2)
    sizes = []
    for given in (None, lrs):
        logged(tmp_path / "run.mezo", grads, losses, given)
        trajectory.compact(tmp_path / "run.mezo", tmp_path / f"{len(sizes)}.mezo")
        sizes.append(os.path.getsize(tmp_path / f"{len(sizes)}.mezo"))
    assert sizes[1] - sizes[0] < (0.2 if schedule == "linear" else 1.2) * 5000


def test_numbers_that_are_no_difference_of_losses_are_kept_whole(tmp_path):
    """Any bits at all: signed zeros, subnormals, infinities, numbers too large for a code."""
    generator = np.random.default_rng(0)
    odd = [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1e308, 2.0**60, -(2.0**-60)]
    noise = generator.integers(0, 2**64, 5000, np.uint64).view("f8")
    grads = np.concatenate([odd, noise, realistic(5000)[0], odd])
    losses = generator.integers(0, 2**32, len(grads), np.uint32).view("f4")
    lrs = generator.integers(0, 2**64, len(grads), np.uint64).view("f8")
    logged(tmp_path / "run.mezo", grads, losses, lrs)
    trajectory.compact(tmp_path / "run.mezo", tmp_path / "small.mezo")
    log, small = (trajectory.read(tmp_path / name) for name in ("run.mezo", "small.mezo"))
    assert same(log, small)


def test_a_log_without_steps_is_compact_too(tmp_path):
    run(tmp_path / "run.mezo", steps=0)
    trajectory.compact(tmp_path / "run.mezo", tmp_path / "small.mezo")
    assert len(trajectory.read(tmp_path / "small.mezo").steps) == 0


def test_the_file_is_what_the_specification_says(tmp_path):
    """A reader written from docs/trajectory.md, of numbers in pure Python."""
    grads, losses = realistic(5000)
    grads[7], lrs = math.pi, 1e-6 * (1 - np.arange(5000) / 5000)
    logged(tmp_path / "run.mezo", grads, losses, lrs)
    trajectory.compact(tmp_path / "run.mezo", tmp_path / "small.mezo")
    data = (tmp_path / "small.mezo").read_bytes()
    assert data[:8] == b"\x89MEZC\r\n\x1a"
    assert zlib.crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0]
    length, size = struct.unpack_from("<II", data, 8)
    text, at = lzma.decompress(data[16 : 16 + size]), 16 + size
    assert len(text) == length
    head = json.loads(text)
    (segment,) = head["segments"]
    assert (head["compact"], segment["steps"], len(segment["exponents"])) == (1, 5000, 2)
    found = {}
    for name in ("grads", "exceptions", "lrs", "losses"):
        column = head["columns"][name]
        count, planes = column["values"], column["planes"]
        raw = lzma.decompress(data[at : at + column["bytes"]])
        at += column["bytes"]
        found[name] = [
            sum(raw[plane * count + i] << 8 * plane for plane in range(planes))
            for i in range(count)
        ]
    assert at == len(data) - 4

    def signed(code):
        return code >> 1 if code % 2 == 0 else -(code + 1 >> 1)

    exceptions, expected = iter(found["exceptions"]), []
    for i, code in enumerate(found["grads"]):
        if code:
            q = segment["exponents"][i // 4096]
            expected.append(signed(code - 1) * 2.0**-q / (2 * segment["header"]["eps"]))
        else:
            expected.append(struct.unpack("<d", struct.pack("<Q", next(exceptions)))[0])
    assert expected == grads.tolist()
    rates = [signed(code) for code in found["lrs"]]
    for _ in range(segment["order"]):
        total = 0
        for i, rate in enumerate(rates):
            rates[i] = total = (total + rate) % 2**64
    assert [struct.unpack("<d", struct.pack("<Q", x))[0] for x in rates] == lrs.tolist()
    bits = [struct.unpack("<f", struct.pack("<I", x))[0] for x in found["losses"]]
    assert bits == losses.astype("f4").tolist()


def test_a_compact_log_is_complete(tmp_path):
    """It is not appended to, and nothing is written over another file."""
    base, _ = run(tmp_path / "run.mezo", steps=3)
    trajectory.compact(tmp_path / "run.mezo", tmp_path / "small.mezo")
    with pytest.raises(InputError, match="exists: a log is not overwritten"):
        trajectory.compact(tmp_path / "run.mezo", tmp_path / "small.mezo")
    with pytest.raises(InputError, match="is compact, and complete"):
        trajectory.record(
            MeZO(base.named_parameters(), seed=6), tmp_path / "small.mezo", resume=True
        )


def test_damage_anywhere_is_found(tmp_path):
    eventful(tmp_path / "run.mezo")
    trajectory.compact(tmp_path / "run.mezo", tmp_path / "small.mezo")
    data, path = (tmp_path / "small.mezo").read_bytes(), tmp_path / "broken.mezo"
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        with pytest.raises(InputError):
            trajectory.read(path)
        path.write_bytes(data[:at])
        with pytest.raises(InputError):
            trajectory.read(path, recover=True)


@pytest.mark.parametrize("order", columns.ORDERS)
def test_learning_rates_come_back_from_differences_of_any_order(order):
    """Of their bits: those that are small differences of an order are found to be that."""
    bits = np.random.default_rng(0).integers(-1, 2, (50, 2)).view(np.uint64)
    for i in range(order):
        bits = np.cumsum(bits, 0, np.uint64) + np.uint64(2**50 >> 9 * i)
    codes, found = columns.codes_of_lrs(bits.view("f8"))
    assert found == order
    assert np.array_equal(columns.lrs_of_codes(codes, order, 50).view("u8"), bits)
