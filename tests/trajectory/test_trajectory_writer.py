"""Writing a run log where things go wrong: two runs, a full disk, interrupts."""

import copy
from contextlib import contextmanager

import pytest
import torch
from logs import run
from models import Regression, weights

from mezo import MeZO, trajectory
from mezo.errors import InputError


def steps(optimizer, model, count):
    for _ in range(count):
        optimizer.step(model)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_writer_is_refused_and_leaves_the_log_as_it_is(tmp_path, resume):
    """It must not empty or cut the file before it asks for the lock."""
    path, model = tmp_path / "run.mezo", Regression()
    optimizer, other = (MeZO(model.named_parameters(), seed=6) for _ in range(2))
    with trajectory.record(optimizer, path):
        optimizer.step(model)
        before = path.read_bytes()
        with pytest.raises(InputError, match="another run is writing this log"):
            trajectory.record(other, path, resume=resume)
        assert path.read_bytes() == before
        optimizer.step(model)
    assert len(trajectory.read(path).steps) == 2


@pytest.mark.parametrize("config", [{"a": object()}, {"a": float("nan")}])
def test_a_log_that_cannot_begin_harms_no_file(tmp_path, config):
    base, _ = run(tmp_path / "run.mezo", steps=2)
    before, optimizer = (tmp_path / "run.mezo").read_bytes(), MeZO(base.named_parameters(), seed=6)
    for name in ("run.mezo", "new.mezo"):
        with pytest.raises(InputError, match="the log cannot have what JSON cannot hold"):
            trajectory.record(optimizer, tmp_path / name, config=config)
    assert (tmp_path / "run.mezo").read_bytes() == before
    assert not (tmp_path / "new.mezo").exists()
    with pytest.raises(InputError, match="No such file or directory"):
        trajectory.record(optimizer, tmp_path / "none" / "run.mezo")


@contextmanager
def largest_file(size):
    """No file can grow beyond `size` bytes, as on a full disk: writes are cut short, then fail."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("part", [0, 7, 15])
def test_a_full_disk_ends_the_run_with_a_whole_log(tmp_path, part):
    """Step 5 is made, its record is not: the log is that of 5 steps, and goes on from there."""
    path, model = tmp_path / "run.mezo", Regression(torch.float32)
    base, twin = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, other = (MeZO(m.named_parameters(), lr=1e-2, seed=6) for m in (model, twin))
    steps(other, twin, 5)
    with trajectory.record(optimizer, path):
        told = r"File too large: make room.*ends with step 4, the weights are those after step 5$"
        full = largest_file(path.stat().st_size + 5 * 16 + part)
        with full, pytest.raises(InputError, match=told):
            steps(optimizer, model, 9)
        log = trajectory.read(path)
        assert (len(log.steps), log.torn) == (5, 0)
        replayed = trajectory.replay(path, copy.deepcopy(base))
        assert torch.equal(weights(replayed), weights(twin))
        other.step(twin)
        assert torch.equal(weights(model), weights(twin))  # one step beyond the log
        optimizer.step(model)  # there is room again: both records follow
    trajectory.replay(path, base)
    assert len(trajectory.read(path).steps) == 7
    assert torch.equal(weights(base), weights(model))


def test_a_run_that_stopped_on_a_full_disk_resumes_from_what_the_log_has(tmp_path):
    """From a step of the log, that is: the one beyond it would leave a hole."""
    path, model = tmp_path / "run.mezo", Regression(torch.float32)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=6)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    writer = trajectory.record(optimizer, path)
    with largest_file(path.stat().st_size + 3 * 16 + 5):
        with pytest.raises(InputError, match="make room"):
            steps(optimizer, model, 9)
        writer.close()
        with pytest.raises(InputError, match="ends at step 3, and the run to continue is at 4"):
            trajectory.record(optimizer, path, resume=True)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    optimizer.param_groups[0]["step"] = 0
    with trajectory.record(optimizer, path, resume=True):
        steps(optimizer, model, 6)
    base = trajectory.replay(path, Regression(torch.float32))
    assert torch.equal(weights(base), weights(model))


def test_no_room_for_the_header_leaves_no_file(tmp_path):
    optimizer = MeZO(Regression().named_parameters(), seed=6)
    with largest_file(100), pytest.raises(InputError, match=r"make room.*the log has no step$"):
        trajectory.record(optimizer, tmp_path / "run.mezo")
    assert not (tmp_path / "run.mezo").exists()


def test_an_interrupt_within_a_write_loses_no_record(tmp_path):
    """Ctrl-C after half of a record: it is written again, to the same place."""
    path, model = tmp_path / "run.mezo", Regression(torch.float32)
    base, optimizer = copy.deepcopy(model), MeZO(model.named_parameters(), lr=1e-2, seed=6)
    with trajectory.record(optimizer, path) as writer:
        file, calls = writer._file, []

        class Interrupted:
            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data):
                calls.append(1)
                if len(calls) != 3:
                    return file.write(data)
                file.write(data[:9])
                raise KeyboardInterrupt

        writer._file = Interrupted()
        for step in range(5):
            try:
                optimizer.step(model)
            except KeyboardInterrupt:
                assert step == 2
    assert len(trajectory.read(path).steps) == 5
    assert torch.equal(weights(trajectory.replay(path, base)), weights(model))


def test_a_record_that_is_missing_is_not_passed_over(tmp_path):
    """Records have no step number: the next one would be taken for the one that is missing."""
    model = Regression()
    optimizer = MeZO(model.named_parameters(), seed=6)
    with trajectory.record(optimizer, tmp_path / "run.mezo") as writer:
        optimizer.step(model)
        optimizer.observers.remove(writer)
        optimizer.step(model)
        optimizer.observers.append(writer)
        with pytest.raises(InputError, match="the record of step 1 is missing, step 2 cannot"):
            optimizer.step(model)
    assert len(trajectory.read(tmp_path / "run.mezo").steps) == 1


def test_a_loss_beyond_float32_is_logged_as_infinite(tmp_path):
    optimizer = MeZO(Regression().named_parameters(), seed=6)
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        optimizer.step(lambda: 1e300)
    assert trajectory.read(tmp_path / "run.mezo").steps[0].record.loss == float("inf")
