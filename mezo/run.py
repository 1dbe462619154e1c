"""What the command line does, as functions: train, evaluate, replay.

    result = run.train(ModelArguments("facebook/opt-1.3b"), DataArguments("sst2"),
                       TrainArguments("runs/sst2", max_steps=20_000))

Each returns a dict that JSON can hold. `train` leaves in output_dir: run.mezo (the run log),
result.json, the Trainer's checkpoints, and the tuned model.
"""

import json
import logging
import platform
import resource
import time
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from . import __version__, models, tasks, trajectory
from .arguments import DataArguments, ModelArguments
from .errors import InputError
from .evaluate import evaluate as evaluate_form
from .objectives import Form, form_for
from .tasks import Example, Task
from .trainer import MeZOConfig, MeZOMixin

Splits = dict[str, list[Example]]


@dataclass
class TrainArguments(MeZOConfig):
    """MeZOConfig with the defaults of the command line: the paper's batch, evaluation by steps."""

    output_dir: str = "runs/mezo"  # type: ignore[assignment]
    method: Literal["mezo", "adam"] = field(
        default="mezo", metadata={"help": "mezo, or adam: the baseline by back-propagation."}
    )
    max_steps: int = 20_000  # Table 16
    per_device_train_batch_size: int = 16  # Table 16
    per_device_eval_batch_size: int = 32
    eval_strategy: str = "steps"  # type: ignore[assignment]
    eval_steps: float = 500
    save_strategy: str = "steps"  # type: ignore[assignment]
    save_steps: float = 500
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "accuracy"
    report_to: str = "none"  # type: ignore[assignment]


class TaskMixin:
    """Lets a Trainer train on a form's loss and be evaluated by its scores."""

    form: Form
    run_config: dict[str, Any]  # goes into the run log

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not return_outputs:
            return self.form.loss(model, inputs)
        scores = self.form.scores(model, inputs)
        return F.cross_entropy(scores, inputs["labels"]), {"scores": scores}


class MeZOTaskTrainer(TaskMixin, MeZOMixin, Trainer):
    pass


class AdamTaskTrainer(TaskMixin, Trainer):
    """Fine-tuning by back-propagation, the baseline: the Trainer's own AdamW."""


def task_of(args: DataArguments) -> Task:
    """The named task, or one made of the options prompt, candidates and labels."""
    if args.prompt is None and not args.candidates:
        return tasks.get(args.task)
    if args.prompt is None:
        raise InputError("--candidates needs --prompt, a template such as '{text} It was'")
    return tasks.custom_task(
        args.prompt,
        args.candidates,
        labels=args.labels or None,
        label_column=args.label_column,
    )


