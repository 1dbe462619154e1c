"""Refuse options and tensors when an optimizer is built, in a sentence that names the culprit."""

import logging
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from mezo.errors import InputError
from mezo.forms.rounding import HALF, ROUNDINGS
from mezo.noise.definition import canonical_name
from mezo.noise.sharded import is_sharded, local
from mezo.options.table import ARGUMENTS, SHARED
from mezo.rules import Rule, options, rule_of

_KEPT = ("params", "param_names", "step", "name", "initial_lr")  # what groups may have, too


def check_group_(
    group: dict[str, Any], first: dict[str, Any], rule: Rule, estimators: Collection[str]
) -> None:
    """Raise InputError if the options of a parameter group of MeZO are not accepted.

    Args:
        group: The parameter group.
        first: The optimizer's first group, with which all others share most options.
        rule: The rule that the group names.
        estimators: The names of the estimators that the optimizer knows.
    """
    _check_options_(group, rule, estimators)
    for option in SHARED:
        if first[option.name] != group[option.name]:
            values = f"{first[option.name]} and {group[option.name]}"
            raise InputError(f"{option.name} is one for all parameter groups, got {values}")


def warn_of_unknown(group: dict[str, Any]) -> None:
    """Warn of keys that are no options of MeZO, as misspelt ones are, and so change nothing."""
    known = [option.name for option in ARGUMENTS]
    for key in group.keys() - {*known, *_KEPT}:
        near = get_close_matches(key, known, n=1)
        near = ["lr"] if "rate" in key else near
        logging.getLogger("mezo").warning(
            "a parameter group has %s, which is no option of MeZO and changes nothing%s",
            *(key, f"; did you mean {near[0]}?" if near else ""),
        )


def check_changed_(
    groups: list[dict[str, Any]],
    before: list[tuple] | None,
    known: Mapping[str, type[Rule]],
    estimators: Collection[str],
) -> None:
    """Raise InputError if the options of parameter groups are not what an optimizer accepts.

    A schedule, or the user, may write anything into them between two steps. A rule that was given
    by its name, or as a value, is replaced by the dict that groups hold. `before` are the values of
    ARGUMENTS by group when they were last checked: options that are one for all groups may change
    in the first alone, but not in another alone.
    """
    for i, group in enumerate(groups):
        if not isinstance(group["rule"], dict):
            group["rule"] = options(group["rule"], known)
        _check_options_(group, rule_of(group["rule"], known), estimators)
        had = before[i] if before and i < len(before) else ()
        for option, value in zip(ARGUMENTS, had, strict=False):
            here, first = group[option.name], groups[0][option.name]
            if option in SHARED and here not in (value, first):
                raise InputError(
                    f"{option.name} is one for all parameter groups, and the first one's counts: "
                    f"set it there, which has {first}, and not in another alone, to {here}"
                )


def _check_options_(group: dict[str, Any], rule: Rule, estimators: Collection[str]) -> None:
    for option in ARGUMENTS:
        option.check(group[option.name])
        group[option.name] = option.domain.plain(group[option.name])
    if group["estimator"] not in estimators:
        told = ", ".join(estimators)
        raise InputError(f"estimator must be one of {told}, got {group['estimator']!r}")
    _check_together(group, rule)


def _check_together(group: dict, rule: Rule) -> None:
    """Raise InputError for options that cannot be combined with each other."""
    form, rounding, name = group["perturbation"], group["rounding"], group["rule"]["name"]
    buffered = ROUNDINGS[rounding].buffer is not None
    if buffered and form == "in_place":
        raise InputError(f"rounding {rounding!r} keeps a buffer: perturb in scratch")
    if buffered and form == "low_rank":
        raise InputError(
            f"rounding {rounding!r} cannot be combined with low_rank, which writes a matrix once "
            "an interval: take stochastic or nearest"
        )
    if form == "low_rank":
        if not rule.additive:
            raise InputError(f"rule {name} cannot be combined with low_rank: take sgd or momentum")
        if rule.window is not None:
            raise InputError(
                f"rule {name}: a window cannot be combined with low_rank, whose buffers are small"
            )
        if not rule.decoupled_weight_decay:
            raise InputError(
                f"rule {name}: coupled weight decay cannot be combined with low_rank: leave "
                "decoupled_weight_decay True"
            )
    if group["shaping"] and rule.replayed != rule:
        raise InputError(f"shaping {group['shaping']} and rule {name} both scale the step")


def check_state(state: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raise InputError if a state that is to be loaded is not one of these parameters' optimizer.

    torch gives buffers to parameters by their order alone, and z is keyed by the names that are
    loaded: in another order, each would be another's.
    """
    saved = state["param_groups"]
    if any("seed" not in group for group in saved):
        raise InputError(
            "the state is of another optimizer than MeZO: its parameter groups have no seed"
        )
    for had, here in zip(saved, groups, strict=False):
        names, known = (list(map(canonical_name, g.get("param_names") or ())) for g in (had, here))
        if names != known and sorted(names) == sorted(known):
            i = next(i for i, name in enumerate(names) if name != known[i])
            raise InputError(
                f"the state has the parameters in another order: {names[i]} where {known[i]} is "
                "here; make the optimizer of the same list as the one that was saved"
            )


def check_tensors(groups: Iterable[dict[str, Any]]) -> None:
    """Raise InputError if a tensor that has requires_grad, at first or later, cannot be trained."""
    for group in groups:
        names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
        for name, tensor in zip(names, group["params"], strict=True):
            if tensor.requires_grad:
                _check_tensor(name, tensor)


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if is_lazy(tensor):
        raise InputError(
            f"parameter {name} has no shape yet (a lazy module): call the model once before the "
            "optimizer is made"
        )
    check_loaded([(name, tensor)])
    if type(tensor) not in (torch.nn.Parameter, torch.Tensor) and not is_sharded(tensor):
        raise InputError(
            f"parameter {name} is a {type(tensor).__name__}: quantised weights "
            "cannot be perturbed in place; train an adapter (LoRA, prefix) on top of them"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else f"sparse ({tensor.layout})"
        raise InputError(f"parameter {name} is {kind}; only dense ones are tuned")
    if tensor.is_neg() or tensor.is_conj():
        raise InputError(f"parameter {name} is a negated view: train a .clone() of it")
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


def check_names(trained: Iterable[tuple[str, torch.Tensor, Any]]) -> None:
    """InputError if two parameters have one name: they would be perturbed by the same z."""
    seen: set[str] = set()
    for name, _, _ in trained:
        if name in seen:
            raise InputError(
                f"two parameters have the name {name}, by which z is drawn: give each its own, as "
                "named_parameters() of the model that holds both does"
            )
        seen.add(name)


def check_storage(trained: Iterable[tuple[str, torch.Tensor, Any]]) -> None:
    """InputError if two parameters share elements in memory: each walk would move these twice."""
    storages: dict[tuple, list[tuple[int, int, str, torch.Tensor]]] = {}  # first byte, end, ...
    for name, tensor in ((name, local(p)) for name, p, _ in trained):
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
