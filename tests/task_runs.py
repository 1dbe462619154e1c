"""Short runs of a task by the functions that the command line calls."""

import torch
from folders import OWN
from safetensors.torch import load_file

from mezo.models.arguments import ModelArguments
from mezo.runs import task as run
from mezo.runs.arguments import TrainArguments
from mezo.runs.data_arguments import DataArguments


def data(place, **changes):
    file = str(place / "reviews.jsonl")
    options = {"train_file": file, "dev_file": file, "prompt": OWN[1], "candidates": OWN[3:]}
    return DataArguments(**(options | changes))


def settings(path, **changes):
    options = {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    options |= {"use_cpu": True, "disable_tqdm": True, "eval_steps": 2, "save_steps": 2, "seed": 3}
    return TrainArguments(str(path), **(options | {"load_best_model_at_end": False} | changes))


def trained(place, path, model=None, **changes):
    model = {"model_name_or_path": str(place / "tiny")} | (model or {})
    return run.train(ModelArguments(**model), data(place), settings(path, **changes))


def replayed(place, path, log, **options):
    found = run.replay(ModelArguments(str(place / "tiny")), str(log), str(path), **options)
    assert found["output_dir"] == str(path)
    return path


def moved(place, path):
    """Names of the parameters that a run changed."""
    base, tuned = (load_file(p / "model.safetensors") for p in (place / "tiny", path))
    return {name for name, tensor in base.items() if not torch.equal(tensor, tuned[name])}