def load_splits(task: Task, args: DataArguments) -> Splits:
    """train, dev and test examples as the options ask for them.

    Without dev examples of its own a run splits them off the training set, as the paper does; the
    public dev set is then the test set.
    """
    train = _read(task, args, "train")
    if args.k is not None:
        train, dev = tasks.few_shot(train, args.k, args.split_seed)
    elif args.dev_file or (task.folder and not args.train_file and not args.data_dir):
        dev = _read(task, args, "dev")
    else:
        mixed = tasks.sample(train, len(train), args.split_seed)
        size = min(args.num_dev or 500, len(mixed) // 5)
        if size == 0:
            raise InputError(f"{len(mixed)} training examples are too few to train and to validate")
        train, dev = mixed[:-size], mixed[-size:]
    has_test = args.test_file or args.data_dir or not args.train_file
    test = _read(task, args, "test") if has_test else dev
    return {
        "train": _at_most(train, args.num_train, args.split_seed),
        "dev": _at_most(dev, args.num_dev, args.split_seed),
        "test": _at_most(test, args.num_test, args.split_seed),
    }


def _read(task: Task, args: DataArguments, split: str) -> list[Example]:
    file = getattr(args, f"{split}_file")
    return tasks.load_examples(task, split, data_dir=args.data_dir, files=file)


def _at_most(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    return tasks.sample(examples, limit, seed)


def train(model_args: ModelArguments, data_args: DataArguments, args: TrainArguments) -> dict:
    """Tune a model on a task; returns and writes the result. Resumes where told to."""
    began = time.perf_counter()
    task = task_of(data_args)
    splits = load_splits(task, data_args)
    if model_args.use_peft:
        torch.manual_seed(args.seed)  # the adapter's initial weights are part of the run
    model, tokenizer = models.load(model_args)
    form = form_for(model, tokenizer, task, data_args.max_length, truncate=data_args.truncate)
    if data_args.calibrate:
        form = form.calibrate(model)
    before = evaluate_form(model, form, splits["test"], args.per_device_eval_batch_size)
    trainer = _trainer(model, form, splits, args, asdict(model_args) | asdict(data_args))
    memory = peak_memory()
    output = trainer.train(resume_from_checkpoint=_checkpoint(args))
    after = evaluate_form(model, form, splits["test"], args.per_device_eval_batch_size)
    trainer.save_model(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    result = {
        "task": task.name,
        "model": model_args.model_name_or_path,
        "method": args.method + ("-lora" if model_args.use_peft else ""),
        "zero_shot": {"accuracy": before.accuracy, "loss": before.loss},
        "test": {"accuracy": after.accuracy, "loss": after.loss, "n": after.n},
        "dev": trainer.state.best_metric,
        "steps": trainer.state.global_step,
        "train_loss": output.training_loss,
        "seconds": time.perf_counter() - began,
        "peak_memory_above_model": peak_memory() - memory,
        "config": asdict(model_args) | asdict(data_args) | changed(args),
        "environment": environment(),
    }
    Path(args.output_dir, "result.json").write_text(json.dumps(result, indent=1, default=str))
    return result


def _trainer(model, form: Form, splits: Splits, args: TrainArguments, config: dict) -> Trainer:
    args.remove_unused_columns, args.label_names = False, ["labels"]
    kind: Any = MeZOTaskTrainer if args.method == "mezo" else AdamTaskTrainer
    trainer = kind(
        model,
        args,
        train_dataset=[form.encode(example) for example in splits["train"]],
        eval_dataset=[form.encode(example) for example in splits["dev"]],
        data_collator=form.collate,
        compute_metrics=_accuracy,
    )
    trainer.form = form
    trainer.run_config = config | changed(args)
    return trainer


def _accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def _checkpoint(args: TrainArguments) -> str | None:
    """Where to go on: a folder, or the last checkpoint of output_dir, which may not exist yet."""
    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        return str(asked)
    found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if found is None:
        logging.getLogger("mezo").warning("%s has no checkpoint: starting anew", args.output_dir)
    return found


def evaluate(
    model_args: ModelArguments,
    data_args: DataArguments,
    *,
    log: str | None = None,
    batch_size: int = 32,
) -> dict:
    """Accuracy on the test examples: zero-shot, in context, or after replaying a run log."""
    task = task_of(data_args)
    examples = _at_most(_read(task, data_args, "test"), data_args.num_test, data_args.split_seed)
    shown: list[Example] = []
    if data_args.demonstrations:
        train = _read(task, data_args, "train")
        shown = tasks.sample(train, data_args.demonstrations, data_args.split_seed)
    model, tokenizer = models.load(model_args)
    if log is not None:
        trajectory.replay(log, model)
    form = form_for(model, tokenizer, task, data_args.max_length, truncate=data_args.truncate)
    if data_args.calibrate:
        form = form.calibrate(model)
    found = evaluate_form(model, form, examples, batch_size, demonstrations=shown)
    result = {"task": task.name, "model": model_args.model_name_or_path, "accuracy": found.accuracy}
    result |= {"loss": found.loss, "n": found.n, "demonstrations": len(shown)}
    return result | {"demonstrations_dropped": found.dropped, "log": log}


def replay(model_args: ModelArguments, log: str, output_dir: str, until: int | None = None) -> dict:
    """Rebuild a run's weights from its base model and its log, and save them."""
    steps = len(trajectory.read(log).steps)
    if until is not None and not 0 <= until <= steps:
        raise InputError(f"{log} has {steps} steps, until must be one of them, got {until}")
    config = trajectory.read(log).header["config"]
    if config.get("use_peft"):  # the adapter as the run initialised it
        names = {f.name for f in fields(model_args)} & set(config) - {"model_name_or_path"}
        for name in names:
            setattr(model_args, name, config[name])
        torch.manual_seed(config["seed"])
    model, tokenizer = models.load(model_args)
    trajectory.replay(log, model, until=until)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return {"log": log, "steps": steps if until is None else until, "output_dir": output_dir}


def changed(args: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default, as JSON can hold them."""
    found: dict[str, Any] = {}
    for f in fields(args):
        value = getattr(args, f.name)
        value = value.value if isinstance(value, Enum) else value
        if f.init and value != f.default and isinstance(value, str | int | float):
            found[f.name] = value
    return found | {"seed": args.seed, "learning_rate": args.learning_rate}


def environment() -> dict[str, str]:
    """What a result depends on beside its configuration."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "mezo": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }


def peak_memory() -> int:
    """The largest memory that was in use so far, in bytes: the GPU's, or the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
