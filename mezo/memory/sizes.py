"""Memory of a step by model size and method, for the figure of `mezo compare`.

`python -m benchmarks.sizes` recomputes ESTIMATES in two minutes. It carries out a step of each
method on the meta device (plan.py), with 700 tokens, batch size 1, the loss at the last position
and fused attention. All but the last line use bfloat16.

    inference           a forward pass
    MeZO                scratch perturbation: a perturbed copy of a weight exists while it is read
    MeZO prefix         a prefix of 5 tokens; peft's cache keeps the keys and values of all tokens
    in context          inference with the model's whole context
    prefix FT           AdamW on the prefix
    Adam FT             torch's AdamW, whose moments have the weights' 16 bits
    Adam FT, 32 bits    weights, gradients, moments and activations in float32
"""

from typing import Any

PAPER: dict[str, dict[str, float]] = {
    # arXiv:2305.17333, Table 22: GB on A100s, MultiRC (400 tokens on average), batch 1
    "MeZO": {"1.3B": 4, "2.7B": 7, "6.7B": 14, "13B": 26, "30B": 58, "66B": 128},
    "in context": {"1.3B": 6, "2.7B": 8, "6.7B": 16, "13B": 29, "30B": 62, "66B": 134},
    "prefix FT": {"1.3B": 19, "2.7B": 29, "6.7B": 46, "13B": 158, "30B": 315},
    "Adam FT, 32 bits": {"1.3B": 27, "2.7B": 55, "6.7B": 156, "13B": 316, "30B": 633},
}
COLUMNS: tuple[str, ...] = ("inference", "MeZO", "MeZO prefix", "in context", "prefix FT")
COLUMNS += ("Adam FT", "Adam FT, 32 bits")
CONTEXT, LENGTH = 2048, 700
ESTIMATES: dict[str, tuple[float, ...]] = {  # billions of weights, then GB by COLUMNS
    "125M": (0.1252, 0.2634, 0.3289, 0.2903, 0.2883, 0.3899, 1.156, 2.313),
    "350M": (0.3312, 0.6796, 0.7147, 0.7504, 0.7128, 1.023, 2.753, 5.505),
    "1.3B": (1.316, 2.666, 2.84, 2.807, 2.732, 3.352, 10.94, 21.88),
    "2.7B": (2.652, 5.346, 5.564, 5.581, 5.429, 6.493, 21.73, 43.46),
    "6.7B": (6.658, 13.39, 13.73, 13.76, 13.52, 15.22, 54.09, 108.2),
    "13B": (12.85, 25.79, 26.23, 26.38, 25.96, 28.67, 103.9, 207.7),
    "30B": (29.97, 60.07, 60.68, 61.05, 60.3, 64.9, 241.2, 482.5),
    "66B": (65.72, 131.6, 132.4, 133.3, 131.9, 139.9, 527.6, 1055.0),
    "175B": (174.6, 349.4, 350.6, 352.8, 349.8, 366.1, 1399.0, 2799.0),
}


def estimate(name: str) -> tuple[float, ...]:
    """Return the row of ESTIMATES for an OPT such as "125m": billions of weights, then GB."""
    import torch

    from mezo.memory.plan import Planner, config_of

    config, half = config_of(name), torch.bfloat16
    plain = Planner(config, half, 1, LENGTH)
    prefix = Planner(config, half, 1, LENGTH, make=prefixed)
    wide = Planner(config, torch.float32, 1, LENGTH)
    context = Planner(config, half, 1, CONTEXT)
    sizes = [
        plain.inference(),
        plain.plan("scratch", 1).device,
        prefix.plan("scratch", 1).device,
        context.inference(),
        prefix.plan("adam", 1).device,
        plain.plan("adam", 1).device,
        wide.plan("adam", 1).device,
    ]
    return tuple(float(f"{x / 1e9:.4g}") for x in (plain.parameters, *sizes))


def prefixed(config: Any, dtype: Any) -> Any:
    """Return the model with a prefix, both on the meta device, for Planner."""
    import torch

    from mezo.memory.meta import FusedAttention, LiveBytes
    from mezo.memory.plan import skeleton
    from mezo.models.adapters import with_adapter
    from mezo.models.arguments import ModelArguments

    # the prefix starts at the activations of a forward pass, which is carried out here
    with torch.device("meta"), LiveBytes(), FusedAttention():
        args = ModelArguments(use_peft=True, peft_type="prefix")
        return with_adapter(skeleton(config, dtype), args, 0)
