"""The run logs beside the tables of docs/results.md are what their runs can be made of again."""

import random
from pathlib import Path

import pytest

from mezo import trajectory
from mezo.models.arguments import ModelArguments
from mezo.runs.rebuild import rebuilt

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
LOGS = sorted(RESULTS.rglob("run.mezo"))
CHOSEN = random.Random(18).sample(LOGS, 5)
OLD = Path(__file__).parents[1] / "standin"  # what was embedded as causal-lm before
STEPS = 3  # are replayed: what may fail is the comparison with the start


@pytest.mark.parametrize("log", CHOSEN, ids=lambda path: "-".join(path.parts[-5:-2]))
def test_a_stored_log_replays_onto_its_base_model(log):
    """Every tensor that was trained must be, to the bit, what the run started from."""
    assert trajectory.read(log).header["config"]["model_name_or_path"] == "causal-lm"
    base = str(OLD) if "classification" in log.parts else "causal-lm"
    assert rebuilt(ModelArguments(base), log, STEPS)[2] == STEPS


def test_a_stored_log_of_a_prefix_holds_its_start():
    """The start of a prefix was computed by a forward pass, which others may round otherwise."""
    prefixes = [log for log in LOGS if "mezo-prefix" in log.parts]
    assert len(prefixes) == 16
    for log in prefixes:
        header = trajectory.read(log).header
        assert header["start_values"].keys() == {entry["name"] for entry in header["tensors"]}
