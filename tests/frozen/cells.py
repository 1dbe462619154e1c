"""The runs whose logs are frozen: every option of MeZO, and the pairs of options that meet.

The values are plain JSON, so that they mean the same to any version of the package. A cell is never
changed, as its log is never written again; new options get new cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A run of a toy model, and what happens to it on the way."""

    options: Options = field(default_factory=dict)  # of MeZO
    model: str = "small"
    dtype: str = "float32"
    steps: int = 8
    groups: dict[str, Options] = field(default_factory=dict)  # by what is in a name: own settings
    schedule: dict[str, tuple[float, float]] = field(default_factory=dict)  # from first to last
    refused: tuple[int, ...] = ()  # steps whose loss is NaN
    raised: tuple[int, ...] = ()  # steps whose closure raises in its second pass
    accumulated: tuple[int, ...] = ()  # steps with two estimates of unequal weight a probe
    written: tuple[int, ...] = ()  # steps before which `write` is called
    resumed: tuple[int, ...] = ()  # steps before which the log is closed, and opened again
    paired: bool = False  # both losses of a step from one forward pass
    split: int = 0  # the step at which a second log begins
    form: str = "long"  # or compact, without_losses; merged of two; later, the second of two


def rule(name: str, **options: Any) -> Options:
    return {"name": name, **options}


MOMENTUM = rule("momentum", momentum=0.8)
ADAM = rule("adam", betas=[0.8, 0.95])
VARIANTS: dict[str, Options] = {
    "sgd": rule("sgd"),
    "momentum": MOMENTUM,
    "momentum_dampening": MOMENTUM | {"dampening": 0.3},
    "momentum_nesterov": MOMENTUM | {"nesterov": True},
    "momentum_coupled": MOMENTUM | {"decoupled_weight_decay": False},
    "momentum_window": MOMENTUM | {"window": 3},
    "momentum_window_dampening": MOMENTUM | {"window": 4, "dampening": 0.3},
    "momentum_window_nesterov": MOMENTUM | {"window": "all", "nesterov": True},
    "momentum_all": MOMENTUM | {"window": "all"},
    "adam": ADAM,
    "adam_eps": ADAM | {"eps": 1e-3},
    "adam_coupled": ADAM | {"decoupled_weight_decay": False},
    "adam_window": ADAM | {"window": 3},
    "adam_all": ADAM | {"window": "all"},
    "sign": rule("sign"),
    "scalar_adam": rule("scalar_adam", beta=0.9, eps=1e-6),
}
ROUNDINGS = ("stochastic", "compensated", "master", "nearest")
ESTIMATORS = ("two_point", "one_sided", "one_point")
LOW_RANK: Options = {"perturbation": "low_rank", "interval": 3}
THREE: Options = {"num_samples": 3}
SIGNS: Options = {"distribution": "rademacher"}
DECAY: Options = {"weight_decay": 0.1}
SCALES = {"layers.0.weight": 0.5, "layers.0.bias": 1.75}
LIMITS = {"layers.0.weight": 0.5, "layers.0.bias": 0.75}


def _rules() -> Iterator[tuple[str, Cell]]:
    for name, value in VARIANTS.items():
        yield f"{name}", Cell({"rule": value} | DECAY, model="all")
        more = THREE | SIGNS | DECAY
        yield f"{name}_bfloat16", Cell({"rule": value} | more, dtype="bfloat16")
    one = rule("adam", betas=[0.8, 0.95], window=3)
    yield "adam_window_rademacher", Cell({"rule": one} | SIGNS)
    yield "rule_defaults_momentum", Cell({"rule": rule("momentum")})
    yield "rule_defaults_adam", Cell({"rule": rule("adam")})


def _roundings() -> Iterator[tuple[str, Cell]]:
    for rounding in ROUNDINGS:
        how: Options = {"rounding": rounding, "perturbation": "scratch"}
        for dtype in ("bfloat16", "float16"):
            yield f"{rounding}_{dtype}", Cell(how | DECAY, model="all", dtype=dtype)
        for name in ("momentum", "adam", "momentum_window", "sign"):
            cell = Cell(how | {"rule": VARIANTS[name]} | DECAY, dtype="bfloat16")
            yield f"{rounding}_{name}", cell
    yield (
        "compensated_adam_float16",
        Cell({"rule": ADAM, "rounding": "compensated"} | THREE, dtype="float16"),
    )
    for rounding in ("stochastic", "nearest"):
        how = {"rounding": rounding, "perturbation": "in_place"}
        yield f"{rounding}_in_place", Cell(how | THREE, dtype="bfloat16")


