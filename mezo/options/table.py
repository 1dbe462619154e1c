"""The table of options: each fact about an option is written here, and everything else derives.

From it come the defaults and checks of `MeZO`, the fields of `MeZOConfig` and their help, the keys
of the run log's header, the settings that processes must agree on, and what may change when a run
is resumed. To add an option, add its entry here. If it is an argument of `MeZO` or a field of
`MeZOConfig`, their signatures name it once more, for readers and editors; a test holds them to the
table.

Nothing heavy is imported, so that `mezo train --help` is quick.
"""

from collections.abc import MutableMapping
from typing import Any

from mezo.options.domains import (
    ANY,
    FLAG,
    FRACTION_OR_NONE,
    LAYERS,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_NONE,
    name_of,
    whole,
)
from mezo.options.option import Key, Logged, Option, Resume, Source

DISTRIBUTIONS = ("gaussian", "rademacher", "gaussian16")
FORMS = ("in_place", "scratch", "low_rank")
ROUNDINGS = ("stochastic", "compensated", "master", "nearest")
RULES = ("sgd", "momentum", "adam", "sign", "scalar_adam")
ESTIMATORS = ("two_point", "one_sided", "one_point")
SHAPINGS = ("z_scores", "ranks")
MODIFIED = ("variance", "expectation")
NORMS = ("parameters", "gradients")
_LOW_RANK = ("perturbation", "low_rank")

