"""Continuous integration and the installation, with programs that only note how they are called."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = re.search(r"^torch==\S+", (ROOT / "requirements/lock.txt").read_text(), re.MULTILINE)[0]
STAGES = ["lint", "test", "slow"]
# A Python whose `-m venv FOLDER` makes another one, and whose pip fails for the words in $WITHOUT.
PYTHON = """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit; fi
shift 6
echo "$*" >> "$NOTES"
for word in $WITHOUT; do case "$*" in *"$word"*) exit 1;; esac; done
"""
MAKE = """#!/bin/sh
echo "$1" >> "$NOTES"
[ "$1" != "$WITHOUT" ]
"""


def run(folder, program, name, *command, without=""):
    """The exit status and output of a command, and the calls of `program` that it made."""
    tool, notes = folder / name, folder / "notes"
    tool.write_text(program)
    tool.chmod(0o755)
    notes.write_text("")
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "NOTES": str(notes), "WITHOUT": without}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, notes.read_text().splitlines()


def install(folder, *, without=""):
    words = ["requirements/install.sh", str(folder / "python"), str(folder / "venv"), "test"]
    return run(folder, PYTHON, "python", *words, "requirements/lock.txt", without=without)


@pytest.mark.parametrize("failing", ["", *STAGES])
def test_a_stage_that_fails_ends_continuous_integration(tmp_path, failing):
    """Else the stages after it would make a red commit green."""
    status, said, made = run(tmp_path, MAKE, "make", ".ci/run", without=failing)
    assert (status == 0) == (not failing)
    assert made == (STAGES[: STAGES.index(failing) + 1] if failing else STAGES)
    assert ("== done" in said) == (not failing)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="only Linux has CPU builds of torch")
def test_the_plain_torch_is_taken_where_there_is_no_cpu_build(tmp_path):
    """Issue 15: an error about a host that cannot be reached was all that a user got."""
    status, said, calls = install(tmp_path, without="cpu")
    assert status == 0
    assert f"no CPU build of {TORCH} is at hand: taking the plain one" in said
    assert calls[0].endswith("setuptools>=77")  # after torch, pip would miss all that torch needs
    assert calls[1].endswith(f" {TORCH}+cpu")
    assert calls[2].endswith(f" {TORCH} --index-url https://download.pytorch.org/whl/cpu")
    assert calls[3] == f"--constraint requirements/lock.txt {TORCH}"
    assert calls[-1].endswith("--editable .[test]")


@pytest.mark.parametrize("missing", ["torch==", "setuptools", "--editable"])
def test_an_installation_that_fails_says_so(tmp_path, missing):
    """make then stops, and takes the environment anew the next time."""
    status, _, calls = install(tmp_path, without=missing)
    assert status != 0
    assert missing in calls[-1]
