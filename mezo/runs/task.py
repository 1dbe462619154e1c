"""What the command line does, as functions: train, evaluate, replay.

    result = run.train(ModelArguments("facebook/opt-1.3b"), DataArguments("sst2"),
                       TrainArguments("runs/sst2", max_steps=20_000))

Each returns a dict that JSON can hold. `train` leaves in output_dir: run.mezo (the run log),
result.json, the Trainer's checkpoints, and the tuned model.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from mezo import tasks
from mezo.arguments import DataArguments
from mezo.errors import InputError
from mezo.evaluation.evaluate import Result
from mezo.evaluation.evaluate import evaluate as evaluate_form
from mezo.models import adapters as tuners
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.frozen import FrozenLower
from mezo.models.trainable import select, told
from mezo.objectives import Form, form_for
from mezo.rules import Rule
from mezo.runs import methods, published, rates
from mezo.runs.arguments import TrainArguments
from mezo.runs.data import load_splits, read_split, task_of, tested
from mezo.runs.rebuild import rebuilt
from mezo.runs.result import checkpoint_of, environment, make_folder, write_result
from mezo.runs.task_trainer import task_trainer
from mezo.tasks import Example, Task
from mezo.trainers import placement
from mezo.trainers.trainer import changed


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    on_rate: Callable[[str], None] = lambda line: None,
) -> dict:
    """Tune a model on a task; returns and writes the result. Resumes where told to.

    `on_rate` is told in a line each, before the first step, of a learning rate or an eps that were
    taken because none was given, and of how many tensors and weights `trainable` found.
    """
    began = time.perf_counter()
    task = task_of(data_args)
    splits = load_splits(task, data_args)
    check_arguments(args, model_args)
    given, args = args, rates.resolved(model_args, args)
    if args.method == "icl" and data_args.demonstrations < 1:
        raise InputError("method icl shows training examples: say how many, --demonstrations 32")
    checkpoint = checkpoint_of(args, has_log=args.method == "mezo")
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
        if model_args.trainable is not None:
            on_rate(told(model, model_args.trainable))
        with placement.inference(model, args.device, args.offload):
            before = evaluate_form(model, form, splits["test"], args.per_device_eval_batch_size)
        if args.method == "icl":
            shown = tasks.sample(splits["train"], data_args.demonstrations, data_args.split_seed)
            form = form_of(model, tokenizer, task, model_args, data_args, shown)
        if args.method in methods.WITHOUT_TRAINING:
            found = methods.without_training(model, form, splits, args)
        else:
            if data_args.as_published:
                args = published.best_by_loss(args, form)
            trainer = task_trainer(model, form, splits, args, config)
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


def form_of(
    model,
    tokenizer,
    task: Task,
    model_args: ModelArguments,
    data_args: DataArguments,
    demonstrations: Sequence[Example] = (),
) -> Form:
    """Return the form as the options ask for it: with demonstrations in front, then calibrated.

    As published, calibration stands behind no demonstrations, and cuts are by tokens.
    """
    if data_args.as_published:
        published.set_first_token(tokenizer, model)
    options: dict[str, Any] = {"truncate": data_args.truncate}
    options["share"] = not model_args.freeze_layers
    form = form_for(model, tokenizer, task, data_args.max_length, **options)
    form = published.cut_by_tokens(form) if data_args.as_published else form
    if data_args.calibrate and data_args.as_published:
        form = form.calibrate(model, data_args.calibration)
    form = form.in_context(model, demonstrations) if demonstrations else form
    if data_args.calibrate and not data_args.as_published:
        form = form.calibrate(model, data_args.calibration)
    return form


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


def trained_part(model, args: ModelArguments) -> AbstractContextManager:
    """Freezes what is not to be trained; within the context frozen lower layers run once a text."""
    if args.trainable is not None:
        select(model, args.trainable)
    return FrozenLower(model, args.freeze_layers) if args.freeze_layers else nullcontext()


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
    examples = tested(read_split(task, data_args, "test"), data_args)
    shown: list[Example] = []
    each: list[list[Example]] | None = None
    if data_args.demonstrations:
        train, count = read_split(task, data_args, "train"), data_args.demonstrations
        if data_args.demonstrations_per_example or data_args.as_published:
            each = list(tasks.demonstration_sets(train, count, len(examples)))
        else:
            shown = tasks.sample(train, count, data_args.split_seed)
    if log is None:
        model, tokenizer = models.load(model_args, offload=offload)
    elif offload:
        raise InputError("offload is for a model in files: `mezo replay --by_tensor` makes it")
    else:
        model, tokenizer, _ = rebuilt(model_args, log, until)
    with placement.inference(model, offload=offload):
        form = form_of(model, tokenizer, task, model_args, data_args, shown)
        found = evaluate_form(model, form, examples, batch_size, each=each)
    result = {"task": task.name, "model": model_args.model_name_or_path} | found.metrics
    result |= {"loss": found.loss, "n": found.n, "demonstrations": data_args.demonstrations}
    return result | {"demonstrations_dropped": found.dropped, "log": log}


def replay(
    model_args: ModelArguments,
    log: str,
    output_dir: str,
    until: int | None = None,
    *,
    rules: Sequence[type[Rule]] = (),
) -> dict:
    """Rebuild a run's weights from its base model and its log, and save them."""
    model, tokenizer, steps = rebuilt(model_args, log, until, rules=rules)
    make_folder(output_dir)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return {"log": log, "steps": steps, "output_dir": output_dir}
