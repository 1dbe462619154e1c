"""`mezo env`: what a report of a fault has to say, on a machine where something may be broken."""

import json

import torch
from folders import mezo

from mezo.cli import env
from mezo.runs.result import packages


def test_the_report_has_versions_device_threads_and_kernels(capsys):
    """The issue templates ask for it: what is not in it has to be asked for again."""
    code, out, _ = mezo(capsys, "env", "--json")
    found = json.loads(out)
    assert code == 0
    assert {"mezo", "torch", "transformers", "python", "device", "noise"} <= found.keys()
    assert packages().items() <= found.items()
    assert found["noise"].startswith("contract ")


def test_the_lines_are_those_of_the_json(capsys):
    """A person pastes the lines, a script reads the JSON."""
    found = json.loads(mezo(capsys, "env", "--json")[1])
    lines = mezo(capsys, "env")[1].splitlines()
    assert lines == [f"{name}\t{value}" for name, value in found.items()]


def test_a_driver_that_fails_is_named(monkeypatch):
    """The command is asked for when something is broken: it must not break with it."""

    def broken():
        raise RuntimeError("CUDA unknown error\nsecond line")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", broken)
    assert env._cuda() == "fails, CUDA unknown error"


def test_a_device_is_named_with_its_kernels(monkeypatch):
    """Without Triton the noise is drawn by torch, many times slower: the report says which."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "H200")
    monkeypatch.setattr(env, "version", lambda name: "3.7.1")
    assert env._cuda() == "triton 3.7.1, CUDA 13.0, 2 x H200"
