"""Logs that earlier versions wrote: they replay to the same bits for ever.

tests/frozen/make.py wrote them, with the code of commit 4da56f9 where it had the option in
question. A failure here means that runs of users can no longer be rebuilt. No log and no digest is
ever changed to make a test pass.
"""

import dataclasses
import inspect
import json
import struct

import pytest
import torch
from frozen.cells import CELLS
from frozen.make import DEFAULTS, INDEX, LOGS, rebuilt, write
from frozen.toy_models import digest, digests
from safetensors.torch import load_file, save_file

from mezo import MeZO, noise, trajectory
from mezo.forms.rounding import ROUNDINGS
from mezo.options.table import ESTIMATORS, FORMS, MODIFIED, SHAPINGS
from mezo.rules import RULES

FROZEN = json.loads(INDEX.read_text())
NAMES = sorted(FROZEN)
SOME_QUICK = [  # a run costs ten times a replay: two in three are made only with -m slow
    pytest.param(name, marks=[pytest.mark.slow] if place % 3 else [])
    for place, name in enumerate(NAMES)
]


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_log_replays_to_the_same_bits(name):
    """Whole, and until half of its steps, onto the model that it started from."""
    frozen = FROZEN[name]
    for until, expected in ((None, "final"), (frozen["until"], "half")):
        model = rebuilt(frozen["base"], LOGS)
        trajectory.replay(LOGS / frozen["log"], model, until=until)
        assert digests(model) == frozen[expected]


@pytest.mark.parametrize("name", NAMES[::4])
def test_a_frozen_log_replays_onto_files_to_the_same_bits(name, tmp_path):
    """A checkpoint is rebuilt tensor by tensor, by other code around the same moves."""
    frozen = FROZEN[name]
    model = rebuilt(frozen["base"], LOGS)
    (tmp_path / "base").mkdir()
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    trajectory.replay_checkpoint(LOGS / frozen["log"], tmp_path / "base", tmp_path / "tuned")
    found = load_file(tmp_path / "tuned" / "model.safetensors")
    assert {name: digest(found[name]) for name in frozen["final"]} == frozen["final"]
    assert torch.equal(found["head.weight"], model.get_parameter("head.weight"))


def test_a_frozen_log_changes_weights_with_every_step_it_has():
    """Or the digests would say nothing: the base, the half and the end are three models."""
    for name, frozen in FROZEN.items():
        base = digests(rebuilt(frozen["base"], LOGS))
        for parameter, first in base.items():
            found = {first, frozen["half"][parameter], frozen["final"][parameter]}
            assert len(found) == 3, f"{name}: {parameter}"


@pytest.mark.parametrize("name", SOME_QUICK)
def test_the_run_of_a_frozen_log_is_made_again_to_the_same_bits(name, tmp_path):
    """The forward half of the promise: the same log is written, and the same weights are left."""
    found = write(CELLS[name], tmp_path / f"{name}.mezo")
    assert found == FROZEN[name]
    assert _bytes(tmp_path / found["log"], tmp_path) == _bytes(LOGS / found["log"], tmp_path)


def test_the_frozen_logs_cover_every_option():
    """A new option, or a new value of an old one, needs a frozen log: see tests/frozen/make.py."""
    assert FROZEN.keys() == CELLS.keys()
    known = inspect.signature(MeZO.__init__).parameters.keys() - {"self", "params"}
    given = DEFAULTS.keys() | {key for cell in CELLS.values() for key in cell.options}
    assert known - given == {"max_refused"}  # it ends a run, and changes nothing in it
    for option, values in {
        "perturbation": FORMS,
        "distribution": noise.DISTRIBUTIONS,
        "estimator": ESTIMATORS,
        "shaping": (None, *SHAPINGS),
        "rounding": ROUNDINGS,
    }.items():
        default = inspect.signature(MeZO.__init__).parameters[option].default
        assert {c.options.get(option, default) for c in CELLS.values()} >= set(values), option
    layers = [cell.options["layers"] for cell in CELLS.values() if "layers" in cell.options]
    assert {one.get("modified") for one in layers} >= set(MODIFIED)
    dtypes = {entry["dtype"] for log in _logs() for entry in log.header["tensors"]}
    assert dtypes == {"float32", "float64", "bfloat16", "float16"}


@pytest.mark.parametrize("rule", RULES)
def test_the_frozen_logs_cover_every_rule_and_each_of_its_options(rule):
    """A new rule, or a new option of one, needs a frozen log in which it is not the default."""
    used = [c.options["rule"] for c in CELLS.values() if "rule" in c.options]
    used = [one for one in used if one["name"] == rule]
    assert used
    for field in dataclasses.fields(RULES[rule]):
        assert any(one.get(field.name, field.default) != field.default for one in used), field.name


def test_the_frozen_logs_have_every_part_of_the_format():
    """Both forms, with and without losses, several segments, own learning rates, writings."""
    logs = list(_logs())
    assert {log.compact for log in logs} == {True, False}
    assert any(log.header.get("losses") is False for log in logs)
    assert any(log.start > 0 for log in logs)
    headers = [segment.header for log in logs for segment in log.segments]
    assert any(header["lr_in_records"] for header in headers)
    assert any(header.get("written") for header in headers)
    assert any(max(header["cycles"]) > 1 for header in headers)
    assert any(len(header["lr"]) > 1 for header in headers)
    assert any(step.record.loss != step.record.loss for log in logs for step in log.steps)


def _logs():
    return (trajectory.read(LOGS / frozen["log"]) for frozen in FROZEN.values())


def _bytes(path, folder) -> tuple[list, bytes]:
    """The first header without the versions of packages, and all bytes after it.

    A compact log is made long before: other versions of liblzma compress the same to other bytes.
    """
    data = path.read_bytes()
    if trajectory.read(path).compact:
        long = folder / "long.mezo"
        long.unlink(missing_ok=True)
        trajectory.merge([path], long)
        data = long.read_bytes()
    (length,) = struct.unpack_from("<I", data, 8)
    header = json.loads(data[12 : 12 + length])
    assert header.pop("versions")
    return list(header.items()), data[16 + length :]
