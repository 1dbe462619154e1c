"""The plan of a run: options are resolved once, and every later part of the run reads the plan.

    plan = resolve(model_args, data_args, args)

Here the options are checked, a missing learning rate or eps is filled in by recipe, and the place
to resume from is determined. Nothing is loaded or written yet.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mezo import trajectory
from mezo.errors import InputError
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives.progress import Progress
from mezo.runs import methods, rates
from mezo.runs.arguments import TrainArguments
from mezo.runs.result import checkpoint_of
from mezo.trainers import changes, placement
from mezo.trainers.config import changed

START = "start"  # folder in output_dir where older versions kept the prefix that a run began with
Tell = Callable[[str], None]  # takes a line for the user


@dataclass(frozen=True)
class Plan:
    """A run with all options resolved.

    `begins` is the model to load: the requested one or, when a prefix run of an older version is
    resumed, the prefix that it kept (new logs hold it). `checkpoint` is a folder to resume from,
    True to resume wherever the run in the output folder ended, or None to begin. `config` is what
    the log and the result record. `chosen` is a line on values that were not given and are taken
    by the model's size, unless they are measured; it may be empty.
    """

    model: ModelArguments
    begins: ModelArguments
    args: Any  # TrainArguments, or a TRL config with MeZO's options
    checkpoint: str | bool | None
    config: dict[str, Any]
    tell: Tell
    began: float  # time.perf_counter()
    measures: bool = False  # whether to measure a rate on the loaded model, as none was given
    chosen: str = ""

    def at_rate(self, rate: float) -> "Plan":
        """Return the same run at another learning rate."""
        args = replace(self.args, learning_rate=rate)
        return replace(self, args=args, config=self.config | {"learning_rate": rate})

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.args.process_index == 0

    @property
    def progress(self) -> Progress:
        """Where lines about how far a loop is go: where the run's other lines go."""
        return Progress(self.tell)

    @property
    def method(self) -> str:
        return _method_of(self.args)


def resolve(
    model_args: ModelArguments, data_args: Any, args: Any, tell: Tell = lambda line: None
) -> Plan:
    """Return the plan of a run.

    Raises InputError for options that exclude each other or contradict the run that is resumed.

    `tell` is called, in the process that prints, with a line that says which values were chosen
    because they were not given.
    """
    began = time.perf_counter()
    tell = tell if args.process_index == 0 else (lambda line: None)
    _check(model_args, args)
    checkpoint = checkpoint_of(args, has_log=_method_of(args) == "mezo")
    given = args = _as_before(args) if checkpoint else args
    args = rates.resolved(model_args, args)
    # Processes that measure separately may not agree.
    alone = args.world_size == 1 and not args.offload
    lacks = _method_of(args) == "mezo" and given.learning_rate is None
    measures = lacks and alone and not checkpoint and args.max_steps > 0
    chosen = rates.told(model_args, given, args)
    begins = _started_with(model_args, args.output_dir, checkpoint)
    config = config_of(model_args, data_args, args)
    placement.check_arguments(args)
    if checkpoint:
        changes.check_log(Path(args.output_dir, "run.mezo"), config, args)
    return Plan(model_args, begins, args, checkpoint, config, tell, began, measures, chosen)


def _method_of(args: Any) -> str:
    return getattr(args, "method", "mezo")  # only MeZO's own arguments have others


def _as_before(args: Any) -> Any:
    """Return the arguments with the resumed run's rate and eps where none are given."""
    log = Path(args.output_dir, "run.mezo")
    if not trajectory.begun(log):
        return args
    had = trajectory.read(log, recover=True).header["config"]
    names = ("learning_rate", "mezo_eps")
    lacking = [n for n in names if getattr(args, n) is None and isinstance(had.get(n), float)]
    return replace(args, **{name: had[name] for name in lacking})


def config_of(model_args: ModelArguments, data_args: Any, args: Any) -> dict[str, Any]:
    """Return the options of a run, as its log and its result record them."""
    return asdict(model_args) | asdict(data_args) | changed(args)


def _check(model_args: ModelArguments, args: Any) -> None:
    """Raise InputError for values that the Trainer accepts or refuses without a clear message."""
    if isinstance(args, TrainArguments):
        methods.check(args, model_args)
    methods.check_adapter(model_args)
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    for name in (*sizes, "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(args, name)}")
    if args.learning_rate == 0:
        raise InputError("learning_rate must be positive, got 0: nothing would be learned")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise InputError(f"output_dir {args.output_dir}: File exists")
    if args.max_steps < 1 and args.max_steps != -1:  # the Trainer takes any of them for -1
        raise InputError(
            f"max_steps must be at least 1, or -1 for num_train_epochs, got {args.max_steps}"
        )


def _started_with(
    model_args: ModelArguments, output_dir: str, checkpoint: str | bool | None
) -> ModelArguments:
    start = str(Path(output_dir, START))
    if checkpoint and model_args.use_peft and models.is_adapter(start):
        return replace(model_args, model_name_or_path=start, use_peft=False)
    return model_args
