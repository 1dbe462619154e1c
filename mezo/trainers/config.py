"""MeZO's options beside the Trainer's arguments, and how they configure the optimizer."""

import inspect
import json
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from mezo import layer_norms, rules
from mezo.errors import InputError
from mezo.foreign import imported
from mezo.mezo import MeZO
from mezo.options.option import Source
from mezo.options.table import ARGUMENTS, FIELDS, NORMS
from mezo.rules import Rule
from mezo.schedules import Schedule, linear

_FLAGS = {option.flag: option for option in FIELDS}


def option(flag: str) -> Any:
    """Return the field of an option of the table, with its default and its help."""
    entry = _FLAGS[flag]
    return field(default=entry.flag_default, metadata={"help": entry.help})


@dataclass
class MeZOConfig(TrainingArguments):
    """TrainingArguments with MeZO's options and defaults; `learning_rate` and `seed` are MeZO's.

    For a TRL trainer: `@dataclass class MeZOSFTConfig(MeZOConfig, SFTConfig): ...`. Any other
    TrainingArguments works too; options that it lacks take the defaults of `MeZO`. MeZO computes no
    gradient, so these options have no effect: optim, adam_* (except with rule=adam), max_grad_norm,
    activation_checkpointing, neftune_*, ddp_*.
    """

    learning_rate: float = option("learning_rate")
    lr_scheduler_type: str = field(  # type: ignore[assignment]  # TRL narrows it the same way
        default="constant",
        metadata={"help": "Learning-rate schedule; the paper keeps the rate constant."},
    )
    mezo_eps: float = option("mezo_eps")
    mezo_eps_end: float | None = option("mezo_eps_end")
    num_samples: int = option("num_samples")
    num_samples_end: int | None = option("num_samples_end")
    scale_lr_with_samples: bool = option("scale_lr_with_samples")
    fresh_batches: bool = option("fresh_batches")
    distribution: str = option("distribution")
    perturbation: str | None = option("perturbation")
    rank: int = option("rank")
    interval: int = option("interval")
    rounding: str | None = option("rounding")
    rule: str = option("rule")
    momentum: float = option("momentum")
    window: str | None = option("window")
    rule_options: str | None = option("rule_options")
    estimator: str = option("estimator")
    shaping: str | None = option("shaping")
    modified: str | None = option("modified")
    modified_norms: str = option("modified_norms")
    keep: float | None = option("keep")
    clip: float | None = option("clip")
    clip_quantile: float | None = option("clip_quantile")
    max_refused: int = option("max_refused")
    common_random_numbers: bool = option("common_random_numbers")
    probe_groups: int = option("probe_groups")
    graphs: bool = option("graphs")
    offload: bool = option("offload")
    offload_folder: str | None = option("offload_folder")
    offload_write_every: int = option("offload_write_every")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the defaults of the other config, TRL's say, for all but MeZO's own options.

        A dataclass takes the fields of its first base over those of the second, inherited ones too,
        so that `class X(MeZOConfig, KTOConfig)` would fall back to TrainingArguments' defaults.
        """
        super().__init_subclass__(**kwargs)
        bases = [base for base in cls.__bases__ if issubclass(base, TrainingArguments)]
        if not any(issubclass(base, MeZOConfig) for base in bases):
            return
        plain = {f.name: f for f in fields(TrainingArguments)}
        declared = dict(inspect.get_annotations(cls))
        ours = {"learning_rate", "lr_scheduler_type", *_OFF, *declared}
        for base in (base for base in bases if not issubclass(base, MeZOConfig)):
            for f in fields(base):
                if f.name in plain and f.name not in ours and _differs(f, plain[f.name]):
                    declared[f.name] = f.type
                    setattr(cls, f.name, _copied(f))
        cls.__annotations__ = declared

    @property
    def place_model_on_device(self) -> bool | None:
        """Whether the Trainer moves the model to the device; with `offload` it must not."""
        return False if self.offload else super().place_model_on_device


_OFF = ("bf16", "gradient_checkpointing", "activation_checkpointing")  # which TRL turns on


def _differs(one: Field, other: Field) -> bool:
    """Whether two fields have different defaults."""
    defaults = [f.default if f.default is not MISSING else f.default_factory for f in (one, other)]
    return defaults[0] is not defaults[1] and defaults[0] != defaults[1]


def _copied(f: Field) -> Any:
    if f.default is not MISSING:
        return field(default=f.default, metadata=f.metadata)
    return field(default_factory=f.default_factory, metadata=f.metadata)  # type: ignore[arg-type]


def mezo_options(
    args: MeZOConfig,
    model: torch.nn.Module,
    named: list[tuple[str, torch.nn.Parameter]],
    scales: dict[str, float],
) -> dict[str, Any]:
    """Return the keyword arguments of `MeZO` that hold for all parameter groups.

    `named` are the trained parameters, and `scales` is d by tensor, for `modified`. Raises
    InputError if the rule is unknown.
    """
    ours = [entry for entry in ARGUMENTS if entry.source is Source.OURS and not entry.of_group]
    options = {entry.name: getattr(args, entry.flag) for entry in ours}
    if ":" in args.estimator:
        options["estimator"] = imported(args.estimator, "estimator")
    options |= {"rule": rule_of(args), "rounding": rounding_of(args, model)}
    if args.modified is not None:
        options["layers"] = {"scales": scales, "modified": args.modified}
    if args.keep is not None:
        options["layers"] = options.get("layers", {}) | layer_norms.small(named, args.keep)
        options["perturbation"] = args.perturbation or "scratch"
    return options


def check_modified(args: MeZOConfig) -> None:
    """Raise InputError for an unknown `modified` or `modified_norms`."""
    for name in ("modified", "modified_norms"):
        _FLAGS[name].check(getattr(args, name))
    if args.modified is None and args.modified_norms != NORMS[0]:
        raise InputError(f"modified_norms {args.modified_norms} is for modified, which is not set")


def rounding_of(args: MeZOConfig, model: torch.nn.Module) -> str:
    """Return how updates of 16-bit weights are rounded: as given, or as is best for the model."""
    low_rank = args.perturbation == "low_rank"  # it writes a matrix too seldom for master weights
    return args.rounding or ("stochastic" if low_rank else default_rounding(model))


def default_rounding(model: torch.nn.Module) -> str:
    """Return how updates are rounded if nothing is given: an adapter can afford master weights."""
    return "stochastic" if getattr(model, "peft_config", None) is None else "master"


def rule_of(args: MeZOConfig) -> Rule:
    """Return the rule that the config names, with its options.

    Raises InputError if the rule is unknown, or if `window` is malformed or not for this rule.
    """
    if ":" in args.rule:
        return rules.rule_of({"name": args.rule} | _own_options(args), _named(args.rule))
    window = args.window
    if window is not None and window != "all":
        if not window.isdecimal():
            raise InputError(f"window must be a number of steps or all, got {window!r}")
        window = int(window)  # type: ignore[assignment]
    given: dict[str, Any] = {"name": args.rule}
    if args.rule == "momentum":
        given |= {"momentum": args.momentum, "window": window}
    elif args.rule == "adam":
        betas = [args.adam_beta1, args.adam_beta2]
        given |= {"betas": betas, "eps": args.adam_epsilon, "window": window}
    elif window is not None:
        raise InputError(f"window is for the rules momentum and adam, not {args.rule}")
    return rules.rule_of(rules.options(given))


def _named(text: str) -> dict[str, type[Rule]]:
    return {text: rules.rule_class(text)}


def _own_options(args: MeZOConfig) -> dict[str, Any]:
    try:
        found = json.loads(args.rule_options or "{}")
    except ValueError as error:
        raise InputError(f"rule_options is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"rule_options is a JSON object, got {args.rule_options}")
    return found


def schedule_of(args: TrainingArguments, optimizer: MeZO, steps: int) -> Schedule | None:
    """Return the schedule of eps and num_samples over `steps`; None if both stay constant."""
    moving: dict[str, Any] = {}
    for option, name, end in (
        ("eps", "mezo_eps", "mezo_eps_end"),
        ("num_samples", "num_samples", "num_samples_end"),
    ):
        if getattr(args, end, None) is not None:
            moving[option] = linear(getattr(args, name), getattr(args, end), max(1, steps))
    return Schedule(optimizer, **moving) if moving else None


def scale_rates_(optimizer: MeZO, scheduler: Any) -> None:
    """Multiply the rates of the next step by its number of directions (Table 6).

    Raises InputError for a schedule that computes a rate from the one before.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # within Accelerate's
    if not isinstance(scheduler, LambdaLR):
        raise InputError(
            f"scale_lr_with_samples cannot be combined with a {type(scheduler).__name__}"
        )
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate * group["num_samples"]


def changed(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that differ from their defaults, and the seed and learning rate always.

    Only values that JSON can hold are included, and no hub tokens, which are secrets.
    """
    found = {"seed": args.seed, "learning_rate": args.learning_rate}
    given = args.to_dict()
    for f in fields(args):
        default = f.default.value if isinstance(f.default, Enum) else f.default
        known = f.init and not f.name.endswith("_token")  # the hub's tokens are secrets
        if known and given[f.name] != default and isinstance(given[f.name], str | int | float):
            found[f.name] = given[f.name]
    return found
