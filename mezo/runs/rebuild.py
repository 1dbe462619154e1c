"""Rebuild the tuned model of a run from its base model and its log.

    model = mezo.load("facebook/opt-1.3b", "runs/sst2/run.mezo")
    model = mezo.load("facebook/opt-1.3b", "user/sst2-opt")     # a log on the hub

For the command line, the model can also be saved, written without loading it, or saved as an
adapter alone.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mezo import trajectory
from mezo.errors import InputError
from mezo.hub import repository as hub
from mezo.models import adapters as tuners
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives.progress import SILENT, Progress
from mezo.rules import Rule
from mezo.trajectory.replay import steps_until

DTYPES = ("auto", "float32", "bfloat16", "float16")
# The options in a log's config that define the adapter of the run, and a check of each value. A log
# may say how the adapter is made, but not where weights come from or what code to run.
ADAPTER: dict[str, Callable[[Any], bool]] = {
    "use_peft": lambda x: type(x) is bool,
    "peft_type": lambda x: isinstance(x, str),  # looked up in a fixed list
    "num_virtual_tokens": lambda x: type(x) is int and 0 < x < 2**20,
    "peft_options": lambda x: x is None or isinstance(x, str),  # see tuners.options_of
    "load_in_8bit": lambda x: type(x) is bool,
    "load_in_4bit": lambda x: type(x) is bool,
    "lora_r": lambda x: type(x) is int and x > 0,
    "lora_alpha": lambda x: type(x) in (int, float),
    "lora_target_modules": lambda x: type(x) is list and all(isinstance(one, str) for one in x),
    "dtype": lambda x: x in DTYPES,
}
_PLAIN = {name: getattr(ModelArguments(), name) for name in ADAPTER if name != "dtype"}
_SAVED = ("adapter_model.safetensors", "adapter_config.json")


def load(base: torch.nn.Module | str | Path, log: str | Path, *, until: int | None = None) -> Any:
    """Return the tuned model of a run, in eval mode, from its base model and its log.

        model = mezo.load("facebook/opt-1.3b", "runs/sst2/run.mezo")

    A run log is used as an adapter is: a few KB that turn the base model into the tuned one.

    Args:
        base: A model, a folder or a hub name: what the run began with. A model that is given is
            changed in place. For a log of `mezo train --use_peft` the adapter is added, if the
            model has none yet.
        log: A file, or a repository on the hub as `mezo push` makes them: "user/name", or
            "hub:user/name" where a file could be meant.
        until: Stop at that step of the run.

    Raises InputError if there is no such log, or if it starts from another model. For a model
    that does not fit into memory use `mezo replay --by_tensor`, which goes from file to file.
    """
    path = hub.resolve(log)
    if not isinstance(base, torch.nn.Module):
        return rebuilt(ModelArguments(str(base)), path, until)[0]
    model: Any = base
    header = trajectory.read(path).header
    if header["config"].get("use_peft"):
        from peft import PeftModel

        if not isinstance(model, PeftModel):
            args = arguments_of(ModelArguments(), path, header)
            model = tuners.with_adapter(model, args, header["seed"])
    return trajectory.replay(path, model, until=until).eval()


def rebuilt(
    args: ModelArguments,
    log: str | Path,
    until: int | None = None,
    *,
    rules: Sequence[type[Rule]] = (),
    verify: bool = True,
    progress: Progress = SILENT,
) -> tuple:
    """Load the base model as the run did, replay the log, and return (model, tokenizer, steps).

    Raises InputError as `trajectory.replay` does.
    """
    run = trajectory.read(log)
    steps = steps_until(log, run, until)
    args = arguments_of(args, log, run.header)
    _check_file(args, log, run.header)
    model, tokenizer = models.load(args, adapter_seed=run.header["seed"])
    how: dict[str, Any] = {"rules": rules, "verify": verify}
    trajectory.replay(log, model, until=until, progress=progress.counted("tensor"), **how)
    return model, tokenizer, len(steps)


def arguments_of(args: ModelArguments, log: str | Path, header: dict[str, Any]) -> ModelArguments:
    """Return `args` with the run's adapter and, if the dtype is "auto", the run's dtype.

    Raises InputError for a value in the log's config that cannot be used.
    """
    config = header["config"]
    for name, good in ADAPTER.items():
        if name in config and not good(config[name]):
            raise InputError(f"{log}: its config's {name} cannot be {config[name]!r:.80}")
    if config.get("use_peft") and not models.is_adapter(args.model_name_or_path):
        made = {name: config[name] for name in ADAPTER if name in config}
        return replace(args, **(_PLAIN | made))
    dtypes = {entry["dtype"] for entry in header["tensors"]}
    only = dtypes.pop() if len(dtypes) == 1 else "auto"
    dtype = config.get("dtype", only if only in DTYPES else "auto")
    return replace(args, dtype=dtype) if args.dtype == "auto" else args


def _check_file(args: ModelArguments, log: str | Path, header: dict[str, Any]) -> None:
    """Raise InputError if the run began with another GGUF file than the model's."""
    began, name = header["config"].get("gguf_sha256"), args.model_name_or_path
    here = models.gguf_fingerprint(name) if isinstance(began, str) else None
    if here not in (None, began):
        raise InputError(
            f"{log} starts from the GGUF file with SHA-256 {began!r:.80}; that of {name} is {here}"
        )


def replay_by_tensor(
    args: ModelArguments,
    log: str | Path,
    output_dir: str,
    until: int | None = None,
    *,
    rules: Sequence[type[Rule]] = (),
    verify: bool = True,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Call `trajectory.replay_checkpoint` on a local folder or an embedded model."""
    if args.dtype != "auto":
        raise InputError("the dtype of a replay by tensor is the log's: leave out --dtype")
    _check_file(args, log, trajectory.read(log).header)
    folder = models.folder_of(args.model_name_or_path)
    how: dict[str, Any] = {"until": until, "rules": rules, "verify": verify}
    how["progress"] = progress.counted("tensor")
    steps = trajectory.replay_checkpoint(log, folder, output_dir, **how)
    return {"log": str(log), "steps": steps, "output_dir": output_dir}


def save_adapter(
    args: ModelArguments,
    log: str | Path,
    output_dir: str,
    until: int | None = None,
    *,
    rules: Sequence[type[Rule]] = (),
    verify: bool = True,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Rebuild the adapter of a run and save it as peft does, without base weights or tokenizer.

    Raises InputError if the run trained weights of the base model.
    """
    names = [entry["name"] for entry in trajectory.read(log).header["tensors"]]
    own = [name for name in names if not tuners.is_of_adapter(name)]
    if own or not names:
        raise InputError(
            f"{log}: the run trained the model's own weights ({', '.join(own[:1])}), and has no "
            "adapter: replay it without --onto_adapter"
        )
    how: dict[str, Any] = {"rules": rules, "verify": verify, "progress": progress}
    model, _, steps = rebuilt(args, log, until, **how)
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mezo-", dir=output_dir) as folder:
            model.save_pretrained(folder)
            for name in _SAVED:
                os.replace(Path(folder, name), Path(output_dir, name))
    except OSError as error:
        raise InputError(f"output_dir {output_dir}: {error.strerror}") from None
    return {"log": str(log), "steps": steps, "output_dir": output_dir}
