"""mezo/mezo.py is Algorithm 1 alone: short, and standing on torch and on what is below it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "mezo"
NEVER = ("transformers", "mezo.distributed", "mezo.offload", "mezo.trajectory")


def test_algorithm_1_is_one_short_file():
    assert len((ROOT / "mezo.py").read_text().splitlines()) <= 130


def test_the_heart_imports_no_trainer_process_or_log():
    """In a process of its own: what `import mezo.mezo` brings in."""
    code = f"import sys, mezo.mezo; print([m for m in sys.modules if m.startswith({NEVER!r})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
