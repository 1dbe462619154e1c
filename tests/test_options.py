"""The table of options: it says each fact once, and everything else derives from it."""

import inspect
import subprocess
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest
from models import Regression

from mezo import MeZO, noise
from mezo.errors import InputError
from mezo.forms.rounding import ROUNDINGS
from mezo.options import table
from mezo.options.domains import FRACTION_OR_NONE, NOT_NEGATIVE, POSITIVE, name_of, number, whole
from mezo.options.option import Logged, Option, Source
from mezo.options.table import ARGUMENTS, FIELDS, OPTIONS
from mezo.rules import RULES
from mezo.trainers.config import MeZOConfig
from mezo.trajectory import header


def test_the_signature_of_mezo_is_the_table():
    """It is written out for readers and editors, so it could say something else."""
    signature = inspect.signature(MeZO.__init__).parameters
    written = {n: p.default for n, p in signature.items() if n not in ("self", "params")}
    assert written == {option.name: option.default for option in ARGUMENTS}


def test_the_docstring_of_mezo_describes_every_option():
    """An option without a word is one that nobody finds."""
    heads = [line.split(":")[0] for line in inspect.getdoc(MeZO.__init__).splitlines()]
    assert [o.name for o in ARGUMENTS if not any(o.name in head for head in heads)] == []


def test_the_fields_of_mezo_config_are_the_table():
    """Names, types and defaults; `learning_rate` and others of transformers' may be narrowed."""
    hints, found = get_type_hints(MeZOConfig), {f.name: f for f in fields(MeZOConfig)}
    for option in FIELDS:
        assert option.flag in found, f"MeZOConfig has no field {option.flag}"
        if option.source is Source.OURS:
            f = found[option.flag]
            assert (f.default, f.metadata["help"]) == (option.flag_default, option.help)
            assert hints[option.flag] == option.kind, option.flag
    declared = inspect.get_annotations(MeZOConfig).keys() - {"lr_scheduler_type"}
    assert declared == {option.flag for option in FIELDS if option.source is Source.OURS}


