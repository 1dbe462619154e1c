"""Ctrl-C at any line of the package leaves weights that are the log's, and a run that goes on."""

import os
import random
import signal
import sys
import threading

import pytest
import torch
from models import Regression, weights

import mezo
from mezo import MeZO, trajectory
from mezo.forms.reads import Reads
from mezo.interrupts import held, released
from mezo.rules import Adam

PACKAGE = os.path.dirname(mezo.__file__)
MORE = int(os.environ.get("INTERRUPTS", "60"))  # of each run, in the slow test
RUNS = {
    "in_place": {"num_samples": 2},
    "one_sided": {"estimator": "one_sided", "num_samples": 2},
    "momentum": {"rule": "momentum"},
    "adam": {"rule": Adam(window=3), "perturbation": "scratch"},
    "scratch": {"perturbation": "scratch"},
    "bfloat16": {"dtype": torch.bfloat16, "rounding": "compensated"},
    "master": {"dtype": torch.bfloat16, "rounding": "master", "rule": "sign"},
    "low_rank": {"perturbation": "low_rank", "interval": 2, "weight_decay": 0.1},
}


class Lines:
    """Counts the lines that run inside the package; at number `stop`, Ctrl-C comes."""

    def __init__(self, stop: int | None = None):
        self.stop, self.count = stop, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *exception):
        sys.settrace(self.before)

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.stop:
                signal.raise_signal(signal.SIGINT)
        return self


def run(name: str, path, stop: int | None = None) -> int:
    """Three steps with Ctrl-C at a line, and two more; the log must give the weights at each end.

    Returns the lines of the three steps.
    """
    options = {"lr": 1e-2, "eps": 1e-2, "seed": 1} | RUNS[name]
    dtype = options.pop("dtype", torch.float32)
    model = Regression(dtype)
    optimizer = MeZO(model.named_parameters(), **options)
    with trajectory.record(optimizer, path):
        lines = Lines(stop)
        try:
            with lines:
                optimizer.estimate(model)
                optimizer.step()
                optimizer.step(model)
                optimizer.write()
                optimizer.step(model)
        except KeyboardInterrupt:
            pass
        assert torch._C._is_torch_function_enabled()  # a `with` that a signal ends may not exit
        assert not torch._C._len_torch_function_stack()
        assert torch.is_grad_enabled()
        agree(optimizer, model, path, dtype)
        for _ in range(2):
            optimizer.step(model)
        agree(optimizer, model, path, dtype)
    return lines.count


def agree(optimizer, model, path, dtype) -> None:
    optimizer.write()
    made = optimizer.param_groups[0]["step"]
    assert trajectory.read(path).end == made
    base = trajectory.replay(path, Regression(dtype))
    assert torch.equal(weights(base), weights(model))


def interrupted(name: str, path, times: int) -> None:
    rng = random.Random(name)
    total = run(name, path)
    assert total > 100
    for _ in range(times):
        stop = rng.randrange(1, total + 1)
        try:
            run(name, path, stop)
        except Exception as error:
            raise AssertionError(f"{name}: Ctrl-C at line {stop} of {total}") from error


@pytest.mark.parametrize("name", RUNS)
def test_ctrl_c_at_a_random_line_leaves_what_the_log_says(name, tmp_path):
    interrupted(name, tmp_path / "run.mezo", 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_many_of_them_leave_what_the_log_says(name, tmp_path):
    """INTERRUPTS of each run, at the same lines every time."""
    interrupted(name, tmp_path / "run.mezo", MORE)


def test_a_signal_within_a_section_is_handed_over_at_its_end():
    """To the handler that was there before, once; nested sections are one."""
    seen = []

    def handler(number, frame):
        seen.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with held():
            with held():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            assert not seen
        assert seen == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_forward_pass_lets_it_through_at_once():
    """One that waited comes before the pass; the section is held again behind it."""
    reached = []

    def waits():
        with held():
            signal.raise_signal(signal.SIGINT)
            reached.append("held")
            with released():
                reached.append("passed")

    def waits_again():
        with held():
            with released():
                reached.append("within")
            signal.raise_signal(signal.SIGINT)
            reached.append("held again")

    for call in (waits, waits_again):
        with pytest.raises(KeyboardInterrupt):
            call()
    assert reached == ["held", "within", "held again"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_section_in_another_thread_changes_nothing():
    """Python delivers signals to the main thread alone, and only there may handlers be set."""
    found = []

    def work():
        with held(), released():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_guard_that_ctrl_c_kept_from_exiting_is_left_at_the_end_of_the_pass():
    """torch's functions went on unseen: all later perturbations were, and every estimate was 0."""
    model = Regression(torch.float32)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, perturbation="low_rank")
    for _ in range(2):
        optimizer.step(model)  # the first pass is watched by a mode

    def ended():
        Reads.unseen().__enter__()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(ended)
    assert torch._C._is_torch_function_enabled()
    assert optimizer.estimate(model).projected_grad != 0
