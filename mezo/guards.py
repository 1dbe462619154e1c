"""What MeZO refuses at the door, each in one sentence that names the value or the tensor."""

import torch

from . import noise
from .errors import InputError

HALF = (torch.float16, torch.bfloat16)


def check_group(group: dict, first: dict) -> None:
    """InputError if a parameter group of MeZO, or a tensor in it, cannot be trained as asked.

    `first` is the optimizer's first group: the direction (eps, seed, distribution, num_samples) is
    one for all groups.
    """
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
        known = " or ".join(noise.DISTRIBUTIONS)
        raise InputError(f"distribution must be {known}, got {group['distribution']!r}")
    for option in ("eps", "seed", "distribution", "num_samples", "in_place"):
        if group[option] != first[option]:
            raise InputError(
                f"{option} is one for all parameter groups, got {first[option]} and {group[option]}"
            )
    names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
    for name, tensor in zip(names, group["params"], strict=True):
        if tensor.requires_grad:
            _check_tensor(name, tensor, half_precision=group["in_place"])


def _check_tensor(name: str, tensor: torch.Tensor, half_precision: bool) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        raise InputError(
            f"parameter {name} is on the meta device (offloaded or not loaded): "
            "a perturbation would be lost; load it onto a device"
        )
    if type(tensor) not in (torch.nn.Parameter, torch.Tensor):
        raise InputError(
            f"parameter {name} is a {type(tensor).__name__}: quantised and distributed weights "
            "cannot be perturbed in place; train an adapter (LoRA, prefix) on top of them"
        )
    if tensor.layout != torch.strided:
        raise InputError(f"parameter {name} is sparse ({tensor.layout}); only dense ones are tuned")
    if tensor.dtype in HALF and not half_precision:
        raise InputError(
            f"parameter {name} is {dtype}: perturbing it in place would destroy it by rounding; "
            "load the model with dtype=torch.float32 (or pass in_place=True to see it happen)"
        )
    if tensor.dtype not in (torch.float32, torch.float64, *HALF):
        raise InputError(f"parameter {name} is {dtype}: only floating-point weights are tuned")


def check_storage(named: list[tuple[str, torch.Tensor]]) -> None:
    """InputError if two parameters share memory: each walk would move it twice."""
    seen: dict[tuple, str] = {}
    for name, tensor in named:
        place = (tensor.device, tensor.data_ptr())
        if tensor.numel() and seen.setdefault(place, name) != name:
            raise InputError(
                f"parameters {seen[place]} and {name} share memory without being one parameter; "
                "tie them with model.tie_weights() or train one of them"
            )