def _estimators() -> Iterator[tuple[str, Cell]]:
    for estimator in ESTIMATORS:
        for n in (1, 3):
            for form in ("in_place", "scratch"):
                cell = Cell({"estimator": estimator, "num_samples": n, "perturbation": form})
                yield f"{estimator}_{n}_{form}", cell
        yield f"{estimator}_low_rank", Cell({"estimator": estimator} | LOW_RANK | THREE)
        for shaping in ("z_scores", "ranks"):
            cell = Cell({"estimator": estimator, "shaping": shaping} | THREE | SIGNS)
            yield f"{estimator}_{shaping}", cell
    yield "clip", Cell({"clip": 0.2} | THREE)
    yield "clip_quantile", Cell({"clip_quantile": 0.5} | THREE)
    yield "clip_both", Cell({"clip": 0.3, "clip_quantile": 0.7, "shaping": "ranks"} | THREE)
    yield "one_sided_adam", Cell({"estimator": "one_sided", "rule": ADAM} | THREE)
    yield "one_point_momentum", Cell({"estimator": "one_point", "rule": MOMENTUM})


def _low_rank() -> Iterator[tuple[str, Cell]]:
    for rank in (1, 3):
        for distribution in ("gaussian", "rademacher"):
            how = LOW_RANK | {"rank": rank, "distribution": distribution}
            yield f"low_rank_{rank}_{distribution}", Cell(how | DECAY, model="all", steps=12)
    how = LOW_RANK | {"rank": 3} | DECAY
    for dtype in ("bfloat16", "float16", "float64"):
        model = "small" if dtype == "float64" else "all"  # its noise has no kernel, and is slow
        yield f"low_rank_{dtype}", Cell(how | THREE, model=model, dtype=dtype)
    yield "low_rank_nearest", Cell(how | {"rounding": "nearest"}, dtype="bfloat16")
    for name in ("momentum", "momentum_dampening", "momentum_nesterov", "scalar_adam"):
        yield f"low_rank_{name}", Cell(how | {"rule": VARIANTS[name]}, model="all")
    yield "low_rank_momentum_bfloat16", Cell(how | {"rule": MOMENTUM} | THREE, dtype="bfloat16")
    yield "low_rank_long_interval", Cell(LOW_RANK | {"interval": 50})
    yield "low_rank_written", Cell(how, written=(1, 2, 5), steps=10)
    yield (
        "low_rank_written_momentum",
        Cell(how | {"rule": MOMENTUM, "interval": 4}, written=(2, 4, 7), steps=10),
    )
    yield "low_rank_refused", Cell(how, refused=(2, 4), raised=(3,), accumulated=(6,))
    yield "low_rank_paired", Cell(LOW_RANK, model="identity", paired=True)
    yield "low_rank_large", Cell(LOW_RANK | {"rank": 2}, model="large", steps=6)


def _tensors() -> Iterator[tuple[str, Cell]]:
    for form in ("in_place", "scratch"):
        yield f"float64_{form}", Cell({"perturbation": form} | DECAY, "all", "float64")
    for name in ("adam", "momentum_window", "sign"):
        yield f"float64_{name}", Cell({"rule": VARIANTS[name]} | THREE, "small", "float64")
    for dtype in ("float32", "bfloat16", "float16"):
        yield f"mixed_{dtype}", Cell({"perturbation": "scratch"} | THREE, "mixed", dtype)
    yield "mixed_adam_master", Cell({"rule": ADAM, "rounding": "master"}, "mixed", "bfloat16")
    for distribution in ("gaussian", "rademacher"):
        how: Options = {"distribution": distribution}
        yield f"large_{distribution}", Cell(how, "large", steps=6)
        yield f"large_{distribution}_bfloat16", Cell(how, "large", "bfloat16", steps=6)
    yield "huge_adam", Cell({"rule": ADAM}, "huge", steps=6)
    yield "huge_momentum_window", Cell({"rule": MOMENTUM | {"window": 2}}, "huge", steps=6)
    yield "huge_sign_bfloat16", Cell({"rule": rule("sign")}, "huge", "bfloat16", steps=6)
    yield "huge_compensated", Cell({"rounding": "compensated"}, "huge", "bfloat16", steps=6)


def _layers() -> Iterator[tuple[str, Cell]]:
    for modified in ("variance", "expectation"):
        how: Options = {"layers": {"scales": SCALES, "modified": modified}}
        yield f"{modified}_in_place", Cell(how | DECAY)
        yield f"{modified}_scratch", Cell(how | {"perturbation": "scratch"} | THREE)
        yield f"{modified}_bfloat16", Cell(how | DECAY, dtype="bfloat16")
        yield f"{modified}_one_sided", Cell(how | {"estimator": "one_sided"})
        for name in ("adam", "momentum_window", "sign"):
            yield f"{modified}_{name}", Cell(how | {"rule": VARIANTS[name]})
    masks: Options = {"layers": {"thresholds": LIMITS}, "perturbation": "scratch"}
    yield "thresholds", Cell(masks | DECAY)
    yield "thresholds_adam", Cell(masks | {"rule": ADAM} | SIGNS)
    yield "thresholds_momentum", Cell(masks | {"rule": MOMENTUM} | THREE | DECAY)
    for rounding in ROUNDINGS:
        yield f"thresholds_{rounding}", Cell(masks | {"rounding": rounding}, dtype="bfloat16")
    both = {"scales": {"layers.0.bias": 1.75}, "thresholds": {"layers.0.weight": 0.5}}
    yield "scales_and_thresholds", Cell(masks | {"layers": both})