# The order of the options that are logged is the order of their keys in a log.
OPTIONS: tuple[Option, ...] = (
    Option(
        "lr",
        1e-6,  # Tables 15 and 16: 1e-7 to 1e-6 for all weights
        "Learning rate. For models of 1B weights and more, use 1e-7 to 1e-6 for all weights, 5e-5 "
        "to 1e-4 for LoRA and 1e-3 to 1e-2 for a prefix. Smaller models need larger rates; `mezo "
        "check` measures one.",
        NOT_NEGATIVE,
        float,
        "LR",
        of_group=True,
        logged=Logged.EVERY_STEP,
        resume=Resume.HONOURED,
        field="learning_rate",
    ),
    Option(
        "eps",
        1e-3,
        "Size of the perturbation: 1e-3 for all weights, 1e-2 for LoRA, 1e-1 for a prefix.",
        POSITIVE,
        float,
        "EPS",
        logged=Logged.EVERY_STEP,
        resume=Resume.HONOURED,
        field="mezo_eps",
    ),
    Option(
        "mezo_eps_end",
        None,
        "Value that mezo_eps reaches, linearly, by the last step.",
        POSITIVE_OR_NONE,
        float | None,
        "EPS",
        argument=False,
        resume=Resume.HONOURED,
    ),
    Option(
        "weight_decay",
        0.0,
        "Decoupled weight decay: theta <- (1 - lr * weight_decay) theta at each step.",
        NOT_NEGATIVE,
        float,
        "DECAY",
        of_group=True,
        logged=Logged.EVERY_STEP,
        resume=Resume.HONOURED,
        source=Source.THEIRS,
    ),
    Option(
        "num_samples",
        1,
        "Number of directions averaged in each step; each costs two forward passes.",
        whole(1, 2**24),  # noise.MAX_PROBE
        int,
        "N",
        resume=Resume.HONOURED,
        shown=True,
    ),
    Option(
        "num_samples_end",
        None,
        "Value that num_samples reaches, linearly, by the last step.",
        ANY,
        int | None,
        "N",
        argument=False,
        resume=Resume.HONOURED,
    ),
    Option(
        "scale_lr_with_samples",
        False,
        "Multiply the learning rate by the number of directions of each step (Table 6).",
        FLAG,
        bool,
        argument=False,
    ),
    Option(
        "fresh_batches",
        False,
        "Give each direction its own micro-batches (Algorithm 2); gradient_accumulation_steps must "
        "be a multiple of num_samples.",
        FLAG,
        bool,
        argument=False,
    ),
    Option(
        "seed",
        None,  # torch's
        "Seed of the directions and of the order of the data.",
        whole(0, 2**64, "in [0, 2^64)"),
        int,
        "N",
        logged=Logged.ONCE,
        source=Source.THEIRS,
    ),
    Option(
        "distribution",
        "gaussian",
        "Distribution of the directions: gaussian, rademacher (random signs, quicker to draw) or "
        "gaussian16 (nearly normal numbers of 16 bits).",
        name_of(*DISTRIBUTIONS),
        metavar="NAME",
        logged=Logged.ONCE,
        shown=True,
    ),
    Option(
        "perturbation",
        None,
        "How weights are perturbed: in_place (the default), scratch (the default for 16-bit "
        "weights) or low_rank (the fastest).",
        name_of(*FORMS, optional=True),
        str | None,
        "NAME",
        logged=Logged.ONCE,
        keys=(Key("perturbation", name_of(*FORMS)),),
        shown=True,
    ),
    Option(
        "rounding",
        "stochastic",
        "How updates of 16-bit weights are rounded: stochastic (the default), compensated, master "
        "(the default for a 16-bit adapter) or nearest.",
        name_of(*ROUNDINGS),
        str | None,
        "NAME",
        logged=Logged.ONCE,
        field_default=None,  # as the trained weights are an adapter or not
        shown=True,
    ),
    Option(
        "rule",
        "sgd",
        "Update rule: sgd, momentum, adam (with adam_beta1, adam_beta2 and adam_epsilon), sign, "
        "scalar_adam, or your own as module:Name.",
        metavar="NAME",  # rules.options checks it
        logged=Logged.ONCE,
        keys=(
            Key("rule", name_of(*(r for r in RULES if r != "scalar_adam"), own=True)),  # replayed
            Key("rule_options", ANY),
        ),
        shown=True,
    ),
    Option(
        "momentum",
        0.9,
        "Momentum coefficient, for rule=momentum.",
        ANY,
        float,
        argument=False,
    ),
    Option(
        "window",
        None,
        "For rule=momentum and rule=adam: rebuild the moments from this many past steps, or from "
        "'all' of them, instead of keeping buffers.",
        ANY,
        str | None,
        argument=False,
    ),
    Option(
        "rule_options",
        None,
        "Options of your own rule, as JSON: '{\"beta\": 0.5}'.",
        ANY,
        str | None,
        argument=False,
    ),
    Option(
        "estimator",
        "two_point",
        "Gradient estimator: two_point, one_sided, one_point, or your own as module:name.",
        name_of(*ESTIMATORS, own=True),
        metavar="NAME",
        logged=Logged.UNLESS_DEFAULT,
        keys=(
            Key("estimator", name_of(*ESTIMATORS, own=True)),
            Key("sides", whole(1, 3, "1 or 2")),
        ),
        shown=True,
    ),
    Option(
        "shaping",
        None,
        "How to shape the losses of several directions before they are combined: z_scores or "
        "ranks.",
        name_of(*SHAPINGS, optional=True),
        str | None,
        "NAME",
    ),
    Option(
        "layers",
        None,
        "Scales of the perturbation per tensor (Definitions 6 and 7), or a mask.",
        LAYERS,
        logged=Logged.UNLESS_DEFAULT,
        keys=(Key("modified", name_of(*MODIFIED)),),  # scales and thresholds are the tensors' own
        source=Source.NONE,
    ),
    Option(
        "modified",
        None,
        "Scale the directions by the layers' norms: variance (Definition 6) or expectation "
        "(Definition 7).",
        name_of(*MODIFIED, optional=True),
        str | None,
        argument=False,
    ),
    Option(
        "modified_norms",
        "parameters",
        "The norms that modified takes: parameters (those of the weights) or gradients (of a "
        "batch, measured by forward passes).",
        name_of(*NORMS),
        argument=False,
    ),
    Option(
        "keep",
        None,
        "Train only this fraction of each tensor: its smallest weights.",
        ANY,
        float | None,
        argument=False,
    ),
    Option(
        "rank",
        1,
        "Rank of a matrix's direction, for perturbation=low_rank.",
        whole(1, 2**16),
        int,
        "N",
        only_for=_LOW_RANK,
        logged=Logged.ONCE,
    ),
    Option(
        "interval",
        50,
        "Steps after which accumulated updates are written to a matrix, for perturbation=low_rank.",
        whole(1, 2**32),
        int,
        "N",
        only_for=_LOW_RANK,
        logged=Logged.ONCE,
    ),
    Option(
        "clip",
        None,
        "Bound on the magnitude of the projected gradient.",
        POSITIVE_OR_NONE,
        float | None,
        resume=Resume.HONOURED,
    ),
    Option(
        "clip_quantile",
        None,
        "Clip at this quantile of the last 100 magnitudes of the projected gradient.",
        FRACTION_OR_NONE,
        float | None,
    ),
    Option(
        "max_refused",
        10,
        "Stop after this many non-finite losses in a row.",
        whole(1),
        int,
        resume=Resume.HONOURED,
    ),
    Option(
        "common_random_numbers",
        False,
        "All forward passes of a batch draw the same random numbers, for a loss that draws noise "
        "by design.",
        FLAG,
        bool,
        "true",
        shown=True,
    ),
    Option(
        "probe_groups",
        1,
        "Number of process groups with their own direction, under torchrun; -1: one per process.",
        ANY,
        int,
        "N",
        argument=False,
        shown=True,
    ),
    Option(
        "graphs",
        True,
        "On a GPU, capture forward passes as CUDA graphs and replay them, which spares the time "
        "that Python takes to launch kernels. What cannot be captured runs as usual.",
        FLAG,
        bool,
        argument=False,
        resume=Resume.FREE,
    ),
    Option(
        "offload",
        False,
        "Keep the model on the CPU and copy it to the device block by block, for models larger "
        "than the device's memory.",
        FLAG,
        bool,
        argument=False,
        resume=Resume.FREE,
        shown=True,
    ),
    Option(
        "offload_folder",
        None,
        "With offload: folder for a file of the model's size that holds the weights, for models "
        "larger than the host's memory. The file can be deleted after the run.",
        ANY,
        str | None,
        "DIR",
        argument=False,
        resume=Resume.FREE,
        shown=True,
    ),
    Option(
        "offload_write_every",
        1,
        "With offload_folder: write a block back after this many updates, which spares the disk. "
        "0: never write; the result is the run log (needs save_strategy=no).",
        ANY,
        int,
        "N",
        argument=False,
        resume=Resume.FREE,
        shown=True,
    ),
)

ARGUMENTS = tuple(option for option in OPTIONS if option.argument)  # of MeZO
FIELDS = tuple(option for option in OPTIONS if option.source is not Source.NONE)  # of a config
SHARED = tuple(option for option in ARGUMENTS if not option.of_group)  # one for all groups


def defaults() -> dict[str, Any]:
    """Return the arguments of `MeZO` that were not given."""
    return {option.name: option.default for option in ARGUMENTS}


def complete_(group: MutableMapping[str, Any]) -> None:
    """Add the defaults of options that a parameter group lacks, as one of an older checkpoint."""
    for name, default in defaults().items():
        group.setdefault(name, default)