def test_a_name_stands_once_and_every_help_is_a_sentence():
    """`--help` and the docs show them as they are."""
    assert len({o.name for o in OPTIONS}) == len({o.flag for o in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        assert (option.help[0].isupper(), option.help[-1]) == (True, "."), option.name


def test_the_table_and_the_modules_know_the_same_names():
    """The table imports nothing heavy: what a name stands for is said where it is at work."""
    assert tuple(noise.DISTRIBUTIONS) == table.DISTRIBUTIONS
    assert tuple(MeZO.forms) == table.FORMS
    assert tuple(ROUNDINGS) == table.ROUNDINGS
    assert tuple(RULES) == table.RULES
    assert tuple(MeZO.estimators) == table.ESTIMATORS
    most = table.whole(1, noise.MAX_PROBE)
    (num_samples,) = [o for o in ARGUMENTS if o.name == "num_samples"]
    for count in (0, 1, noise.MAX_PROBE - 1, noise.MAX_PROBE):
        assert (count in num_samples.domain) == (count in most)


def test_the_defaults_are_in_their_domains():
    """But for the seed, which torch gives where there is none."""
    for option in OPTIONS:
        if option.name != "seed":
            option.check(option.default)


def test_what_every_segment_of_a_log_holds_is_what_the_table_says():
    """These may change from step to step, and a replay depends on them."""
    stepwise = {o.name for o in OPTIONS if o.logged is Logged.EVERY_STEP}
    assert stepwise == header._EVERY.keys() - {"start", "cycles", "lr_in_records"}


@pytest.mark.parametrize(
    ("domain", "good", "bad", "message"),
    [
        (POSITIVE, 1e-3, 0.0, "x must be positive, got 0.0"),
        (POSITIVE, 1, float("inf"), "x must be finite, got inf"),
        (POSITIVE, 1, float("nan"), "x must be positive, got nan"),
        (POSITIVE, 1, "1e-3", "x must be a number, got '1e-3'"),
        (POSITIVE, 1, None, "x must be a number, got None"),
        (NOT_NEGATIVE, 0, -1, "x must be at least 0, got -1"),
        (FRACTION_OR_NONE, None, 1.0, "x must be between 0 and 1, got 1.0"),
        (whole(1), 3, 2.5, "x must be a whole number, got 2.5"),
        (whole(1), 3, 0, "x must be at least 1, got 0"),
        (whole(1, 4), 3, 4, "x must be from 1 to 3, got 4"),
        (name_of("a", "b", "c"), "a", "d", "x must be a, b or c, got 'd'"),
        (name_of("a", "b", own=True), "file:Name", "file:", "x must be a or b, got 'file:'"),
        (number("even", lambda x: x % 2 == 0), 2, 3, "x must be even, got 3"),
    ],
)
def test_a_value_outside_its_domain_is_refused_in_one_sentence(domain, good, bad, message):
    """It names the option, says what it must be, and shows the value."""
    Option("x", good, "Help.", domain).check(good)
    with pytest.raises(InputError) as refused:
        Option("x", good, "Help.", domain).check(bad)
    assert str(refused.value) == message


ADDED = """
from mezo.options import table
from mezo.options.domains import POSITIVE
from mezo.options.option import Logged, Option
new = Option("warmth", 1.0, "Warmth.", POSITIVE, float, logged=Logged.UNLESS_DEFAULT, shown=True)
table.OPTIONS = (*table.OPTIONS, new)
table.ARGUMENTS, table.FIELDS = (*table.ARGUMENTS, new), (*table.FIELDS, new)
table.SHARED = (*table.SHARED, new)

import sys
from pathlib import Path
import torch
from mezo import MeZO, trajectory
from mezo.cli.train import TRAIN_HELP
from mezo.distributed.processes import _settings
from mezo.errors import InputError
from mezo.trainers import changes

def refused(work):
    try:
        work()
    except InputError as error:
        print(error)

def made(warmth):
    return MeZO([{"params": [("w", torch.nn.Parameter(torch.ones(3)))], "warmth": warmth}], seed=1)

path = Path(sys.argv[1])
refused(lambda: made(-1.0))                                     # its domain
optimizer = made(2.0)
print(_settings(optimizer)["warmth"])                           # processes agree on it
with trajectory.record(optimizer, path):                        # it is in the log's header
    optimizer.step(lambda: 1.0)
    optimizer.param_groups[0]["warmth"] = 3.0
    refused(lambda: optimizer.step(lambda: 1.0))                # it is constant
print(trajectory.read(path).header["warmth"])
refused(lambda: trajectory.record(made(4.0), path, resume=True))  # it identifies the run
print("--warmth" in TRAIN_HELP, changes.is_free("warmth"), "warmth" in changes.HONOURED)
state = made(2.0).state_dict()
del state["param_groups"][0]["warmth"]                          # a checkpoint of before
optimizer.load_state_dict(state)
print(optimizer.settings["warmth"])
"""


def test_a_new_option_is_one_entry(tmp_path):
    """Five lists by hand had to be found, and one was forgotten: processes could disagree on it.

    Only the two signatures name it once more, and the tests above ask for that.
    """
    words = [sys.executable, "-c", ADDED, str(tmp_path / "run.mezo")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = done.stdout.splitlines()
    assert seen[:2] == ["warmth must be positive, got -1.0", "2.0"]
    assert "warmth was 2.0 when the log began, and is now 3.0" in seen[2]
    assert seen[3] == "2.0"
    assert "its warmth is 2.0, not 4.0" in seen[4]
    assert seen[5:] == ["True False False", "1.0"]


def test_an_older_checkpoint_takes_the_defaults_of_options_that_it_lacks():
    """Without them the first step would end in a KeyError."""
    optimizer = MeZO(Regression().named_parameters(), seed=1)
    state = optimizer.state_dict()
    del state["param_groups"][0]["common_random_numbers"]
    optimizer.load_state_dict(state)
    assert optimizer.settings["common_random_numbers"] is False
