"""A run's output folder: result.json, the environment, and where to resume."""

import json
import logging
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from mezo import trajectory
from mezo.errors import InputError
from mezo.trainers.checkpoints import STATE, damage, last_checkpoint
from mezo.version import __version__

RESULT = "result.json"  # in output_dir, written last


def write_result(output_dir: str, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result as result.json, and return it."""
    Path(output_dir, RESULT).write_text(json.dumps(result, indent=1, default=str))
    return result


def make_folder(output_dir: str) -> None:
    """Create an output folder with its parents. Raises InputError if that is impossible."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {output_dir}: {error.strerror}") from None


def checkpoint_of(args: Any, has_log: bool = True) -> str | bool | None:
    """Return where to resume: a folder, True for the end of the run in output_dir, None to begin.

    Raises InputError if a finished or interrupted run would be overwritten, or if the named
    checkpoint is damaged.
    """
    asked, log = str(args.resume_from_checkpoint or False), Path(args.output_dir, "run.mezo")
    if asked.lower() == "false":
        if trajectory.begun(log):
            raise InputError(
                f"{log} exists: --resume_from_checkpoint true goes on with that run, another "
                "--output_dir keeps it"
            )
        return None
    if asked.lower() != "true":
        if not Path(asked, STATE).is_file():
            raise InputError(f"resume_from_checkpoint {asked} is no folder with a {STATE}")
        if what := damage(asked):
            raise InputError(f"resume_from_checkpoint {asked}: {what}: take another one")
        return asked
    last = last_checkpoint(args.output_dir)
    if last is None and not trajectory.begun(log):
        logging.getLogger("mezo").warning("%s has no checkpoint: starting anew", args.output_dir)
        return None
    return True if has_log else last


def packages() -> dict[str, str]:
    """Return the versions of the packages that a run may use; "-" for one that is not installed."""
    names = "peft trl accelerate datasets numba triton numpy safetensors tokenizers"
    found = {}
    for name in names.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found | {"platform": platform.platform(), "threads": str(torch.get_num_threads())}


def environment() -> dict[str, str]:
    """Return what a result depends on besides its configuration: versions and device."""
    try:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    except RuntimeError:  # a device that is busy, or a driver that fails: mezo env names it
        gpu = ""
    return {
        "mezo": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }
