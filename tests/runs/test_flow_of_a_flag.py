"""The flow of one flag: a flag of `mezo train` is resolved once, on its way down to the optimizer.

It once climbed back up 25 times: it was checked everywhere and resolved nowhere, so that nobody
could say which value was in force. docs/architecture.md has the way that is counted here.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from folders import training

import mezo
from mezo.cli.main import main
from mezo.runs.plan import Plan
from mezo.trainers.config import MeZOConfig

ROOT = Path(mezo.__file__).parent
PAGE = (ROOT.parent / "docs" / "architecture.md").read_text()
FLOORS = {
    unit: int(floor)
    for floor, units in re.findall(r"^floor (\d+) +(.+)$", PAGE, re.MULTILINE)
    for unit in units.split()
}
END = ("optimizer.py", "__init__")


def carries(value: Any, flag: str) -> bool:
    """Whether a value holds the flag: the command's words, the config, a plan, or a Trainer."""
    if isinstance(value, MeZOConfig | Plan):
        return True
    if isinstance(value, list | tuple):
        return any(isinstance(word, str) and word.startswith(f"--{flag}") for word in value)
    if isinstance(value, dict):
        return flag in value
    return isinstance(getattr(value, "__dict__", {}).get("args"), MeZOConfig)


@contextmanager
def watched(flag: str) -> Iterator[list[tuple[str, str]]]:
    """The functions of this package, as (file, name), that are given the flag, in order."""
    way: list[tuple[str, str]] = []

    def called(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(ROOT)):
            return
        here = (str(Path(code.co_filename).relative_to(ROOT)), code.co_name)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [frame.f_locals.get(name) for name in names]
        if here == END or any(carries(value, flag) for value in given):
            way.extend([here] if way[-1:] != [here] else [])
        if here == END:
            sys.setprofile(None)

    sys.setprofile(called)
    try:
        yield way
    finally:
        sys.setprofile(None)


def climbs(way: list[tuple[str, str]]) -> list[str]:
    """The places where the flag is handed to a higher floor than that of the function before."""
    floors = [FLOORS[file.split("/")[0].removesuffix(".py")] for file, _ in way]
    return [
        f"{way[i - 1][0]}:{way[i - 1][1]} to {way[i][0]}:{way[i][1]}"
        for i in range(1, len(way))
        if floors[i] > floors[i - 1]
    ]


@pytest.mark.parametrize(("flag", "value"), [("mezo_eps", 1e-3), ("rounding", "nearest")])
def test_a_flag_climbs_back_up_three_times_at_most(flag, value, place):
    """From the words of the command to the optimizer: once by each part of the run's course."""
    options = {"output_dir": place / f"run {flag}", "max_steps": 1, "load_best_model_at_end": False}
    argv = ["train", *training(place, place / "tiny", **options, **{flag: value})]
    with watched(flag) as way:
        code = main(argv)
    assert code == 0
    assert way[0] == ("cli/main.py", "main")
    assert way[-1] == END
    assert len(climbs(way)) <= 3, "\n".join(climbs(way))
