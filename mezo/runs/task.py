"""A run on a task, as functions: train, evaluate, replay.

    result = train(ModelArguments("facebook/opt-1.3b"), DataArguments("sst2"),
                   TrainArguments("runs/sst2", max_steps=20_000))

Each returns a dict that JSON can hold. `train` leaves in the output folder what lifecycle.py says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mezo import tasks
from mezo.errors import InputError
from mezo.evaluation.evaluate import Result
from mezo.evaluation.evaluate import evaluate as evaluate_form
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives import Form, form_for
from mezo.objectives.progress import SILENT, Progress
from mezo.rules import Rule
from mezo.runs import methods, published, rates
from mezo.runs.arguments import TrainArguments
from mezo.runs.data import Splits, load_splits, read_split, task_of, tested
from mezo.runs.data_arguments import DataArguments
from mezo.runs.lifecycle import carry_out, finish, trained_part
from mezo.runs.plan import Plan, Tell, resolve
from mezo.runs.rebuild import rebuilt
from mezo.runs.result import make_folder
from mezo.runs.task_trainer import task_trainer
from mezo.tasks import Example, Task
from mezo.trainers import engines, placement


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainArguments,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Tune a model on a task and return the result, which is also written; resume if asked to.

    Before the first step, `tell` is called with a line about a learning rate or eps that was chosen
    because none was given, and with one about the tensors that `trainable` selected. Raises
    InputError for options or data that do not fit.
    """
    if args.method == "icl" and data_args.demonstrations < 1:
        raise InputError("method icl shows training examples: say how many, --demonstrations 32")
    plan = resolve(model_args, data_args, args, tell)
    task = task_of(data_args)
    kind = TaskKind(task, load_splits(task, data_args), model_args, data_args)
    trains = args.method not in methods.WITHOUT_TRAINING
    return carry_out(kind, plan) if trains else _without_training(kind, plan)


@dataclass(frozen=True)
class TaskKind:
    """The parts of a run that are specific to a task (lifecycle.Kind)."""

    task: Task
    splits: Splits
    model_args: ModelArguments
    data_args: DataArguments

    def form(self, model: Any, tokenizer: Any, shown: Sequence[Example] = ()) -> Form:
        """Return the form, as the options ask for it."""
        return form_of(model, tokenizer, self.task, self.model_args, self.data_args, shown)

    def settled(self, plan: Plan, model: Any, tokenizer: Any) -> Plan:
        """Return the plan with a learning rate measured on the model, if none was given."""
        args = plan.args
        if not (plan.measures and self.task.kind == "classification"):
            return plan
        passes = 4 * rates.DIRECTIONS
        plan.tell(f"no learning_rate was given: {passes} forward passes on the model measure one")
        with placement.inference(model, args.device, args.offload):
            form, train = self.form(model, tokenizer), self.splits["train"]
            rate = rates.measured(model, form, train, args, args.max_steps, plan.progress)
        if rate is None:
            plan.tell("the estimates on this model tell no learning rate")
            return plan
        plan.tell(
            f"learning_rate {rate:g}, mezo_eps {args.mezo_eps:g}: the rate was measured on this "
            f"model for {args.max_steps:,} steps; give your own to override"
        )
        return plan.at_rate(rate)

    def trainer(self, plan: Plan, model: Any, tokenizer: Any) -> Any:
        args = plan.args
        with placement.inference(model, args.device, args.offload):
            form = self.form(model, tokenizer)
        if self.data_args.as_published:
            args = published.best_by_loss(args, form)
        return task_trainer(model, form, self.splits, args)

    def before(self, plan: Plan, trainer: Any) -> dict[str, Any]:
        given = (trainer.model, trainer.form, self.splits["test"])
        size = plan.args.per_device_eval_batch_size
        return self.named(evaluate_form(*given, size, progress=plan.progress))

    def named(self, zero_shot: Result) -> dict[str, Any]:
        """Return the task's name and metric, and the zero-shot results."""
        named = {"task": self.task.name, "metric": self.task.metric}
        return named | {"zero_shot": zero_shot.metrics | {"loss": zero_shot.loss}}

    def after(self, plan: Plan, trainer: Any, found: dict[str, Any]) -> dict[str, Any]:
        args, state, passes = trainer.args, trainer.state, methods.passes_of_a_step(plan.args)
        size, kept, dev = args.per_device_eval_batch_size, state.global_step, None
        if args.load_best_model_at_end:
            kept, dev = state.best_global_step or kept, state.best_metric
        given, splits = (trainer.model, trainer.form), self.splits
        test = evaluate_form(*given, splits["test"], size, progress=plan.progress)
        if dev is None or args.metric_for_best_model != self.task.metric:  # chosen by another
            dev = evaluate_form(*given, splits["dev"], size, progress=plan.progress).value
        return tested_as(test) | {
            "dev": dev,
            "kept_step": kept,  # whose weights are saved
            "forward_passes": state.global_step * passes,
            "curve": methods.curve_of(state.log_history, passes),
        }


