"""mezo/mezo.py is Algorithm 1 alone: short, and standing on torch and on what is below it."""

import subprocess
import sys
from pathlib import Path

import torch

from mezo import MeZO

ROOT = Path(__file__).parents[1] / "mezo"
NEVER = ("transformers", "mezo.distributed", "mezo.offload", "mezo.trajectory")


def test_algorithm_1_is_one_short_file():
    assert len((ROOT / "mezo.py").read_text().splitlines()) <= 130


def test_the_heart_imports_no_trainer_process_or_log():
    """In a process of its own: what `import mezo.mezo` brings in."""
    code = f"import sys, mezo.mezo; print([m for m in sys.modules if m.startswith({NEVER!r})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plain_step_enters_at_most_25_functions_in_8_files():
    """Whoever reads what a step does, line by line, has so much to read and no more.

    Functions of the package that a step of float32 weights enters after the run's first, which look
    for what will not work; comprehensions belong to the function that they are in.
    """
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = MeZO(model.named_parameters(), seed=1)
    x = torch.ones(3, 4)
    entered = set()

    def note(frame, event, argument):
        code = frame.f_code
        inner = code.co_name.startswith("<") and code.co_name != "<lambda>"
        if event == "call" and Path(code.co_filename).is_relative_to(ROOT) and not inner:
            entered.add((code.co_filename, code.co_firstlineno, code.co_qualname))

    for step in range(22):
        sys.setprofile(note if step == 21 else None)
        try:
            optimizer.step(lambda: model(x).square().mean())
        finally:
            sys.setprofile(None)
    assert "MeZO.step" in {name for *_, name in entered}
    assert len(entered) <= 25, sorted(entered)
    assert len({file for file, *_ in entered}) <= 8, sorted(entered)
