"""MeZO's options beside the Trainer's arguments, and how they configure the optimizer."""

import inspect
import json
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments

from mezo import layer_norms, layers, rules
from mezo.errors import InputError
from mezo.foreign import imported
from mezo.mezo import MeZO
from mezo.rules import Rule
from mezo.schedules import Schedule, linear


@dataclass
class MeZOConfig(TrainingArguments):
    """TrainingArguments with MeZO's options and defaults; `learning_rate` and `seed` are MeZO's.

    For a TRL trainer: `@dataclass class MeZOSFTConfig(MeZOConfig, SFTConfig): ...`. Any other
    TrainingArguments works too; options that it lacks take the defaults of `MeZO`. MeZO computes no
    gradient, so these options have no effect: optim, adam_* (except with rule=adam), max_grad_norm,
    activation_checkpointing, neftune_*, ddp_*.
    """

    learning_rate: float = field(
        default=1e-6,  # Tables 15 and 16: 1e-7 to 1e-6 for all weights
        metadata={
            "help": "Learning rate. For models of 1B weights and more, use 1e-7 to 1e-6 for all "
            "weights, 5e-5 to 1e-4 for LoRA and 1e-3 to 1e-2 for a prefix. Smaller models need "
            "larger rates; `mezo check` measures one."
        },
    )
    lr_scheduler_type: str = field(  # type: ignore[assignment]  # TRL narrows it the same way
        default="constant",
        metadata={"help": "Learning-rate schedule; the paper keeps the rate constant."},
    )
    mezo_eps: float = field(
        default=1e-3,
        metadata={
            "help": "Size of the perturbation: 1e-3 for all weights, 1e-2 for LoRA, 1e-1 for a "
            "prefix."
        },
    )
    num_samples: int = field(
        default=1,
        metadata={
            "help": "Number of directions averaged in each step; each costs two forward passes."
        },
    )
    num_samples_end: int | None = field(
        default=None,
        metadata={"help": "Value that num_samples reaches, linearly, by the last step."},
    )
    mezo_eps_end: float | None = field(
        default=None, metadata={"help": "Value that mezo_eps reaches, linearly, by the last step."}
    )
    fresh_batches: bool = field(
        default=False,
        metadata={
            "help": "Give each direction its own micro-batches (Algorithm 2); "
            "gradient_accumulation_steps must be a multiple of num_samples."
        },
    )
    rule: str = field(
        default="sgd",
        metadata={
            "help": "Update rule: sgd, momentum, adam (with adam_beta1, adam_beta2 and "
            "adam_epsilon), sign, scalar_adam, or your own as module:Name."
        },
    )
    momentum: float = field(
        default=0.9, metadata={"help": "Momentum coefficient, for rule=momentum."}
    )
    window: str | None = field(
        default=None,
        metadata={
            "help": "For rule=momentum and rule=adam: rebuild the moments from this many past "
            "steps, or from 'all' of them, instead of keeping buffers."
        },
    )
    rule_options: str | None = field(
        default=None,
        metadata={"help": "Options of your own rule, as JSON: '{\"beta\": 0.5}'."},
    )
    estimator: str = field(
        default="two_point",
        metadata={
            "help": "Gradient estimator: two_point, one_sided, one_point, or your own as "
            "module:name."
        },
    )
    shaping: str | None = field(
        default=None,
        metadata={
            "help": "How to shape the losses of several directions before they are combined: "
            "z_scores or ranks."
        },
    )
    modified: str | None = field(
        default=None,
        metadata={
            "help": "Scale the directions by the layers' norms: variance (Definition 6) or "
            "expectation (Definition 7)."
        },
    )
    keep: float | None = field(
        default=None,
        metadata={"help": "Train only this fraction of each tensor: its smallest weights."},
    )
    distribution: str = field(
        default="gaussian",
        metadata={
            "help": "Distribution of the directions: gaussian, rademacher (random signs) or "
            "gaussian16."
        },
    )
    perturbation: str | None = field(
        default=None,
        metadata={
            "help": "How weights are perturbed: in_place (the default), scratch (the default for "
            "16-bit weights) or low_rank (the fastest)."
        },
    )
    rank: int = field(
        default=1, metadata={"help": "Rank of a matrix's direction, for perturbation=low_rank."}
    )
    interval: int = field(
        default=50,
        metadata={
            "help": "Steps after which accumulated updates are written to a matrix, for "
            "perturbation=low_rank."
        },
    )
    rounding: str | None = field(
        default=None,
        metadata={
            "help": "How updates of 16-bit weights are rounded: stochastic (the default), "
            "compensated, master (the default for a 16-bit adapter) or nearest."
        },
    )
    clip: float | None = field(
        default=None, metadata={"help": "Bound on the magnitude of the projected gradient."}
    )
    clip_quantile: float | None = field(
        default=None,
        metadata={
            "help": "Clip at this quantile of the last 100 magnitudes of the projected gradient."
        },
    )
    probe_groups: int = field(
        default=1,
        metadata={
            "help": "Number of process groups with their own direction; -1: one per process."
        },
    )
    common_random_numbers: bool = field(
        default=False,
        metadata={
            "help": "All forward passes of a batch draw the same random numbers, for a loss that "
            "draws noise by design."
        },
    )
    max_refused: int = field(
        default=10, metadata={"help": "Stop after this many non-finite losses in a row."}
    )
    offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the model on the CPU and copy it to the device block by block, for "
            "models larger than the device's memory."
        },
    )
    offload_folder: str | None = field(
        default=None,
        metadata={
            "help": "With offload: folder for a file of the model's size that holds the weights, "
            "for models larger than the host's memory. The file can be deleted after the run."
        },
    )
    offload_write_every: int = field(
        default=1,
        metadata={
            "help": "With offload_folder: write a block back after this many updates, which spares "
            "the disk. 0: never write; the result is the run log (needs save_strategy=no)."
        },
    )

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
    args: MeZOConfig, model: torch.nn.Module, named: list[tuple[str, torch.nn.Parameter]]
) -> dict[str, Any]:
    """Return the keyword arguments of `MeZO` that hold for all parameter groups.

    `named` are the trained parameters. Raises InputError if `modified` or the rule is unknown.
    """
    names = "num_samples distribution perturbation rank interval estimator shaping"
    names += " clip clip_quantile max_refused common_random_numbers"
    options = {name: getattr(args, name) for name in names.split()}
    if ":" in args.estimator:
        options["estimator"] = imported(args.estimator, "estimator")
    options |= {"eps": args.mezo_eps, "rule": rule_of(args), "rounding": rounding_of(args, model)}
    if args.modified is not None:
        make = {
            "variance": layers.variance_modified,
            "expectation": layers.expectation_modified,
        }.get(args.modified)
        if make is None:
            raise InputError(f"modified must be variance or expectation, got {args.modified!r}")
        options["layers"] = make(layer_norms.parameter_norms(named))
    if args.keep is not None:
        options["layers"] = options.get("layers", {}) | layer_norms.small(named, args.keep)
        options["perturbation"] = args.perturbation or "scratch"
    return options


def rounding_of(args: MeZOConfig, model: torch.nn.Module) -> str:
    adapter = getattr(model, "peft_config", None) is not None
    master = adapter and args.perturbation != "low_rank"
    return args.rounding or ("master" if master else "stochastic")


def rule_of(args: MeZOConfig) -> Rule:
    """Return the rule that the arguments name, with its options.

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
