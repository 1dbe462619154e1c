"""Choose a missing learning rate or eps by what is trained and by the size of the model.

    resolved(ModelArguments("causal-lm"), TrainArguments()).learning_rate      3.75 N^-0.7 = 3e-5

N is the number of the model's weights. For MeZO on all weights the rule gives the rate with which
causal-lm (19.1 M weights) trains, 3e-5, and stays within the paper's rates: 3.9e-6 for 355 M
(Table 15: 1e-7 to 1e-5) and 3.1e-7 for 13 B (Table 16: 1e-7 to 1e-6). The rates of adapters come
from fewer runs. All of them are starting values for a search.

For a billion weights and more, the sizes of Table 16, MeZO's rates are limited to the table's grid;
the rule alone would give 1.6e-6 for opt-1.3b and 9.8e-8 for opt-66b.

The best rate depends on more than the size. `measured` estimates the gradient, the noise and the
curvature of a loaded model, and takes the length of the run into account (examiner.py).
`mezo train` does this when no rate is given, and `mezo check` reports it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mezo.errors import InputError
from mezo.models import adapters as tuners
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.modes import evaluating
from mezo.objectives import Form
from mezo.objectives.progress import SILENT, Progress
from mezo.runs.examiner import Examiner, Landscape, survey
from mezo.tasks import Example, sample
from mezo.trainers.config import MeZOConfig

if TYPE_CHECKING:
    from mezo.runs.arguments import TrainArguments


@dataclass(frozen=True)
class Rate:
    """scale * N ** -power, at least `least`, and from LARGE weights on at most `most`."""

    scale: float
    power: float
    least: float = 0.0
    most: float = math.inf

    def of(self, parameters: int) -> float:
        """Return the rate for a model of so many weights, with two digits."""
        rate = max(self.least, self.scale * parameters**-self.power)
        rate = min(rate, self.most) if parameters >= LARGE else rate
        return float(f"{rate:.2g}")


LARGE = 1_000_000_000  # weights from which on Table 16 applies


# trained part -> rate and eps. Eps and the limits of the rates are those of Table 16: 1e-7 to 1e-6
# for all weights, 5e-5 to 1e-4 for LoRA, 1e-3 to 1e-2 for prefixes
_MEZO = {
    "": (Rate(3.75, 0.7, 1e-7, 1e-6), 1e-3),
    "head": (Rate(3.75, 0.7, 1e-7, 1e-6), 1e-3),
    "biases_and_norms": (Rate(4.4, 0.5, 5e-5, 1e-4), 1e-2),
    "lora": (Rate(5.2, 0.5, 5e-5, 1e-4), 1e-2),
    "prefix": (Rate(170.0, 0.5, 1e-3, 1e-2), 1e-1),
    "prompt": (Rate(170.0, 0.5, 1e-3, 1e-2), 1e-1),
}
_ADAM = {
    "": Rate(0.5, 0.5, 1e-5),
    "head": Rate(1.7, 0.5, 1e-4),
    "lora": Rate(1.7, 0.5, 1e-4),
    "prefix": Rate(17.0, 0.5, 1e-3),
    "prompt": Rate(17.0, 0.5, 1e-3),
}
DIRECTIONS = 8  # number of directions along which `measured` makes estimates
_FOUND_FOR = {"rule": ("sgd",), "estimator": ("two_point", "one_sided")}
_FOUND_FOR |= {"shaping": (None,), "modified": (None,), "objective": (None,)}  # type: ignore[dict-item]


def mezo(parameters: int, part: str) -> tuple[float, float]:
    """Return MeZO's (learning rate, eps) for a number of weights and a part (see `part_of`)."""
    rate, eps = _MEZO.get(part, _MEZO["lora"])
    return rate.of(parameters), eps


def adam(parameters: int, part: str) -> float:
    """Return Adam's learning rate for a number of weights and a part (see `part_of`)."""
    return _ADAM.get(part, _ADAM["lora"]).of(parameters)


def measured(
    model: Any,
    form: Form,
    examples: Sequence[Example],
    args: "TrainArguments",
    steps: int,
    progress: Progress = SILENT,
) -> float | None:
    """Return a learning rate for `steps` steps of MeZO, from DIRECTIONS pairs of estimates.

    It costs 4 forward passes per direction and leaves the weights as they are, to the bit. Returns
    None if the estimates give no rate, because the loss is not finite or the gradient cannot be
    told from the noise of the batches.
    """
    assert args.mezo_eps is not None  # `resolved` has set it
    size = min(args.per_device_train_batch_size, len(examples) // 2)
    if size == 0 or steps < 1:
        return None
    number = min(len(examples), 2 * size * DIRECTIONS)
    features = [form.encode(example) for example in sample(examples, number, args.seed)]
    with evaluating(model):
        examiner = Examiner(model, form, args.seed, perturbation="scratch")
        pairs = survey(examiner, features, args.mezo_eps, size, DIRECTIONS, progress)
    if len(pairs) < 2:
        return None
    land = Landscape.of(pairs, size)
    rate = min(land.horizon(steps, args.lr_scheduler_type).best_rate(), land.best_step())
    return float(f"{rate:.2g}") if land.clear and math.isfinite(rate) else None


def part_of(args: ModelArguments) -> str:
    """Return the trained part: "" for all weights or an expression, "head", "lora", ..."""
    if args.trainable == "head":
        return "head"
    folder = args.model_name_or_path
    if models.is_adapter(folder):
        kind = str(models.adapter_config(folder).get("peft_type"))
        args = replace(args, use_peft=True, peft_type=kind.lower())
    return tuners.method_of(args).removeprefix("-")


def resolved(model_args: ModelArguments, args: "TrainArguments") -> "TrainArguments":
    """Return the arguments with a learning rate and, for MeZO, an eps: as given, or by recipe.

    Raises InputError if no rate is known, as for another rule than sgd or for shaped estimates.
    """
    method = getattr(args, "method", "mezo")
    mezo_lacks = method == "mezo" and None in (args.learning_rate, args.mezo_eps)
    adam_lacks = method == "adam" and args.learning_rate is None
    if not (mezo_lacks or adam_lacks):
        return args
    parameters = models.parameters_of(model_args)
    part = part_of(model_args)
    if adam_lacks:
        return replace(args, learning_rate=adam(parameters, part))
    rate, eps = mezo(parameters, part)
    for name, known in _FOUND_FOR.items():
        if args.learning_rate is None and getattr(args, name, known[0]) not in known:
            raise InputError(
                f"{name} {getattr(args, name)} needs a --learning_rate: the rates by model size "
                "are for sgd with two-point estimates"
            )
    given = args.learning_rate, args.mezo_eps
    recipe = zip(given, (rate, eps), strict=True)
    rate, eps = (default if value is None else value for value, default in recipe)
    return replace(args, learning_rate=rate, mezo_eps=eps)


def told(model_args: ModelArguments, given: "TrainArguments", taken: "TrainArguments") -> str:
    """Return a line that says which values the recipe chose, or "" if it chose none."""
    names = [n for n in ("learning_rate", "mezo_eps") if getattr(given, n) != getattr(taken, n)]
    if not names or (names == ["mezo_eps"] and taken.mezo_eps == MeZOConfig.mezo_eps):
        return ""
    chosen = ", ".join(f"{name} {getattr(taken, name):g}" for name in names)
    part = part_of(model_args) or "all weights"
    return f"{chosen}: chosen for {part} and a model of this size; give your own to override"
