"""What the command line does, as functions: train, evaluate, replay.

    result = run.train(ModelArguments("facebook/opt-1.3b"), DataArguments("sst2"),
                       TrainArguments("runs/sst2", max_steps=20_000))

Each returns a dict that JSON can hold. `train` leaves in output_dir: run.mezo (the run log),
result.json, the Trainer's checkpoints, and the tuned model.
"""

import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import Trainer

from mezo import __version__, tasks
from mezo.arguments import DataArguments, ModelArguments
from mezo.errors import InputError
from mezo.evaluation.evaluate import Result
from mezo.evaluation.evaluate import evaluate as evaluate_form
from mezo.models import adapters as tuners
from mezo.models import loading as models
from mezo.models.frozen import FrozenLower
from mezo.models.trainable import select
from mezo.objectives import Form, Generated, form_for
from mezo.runs import methods, rates
from mezo.runs.rebuild import rebuilt
from mezo.tasks import Example, Task
from mezo.trainers import placement
from mezo.trainers.resume import STATE, last_checkpoint
from mezo.trainers.trainer import MeZOConfig, MeZOMixin, changed

Splits = dict[str, list[Example]]
RESULT = "result.json"  # in output_dir, written last


@dataclass
class TrainArguments(MeZOConfig):
    """MeZOConfig with the defaults of the command line: the paper's batch, evaluation by steps."""

    output_dir: str = "runs/mezo"  # type: ignore[assignment]
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default: by what is trained and the size of the model."}
    )
    mezo_eps: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Default 1e-3; for adapters 1e-2, for a prefix 1e-1."}
    )
    method: str = field(
        default="mezo",
        metadata={
            "help": "mezo; or a baseline: adam (back-propagation), lp (linear probe), zero-shot, "
            "icl (in context)."
        },
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
    run_config: dict[str, Any] | None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not return_outputs:
            return self.form.loss(model, inputs)
        if isinstance(self.form, Generated):  # its dev metric is the loss
            return self.form.loss(model, inputs), {}
        scores = self.form.scores(model, inputs)
        return F.cross_entropy(scores, inputs["labels"]), {"scores": scores}


class MeZOTaskTrainer(TaskMixin, MeZOMixin, Trainer):
    def pair_loss(self, model, inputs, both):
        return self.form.pair_loss(model, inputs, both)


class AdamTaskTrainer(TaskMixin, Trainer):
    """Fine-tuning by back-propagation, the baseline: the Trainer's own AdamW."""


def task_of(args: DataArguments) -> Task:
    """The named task, or one made of the options prompt, candidates and labels."""
    own = args.task == "custom" or args.prompt is not None or bool(args.candidates)
    if not own:
        return tasks.get(args.task)
    if args.prompt is None:
        raise InputError("a custom task needs --prompt, a template such as '{text} It was'")
    if args.task not in ("custom", DataArguments.task):
        raise InputError(f"--prompt and --candidates are for --task custom, not {args.task}")
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
        number = len(train)
        train, dev = tasks.few_shot(train, args.k, args.split_seed)
        if not dev:
            raise InputError(f"k {args.k} is too many: {number} training examples leave no dev set")
    elif _has_dev(task, args):
        dev = _read(task, args, "dev")
    else:
        size = args.num_dev or min(task.num_dev, len(train) // 5)
        if size == 0:
            raise InputError(f"{len(train)} training examples are too few to train and to validate")
        train, dev = tasks.train_dev(train, args.num_train, size, args.split_seed)
    has_test = args.test_file or args.data_dir or not args.train_file
    if task.paths and not (args.test_file or args.data_dir):
        has_test = bool(task.paths.keys() & {"test", "dev"})
    test = _read(task, args, "test") if has_test else dev
    return {
        "train": _at_most(train, args.num_train, args.split_seed),
        "dev": _at_most(dev, args.num_dev, args.split_seed),
        "test": _tested(test, args),
    }


def _has_dev(task: Task, args: DataArguments) -> bool:
    """Whether there is a dev set that is not the test set."""
    if args.dev_file or args.train_file:
        return bool(args.dev_file)
    if task.paths and not args.data_dir:
        return task.paths.get("dev") not in (None, task.paths.get("test"))
    return tasks.has_own_dev(task, args.data_dir) if args.data_dir else bool(task.folder)


def _tested(examples: list[Example], args: DataArguments) -> list[Example]:
    """The test examples that the options ask for; all few-shot runs are tested on the same ones."""
    if args.k is not None:
        return tasks.few_shot_test(examples, args.num_test or 1000)
    return _at_most(examples, args.num_test, args.split_seed)


def _read(task: Task, args: DataArguments, split: str) -> list[Example]:
    file = getattr(args, f"{split}_file")
    return tasks.load_examples(task, split, data_dir=args.data_dir, files=file)


def _at_most(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    return tasks.sample(examples, limit, seed)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    on_rate: Callable[[str], None] = lambda line: None,
) -> dict:
    """Tune a model on a task; returns and writes the result. Resumes where told to.

    `on_rate` is told in a line, before the first step, of a learning rate or an eps that were taken
    because none was given.
    """
    began = time.perf_counter()
    task = task_of(data_args)
    splits = load_splits(task, data_args)
    check_arguments(args, model_args)
    given, args = args, rates.resolved(model_args, args)
    if args.method == "icl" and data_args.demonstrations < 1:
        raise InputError("method icl shows training examples: say how many, --demonstrations 32")
    checkpoint = _checkpoint(args)
    make_folder(args.output_dir)
    begins = methods.started_with(model_args, args.output_dir, checkpoint)
    model, tokenizer = placement.load(begins, args)
    if args.method not in methods.WITHOUT_TRAINING:
        models.refuse_quantised(model)
    with placement.inference(model, args.device, args.offload):
        form = form_of(model, tokenizer, task, model_args, data_args)
    config = config_of(model_args, data_args, args)
    if line := rates.told(model_args, given, args):
        on_rate(line)
    with trained_part(model, model_args):
        with placement.inference(model, args.device, args.offload):
            before = evaluate_form(model, form, splits["test"], args.per_device_eval_batch_size)
        if args.method == "icl":
            shown = tasks.sample(splits["train"], data_args.demonstrations, data_args.split_seed)
            form = form_of(model, tokenizer, task, model_args, data_args, shown)
        if args.method in methods.WITHOUT_TRAINING:
            found = methods.without_training(model, form, splits, args)
        else:
            trainer = _trainer(model, form, splits, args, config)
            with trainer.offloaded() if args.offload else nullcontext():
                found = methods.by_trainer(trainer, splits, checkpoint)
            if args.process_index == 0:
                tokenizer.save_pretrained(args.output_dir)
    result = _result(task, model_args.model_name_or_path, before, found)
    result["method"] = args.method + tuners.method_of(model_args)
    result |= {"seconds": time.perf_counter() - began, "config": config}
    result["environment"] = environment()
    return write_result(args.output_dir, result) if args.process_index == 0 else result


def _result(task: Task, model: str, before: Result, found: dict[str, Any]) -> dict[str, Any]:
    """What was measured: of the model as it was, and by a method (methods.py)."""
    test = found.pop("test")
    return {
        "task": task.name,
        "metric": task.metric,
        "model": model,
        "zero_shot": before.metrics | {"loss": before.loss},
        "test": test.metrics | {"loss": test.loss, "n": test.n},
        "demonstrations_dropped": test.dropped,
        "steps": 0,
        "kept_step": 0,
        **found,
    }


def write_result(output_dir: str, result: dict[str, Any]) -> dict[str, Any]:
    """Leaves it as result.json, and returns it."""
    Path(output_dir, RESULT).write_text(json.dumps(result, indent=1, default=str))
    return result


def form_of(
    model,
    tokenizer,
    task: Task,
    model_args: ModelArguments,
    data_args: DataArguments,
    demonstrations: Sequence[Example] = (),
) -> Form:
    """The form as the options ask for it: with demonstrations in front, then calibrated."""
    options: dict[str, Any] = {"truncate": data_args.truncate}
    options["share"] = not model_args.freeze_layers
    form = form_for(model, tokenizer, task, data_args.max_length, **options)
    form = form.in_context(model, demonstrations) if demonstrations else form
    return form.calibrate(model, data_args.calibration) if data_args.calibrate else form


def config_of(
    model_args: ModelArguments, data_args: DataArguments, args: TrainArguments
) -> dict[str, Any]:
    """What a run is asked for, as its log and its result say it."""
    return asdict(model_args) | asdict(data_args) | changed(args)


def check_arguments(args: TrainArguments, model_args: ModelArguments) -> None:
    """What the Trainer would not refuse, or not in words."""
    methods.check(args, model_args)
    placement.check_arguments(args)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.max_steps == 0:
        raise InputError("max_steps must be at least 1, or -1 for num_train_epochs, got 0")


def make_folder(output_dir: str) -> None:
    """An output folder, with its parents. InputError where there can be none."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir {output_dir}: {error.strerror}") from None


def trained_part(model, args: ModelArguments) -> AbstractContextManager:
    """Freezes what is not to be trained; within the context frozen lower layers run once a text."""
    if args.trainable is not None:
        select(model, args.trainable)
    return FrozenLower(model, args.freeze_layers) if args.freeze_layers else nullcontext()


def _trainer(model, form: Form, splits: Splits, args: TrainArguments, config: dict) -> Any:
    args.remove_unused_columns, args.label_names = False, ["labels"]
    args.dataloader_pin_memory &= torch.accelerator.is_available()  # else it warns
    data = {
        "train_dataset": [form.encode(example) for example in splits["train"]],
        "eval_dataset": [form.encode(example) for example in splits["dev"]],
    }
    kind: Any = MeZOTaskTrainer if args.method == "mezo" else AdamTaskTrainer
    metrics: Any = _accuracy
    if isinstance(form, Generated):  # writing at every evaluation would take longer than training
        metrics, args.metric_for_best_model, args.greater_is_better = None, "loss", False
    try:
        trainer = kind(model, args, **data, data_collator=form.collate, compute_metrics=metrics)
    except (ValueError, RuntimeError) as error:  # of an argument: report_to, seed, ...
        raise InputError(str(error)) from error
    trainer.form = form
    trainer.run_config = config
    return trainer


def _accuracy(prediction) -> dict[str, float]:
    scores = prediction.predictions
    scores = np.where(scores == -100, -np.inf, scores)  # how the Trainer fills up fewer candidates
    return {"accuracy": float(np.mean(scores.argmax(-1) == prediction.label_ids))}


def _checkpoint(args: TrainArguments) -> str | bool | None:
    return checkpoint_of(args, has_log=args.method == "mezo")


def checkpoint_of(args: Any, has_log: bool = True) -> str | bool | None:
    """Where to go on: a folder; True for wherever the run in output_dir ended; None to begin."""
    asked, log = str(args.resume_from_checkpoint or False), Path(args.output_dir, "run.mezo")
    if asked.lower() == "false":
        if log.exists():
            raise InputError(
                f"{log} exists: --resume_from_checkpoint true goes on with that run, another "
                "--output_dir keeps it"
            )
        return None
    if asked.lower() != "true":
        if not Path(asked, STATE).is_file():
            raise InputError(f"resume_from_checkpoint {asked} is no folder with a {STATE}")
        return asked
    last = last_checkpoint(args.output_dir)
    if last is None and not log.exists():
        logging.getLogger("mezo").warning("%s has no checkpoint: starting anew", args.output_dir)
        return None
    return True if has_log else last


def evaluate(
    model_args: ModelArguments,
    data_args: DataArguments,
    *,
    log: str | None = None,
    until: int | None = None,
    batch_size: int = 32,
    offload: bool = False,
) -> dict:
    """Metrics on the test examples: zero-shot, in context, or after replaying a run log."""
    if data_args.demonstrations < 0:
        raise InputError(f"demonstrations must not be negative, got {data_args.demonstrations}")
    if log is None and until is not None:
        raise InputError("until is for the run log that --replay names")
    task = task_of(data_args)
    examples = _tested(_read(task, data_args, "test"), data_args)
    shown: list[Example] = []
    if data_args.demonstrations:
        train = _read(task, data_args, "train")
        shown = tasks.sample(train, data_args.demonstrations, data_args.split_seed)
    if log is None:
        model, tokenizer = models.load(model_args, offload=offload)
    elif offload:
        raise InputError("offload is for a model in files: `mezo replay --by_tensor` makes it")
    else:
        model, tokenizer, _ = rebuilt(model_args, log, until)
    with placement.inference(model, offload=offload):
        form = form_of(model, tokenizer, task, model_args, data_args, shown)
        found = evaluate_form(model, form, examples, batch_size)
    result = {"task": task.name, "model": model_args.model_name_or_path} | found.metrics
    result |= {"loss": found.loss, "n": found.n, "demonstrations": len(shown)}
    return result | {"demonstrations_dropped": found.dropped, "log": log}


def replay(model_args: ModelArguments, log: str, output_dir: str, until: int | None = None) -> dict:
    """Rebuild a run's weights from its base model and its log, and save them."""
    model, tokenizer, steps = rebuilt(model_args, log, until)
    make_folder(output_dir)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return {"log": log, "steps": steps, "output_dir": output_dir}


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