def tested_as(test: Result) -> dict[str, Any]:
    """Return the result's fields about the test examples."""
    found = {"test": test.metrics | {"loss": test.loss, "n": test.n}}
    return found | {"demonstrations_dropped": test.dropped}


def _without_training(kind: TaskKind, plan: Plan) -> dict[str, Any]:
    """Carry out a run of a method that changes no weights."""
    args, splits, data = plan.args, kind.splits, kind.data_args
    make_folder(args.output_dir)
    model, tokenizer = placement.load(plan.begins, args)
    with placement.inference(model, args.device, args.offload), trained_part(model, plan):
        form = kind.form(model, tokenizer)
        size, progress = args.per_device_eval_batch_size, plan.progress
        before = evaluate_form(model, form, splits["test"], size, progress=progress)
        if args.method == "icl":
            shown = tasks.sample(splits["train"], data.demonstrations, data.split_seed)
            form = kind.form(model, tokenizer, shown)
        found = methods.without_training(model, form, splits, args, progress)
    return finish(plan, kind.named(before) | found | tested_as(found["test"]))


def form_of(
    model,
    tokenizer,
    task: Task,
    model_args: ModelArguments,
    data_args: DataArguments,
    demonstrations: Sequence[Example] = (),
) -> Form:
    """Return the form that the options ask for: with demonstrations in front, then calibrated.

    With `as_published`, calibration uses no demonstrations, and texts are cut by tokens.
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


def evaluate(
    model_args: ModelArguments,
    data_args: DataArguments,
    *,
    log: str | None = None,
    until: int | None = None,
    batch_size: int = 32,
    offload: bool = False,
    progress: Progress = SILENT,
    engine: str = "transformers",
    engine_options: str | None = None,
) -> dict:
    """Return metrics on the test examples: zero-shot, in context, or after replaying a run log.

    Args:
        model_args: The model, or the base model of `log`.
        data_args: The task and its examples.
        log: Run log to replay first.
        until: Replay only the first steps of the run, up to this one.
        batch_size: Examples per forward pass.
        offload: Leave the weights in their files and load them block by block; not with `log`.
        engine: What scores and writes: "transformers", or "vllm" (docs/engines.md).
        engine_options: Options of the engine, as JSON.

    Raises InputError for options or data that do not fit.
    """
    if data_args.demonstrations < 0:
        raise InputError(f"demonstrations must not be negative, got {data_args.demonstrations}")
    if log is None and until is not None:
        raise InputError("until is for the run log that --replay names")
    engines.check(engine, engine_options, offload=offload)
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
        model, tokenizer, _ = rebuilt(model_args, log, until, progress=progress)
    how: dict[str, Any] = {"each": each, "progress": progress}
    if engine != "transformers":
        form = form_of(model, tokenizer, task, model_args, data_args, shown)
        with engines.reading(engine, model, engine_options, tuned=log is not None) as reader:
            found = evaluate_form(model, form, examples, batch_size, reader=reader, **how)
    else:
        with placement.inference(model, offload=offload):
            form = form_of(model, tokenizer, task, model_args, data_args, shown)
            found = evaluate_form(model, form, examples, batch_size, **how)
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
    verify: bool = True,
    progress: Progress = SILENT,
) -> dict:
    """Rebuild a run's weights from its base model and its log, and save them."""
    how: dict[str, Any] = {"rules": rules, "verify": verify, "progress": progress}
    model, tokenizer, steps = rebuilt(model_args, log, until, **how)
    make_folder(output_dir)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return {"log": log, "steps": steps, "output_dir": output_dir}