def _events() -> Iterator[tuple[str, Cell]]:
    own = {"bias": {"lr": 0.01, "weight_decay": 0.2}, "experts": {"lr": 0.1}}
    for name in ("sgd", "momentum", "adam_window"):
        yield f"groups_{name}", Cell({"rule": VARIANTS[name]} | DECAY, "all", groups=own)
    yield "groups_low_rank", Cell(LOW_RANK | DECAY, "all", groups=own)
    yield "groups_master", Cell({"rounding": "master"}, "all", "bfloat16", groups=own)
    yield "groups_lr", Cell(DECAY, "all", groups=own, schedule={"lr": (1.0, 0.1)})
    yield "lr_schedule", Cell(DECAY, schedule={"lr": (1.0, 0.0)}, steps=12)
    yield "lr_adam", Cell({"rule": ADAM}, schedule={"lr": (0.1, 1.0)})
    yield "eps_schedule", Cell(schedule={"eps": (1e-2, 1e-3)}, steps=12)
    yield "num_samples_schedule", Cell(schedule={"num_samples": (1, 4)}, steps=12)
    both = {"eps": (1e-2, 1e-3), "num_samples": (1, 3), "lr": (1.0, 0.2)}
    yield "schedules_momentum", Cell({"rule": MOMENTUM | {"window": 5}} | DECAY, schedule=both)
    yield "schedules_low_rank", Cell(LOW_RANK | SIGNS, "all", schedule=both)
    events: Options = {"refused": (0, 3), "raised": (4,), "accumulated": (2, 6)}
    yield "events_in_place", Cell(DECAY | THREE, **events)
    yield "events_scratch", Cell(DECAY, dtype="bfloat16", **events)
    yield "events_compensated", Cell({"rounding": "compensated"}, dtype="float16", **events)
    for name in ("momentum", "momentum_all", "adam", "adam_window"):
        yield f"events_{name}", Cell({"rule": VARIANTS[name]}, **events)
    later = events | {"refused": (3,)}  # without a first loss, there is no difference
    yield "events_one_point", Cell({"estimator": "one_point"}, **later)
    yield "events_one_sided", Cell({"estimator": "one_sided"} | THREE, **events)
    yield "common_random_numbers", Cell({"common_random_numbers": True} | THREE)
    for name, seed in {"zero": 0, "largest": 2**64 - 1}.items():
        yield f"seed_{name}", Cell({"seed": seed})


def _logs() -> Iterator[tuple[str, Cell]]:
    decreasing = {"schedule": {"lr": (1.0, 0.0), "eps": (1e-2, 1e-3)}, "steps": 12}
    for form in ("compact", "without_losses"):
        yield f"{form}", Cell(form=form)
        yield f"{form}_schedules", Cell(THREE, refused=(3,), form=form, **decreasing)
        yield f"{form}_low_rank", Cell(LOW_RANK, written=(4,), form=form)
        yield f"{form}_scalar_adam", Cell({"rule": rule("scalar_adam")}, form=form)
    yield "resumed", Cell(DECAY, resumed=(3, 5))
    yield "resumed_adam", Cell({"rule": ADAM}, resumed=(4,))
    yield "resumed_low_rank", Cell(LOW_RANK, resumed=(4,), written=(4,))
    yield "merged", Cell(split=5, form="merged")
    yield "merged_schedules", Cell(THREE, split=5, form="merged", **decreasing)
    yield "merged_adam", Cell({"rule": ADAM}, split=3, form="merged")
    yield "merged_low_rank", Cell(LOW_RANK, split=6, form="merged")
    yield "later", Cell(split=5, form="later")
    yield "later_bfloat16", Cell(dtype="bfloat16", split=3, form="later")


def _gaussian16() -> Iterator[tuple[str, Cell]]:
    how: Options = {"distribution": "gaussian16"}
    for form in ("in_place", "scratch"):
        yield f"gaussian16_{form}", Cell(how | {"perturbation": form} | THREE | DECAY, "all")
    for dtype in ("bfloat16", "float16"):
        yield f"gaussian16_{dtype}", Cell(how | DECAY, "all", dtype)
    for name in ("adam", "momentum_window"):
        yield f"gaussian16_{name}", Cell(how | {"rule": VARIANTS[name]})
    yield "gaussian16_low_rank", Cell(LOW_RANK | {"rank": 3} | how | DECAY, "all", steps=12)
    yield "gaussian16_float64", Cell(how, "small", "float64")
    yield "gaussian16_large", Cell(how, "large", steps=6)


CELLS: dict[str, Cell] = {}
_FAMILIES = (_rules, _roundings, _estimators, _low_rank, _tensors, _layers, _events, _logs)
for _family in (*_FAMILIES, _gaussian16):
    for _name, _cell in _family():
        assert _name not in CELLS, _name
        CELLS[_name] = _cell
