"""Checkpoints in a run's folder: find the newest intact one, and say what is wrong with others.

A checkpoint whose save was interrupted lacks trainer_state.json, which is written last. One that
was damaged later has a truncated file or a wrong checksum.
"""

import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mezo.errors import InputError

STATE = "trainer_state.json"
_ZIPS = (".pt", ".pth", ".bin")  # torch.save writes zip archives with a checksum of each member


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the folder of the newest intact checkpoint, or None.

    Newer ones that are damaged are skipped with a warning.
    """
    folders = Path(output_dir).glob("checkpoint-[0-9]*")
    numbered = [path for path in folders if path.name.split("-")[1].isdecimal()]
    for folder in sorted(numbered, key=lambda path: -int(path.name.split("-")[1])):
        what = damage(folder)
        if what is None:
            return str(folder)
        logging.getLogger("mezo").warning("%s is passed over: %s", folder, what)
    return None


def damage(folder: str | Path) -> str | None:
    """Return a description of what is wrong with a checkpoint, or None if it is intact."""
    state = Path(folder, STATE)
    if not state.is_file():
        return f"it has no {STATE}, so its save was cut off"
    try:
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
        if type(step) is not int or step < 0:
            return f"{STATE} names no step"
        for path in sorted(Path(folder).iterdir()):
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # compares its header with the file's length
                    pass
            elif path.suffix in _ZIPS and _damaged(path):
                return f"{path.name} is cut off or damaged"
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {str(error) or 'unreadable'}"
    return None


class TiedWeights:
    """Says nothing of missing keys that a Trainer's checkpoint leaves out because they are tied.

    transformers warns of lm_head.weight when it loads the best checkpoint of a tied model, although
    nothing is missing: the embedding, which is the same tensor, was loaded.
    """

    model: Any

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = untied(self.model, load_result.missing_keys)
        left = SimpleNamespace(missing_keys=missing, unexpected_keys=load_result.unexpected_keys)
        super()._issue_warnings_after_load(left)  # type: ignore[misc]


def untied(model: torch.nn.Module, missing: Sequence[str]) -> list[str]:
    """Return the missing names whose tensor no other name has loaded."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    loaded = {id(tensor) for name, tensor in named.items() if name not in missing}
    return [name for name in missing if name not in named or id(named[name]) not in loaded]


@contextmanager
def saving(output_dir: str | Path, step: int) -> Iterator[None]:
    """Raise InputError if a checkpoint cannot be written within the context, as on a full disk.

    A resumed run skips the partial checkpoint. It starts from an earlier checkpoint or from the
    base model, and replays the run log from there.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise  # not an error of torch.save
        words = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(
            f"{output_dir}/checkpoint-{step} cannot be saved: {words}; the run log has all "
            f"{step} steps: make room, and resume the run"
        ) from error


def _damaged(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError):
        return True
