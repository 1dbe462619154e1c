"""What MeZO refuses at the door, each in one sentence that names the value or the tensor."""

import math
from collections.abc import Iterable

import torch

from mezo import noise
from mezo.errors import InputError
from mezo.estimators import ESTIMATORS, SHAPINGS
from mezo.forms.rounding import HALF, ROUNDINGS
from mezo.noise.sharded import is_sharded, local
from mezo.rules import Rule

FORMS = ("in_place", "scratch", "low_rank")
_ONE = "eps seed distribution num_samples perturbation rank interval"
_ONE += " rounding clip clip_quantile max_refused rule estimator shaping layers"
_ONE += " common_random_numbers"


def check_group(
    group: dict, first: dict, rule: Rule, estimators: Iterable[str] = ESTIMATORS
) -> None:
    """InputError if a parameter group of MeZO, or a tensor in it, cannot be trained as asked.

    `first` is the optimizer's first group: the direction (eps, seed, distribution, num_samples) is
    one for all groups.
    """
    for option in ("eps", "lr", "weight_decay"):
        if math.isinf(group[option]):
            raise InputError(f"{option} must be finite, got {group[option]}")
    if not group["eps"] > 0:
        raise InputError(f"eps must be positive, got {group['eps']}")
    if not float(group["lr"]) >= 0:
        raise InputError(f"lr must not be negative, got {group['lr']}")
    if not group["weight_decay"] >= 0:
        raise InputError(f"weight_decay must not be negative, got {group['weight_decay']}")
    if not 1 <= group["num_samples"] <= noise.MAX_PROBE:
        raise InputError(f"num_samples must be at least 1, got {group['num_samples']}")
    if not 0 <= group["seed"] < 2**64:
        raise InputError(f"seed must be in [0, 2^64), got {group['seed']}")
    if group["distribution"] not in noise.DISTRIBUTIONS:
        known = ", ".join(noise.DISTRIBUTIONS[:-1]) + f" or {noise.DISTRIBUTIONS[-1]}"
        raise InputError(f"distribution must be {known}, got {group['distribution']!r}")
    if group["perturbation"] not in (None, *FORMS):
        known = ", ".join(FORMS[:-1]) + f" or {FORMS[-1]}"
        raise InputError(f"perturbation must be {known}, got {group['perturbation']!r}")
    if group["rounding"] not in tuple(ROUNDINGS):
        raise InputError(
            f"rounding must be one of {', '.join(ROUNDINGS)}, got {group['rounding']!r}"
        )
    _check_kinds(group, estimators)
    _check_together(group, rule)
    for option in ("rank", "interval"):
        if not (isinstance(group[option], int) and group[option] >= 1):
            raise InputError(f"{option} must be at least 1, got {group[option]}")
    if group["clip"] is not None and not group["clip"] > 0:
        raise InputError(f"clip must be positive, got {group['clip']}")
    if group["clip_quantile"] is not None and not 0 < group["clip_quantile"] < 1:
        raise InputError(f"clip_quantile must be between 0 and 1, got {group['clip_quantile']}")
    if not group["max_refused"] >= 1:
        raise InputError(f"max_refused must be at least 1, got {group['max_refused']}")
    for option in _ONE.split():  # one for all groups
        if group[option] != first[option]:
            raise InputError(
                f"{option} is one for all parameter groups, got {first[option]} and {group[option]}"
            )
    names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
    for name, tensor in zip(names, group["params"], strict=True):
        if tensor.requires_grad:
            _check_tensor(name, tensor)


def _check_kinds(group: dict, estimators: Iterable[str]) -> None:
    for option, known in (("estimator", estimators), ("shaping", SHAPINGS)):
        if group[option] not in known:
            names = ", ".join(str(one) for one in known)
            raise InputError(f"{option} must be one of {names}, got {group[option]!r}")


def _check_together(group: dict, rule: Rule) -> None:
    """Raise InputError for options that cannot be combined with each other."""
    form, rounding, name = group["perturbation"], group["rounding"], group["rule"]["name"]
    if rounding in ("compensated", "master") and form == "in_place":
        raise InputError(f"rounding {rounding!r} keeps a buffer: perturb in scratch")
    if rounding in ("compensated", "master") and form == "low_rank":
        raise InputError(
            f"rounding {rounding!r} cannot be combined with low_rank, which writes a matrix once "
            "an interval: take stochastic or nearest"
        )
    if form == "low_rank":
        if not rule.additive:
            raise InputError(f"rule {name} cannot be combined with low_rank: take sgd or momentum")
        if rule.window is not None:
            raise InputError(f"rule {name}: no window with low_rank, whose buffers are small")
        if not rule.decoupled_weight_decay:
            raise InputError(f"rule {name}: weight decay is decoupled with low_rank")
    if group["shaping"] and rule.replayed != rule:
        raise InputError(f"shaping {group['shaping']} and rule {name} both scale the step")


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    check_loaded([(name, tensor)])
    if type(tensor) not in (torch.nn.Parameter, torch.Tensor) and not is_sharded(tensor):
        raise InputError(
            f"parameter {name} is a {type(tensor).__name__}: quantised weights "
            "cannot be perturbed in place; train an adapter (LoRA, prefix) on top of them"
        )
    if tensor.layout != torch.strided:
        raise InputError(f"parameter {name} is sparse ({tensor.layout}); only dense ones are tuned")
    if any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise InputError(
            f"parameter {name} is expanded: several of its elements are one number in memory; "
            "train a .clone() of it"
        )
    if tensor.dtype not in (torch.float32, torch.float64, *HALF):
        raise InputError(f"parameter {name} is {dtype}: only floating-point weights are tuned")


def check_loaded(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """InputError if what is to be trained is not there: accelerate's offloading, an empty model."""
    for name, tensor in named:
        if tensor.requires_grad and tensor.is_meta:
            raise InputError(
                f"parameter {name} is on the meta device (offloaded or not loaded): a perturbation "
                "would be lost; load the model by mezo.offload.load_offloaded, or onto a device"
            )


def check_storage(named: list[tuple[str, torch.Tensor]]) -> None:
    """InputError if two parameters share elements in memory: each walk would move these twice."""
    storages: dict[tuple, list[tuple[int, int, str, torch.Tensor]]] = {}  # first byte, end, ...
    for name, tensor in ((name, local(p)) for name, p in named):
        if tensor.numel():
            place = (tensor.device, tensor.untyped_storage().data_ptr())
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            end = tensor.data_ptr() + (last + 1) * tensor.element_size()
            storages.setdefault(place, []).append((tensor.data_ptr(), end, name, tensor))
    for spans in storages.values():
        before: list[tuple[int, int, str, torch.Tensor]] = []
        for span in sorted(spans, key=lambda span: span[:2]):
            before = [other for other in before if other[1] > span[0]]
            for _, _, name, tensor in before:
                if name != span[2] and _overlap(tensor, span[3]):
                    raise InputError(
                        f"parameters {name} and {span[2]} share memory without being one "
                        "parameter; tie them with model.tie_weights() or train one of them"
                    )
            before.append(span)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, whose spans of one storage overlap, have an element in common.

    Columns of one matrix, for example, have none.
    """
    if one.dtype != other.dtype or (one.is_contiguous() and other.is_contiguous()):
        return True
    size = one.untyped_storage().nbytes() // one.element_size()
    taken = torch.zeros(size, dtype=torch.bool, device=one.device)
    taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())
