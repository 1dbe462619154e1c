"""What is trained beside a frozen model: LoRA, a prefix, a prompt and peft's other methods.

    model = with_adapter(model, ModelArguments(use_peft=True, peft_type="prefix"), seed=0)

The start is a function of the model, the options and the seed. The seed draws LoRA's random
factors. It also draws tokens from the vocabulary: a prefix starts as their keys and values, a
prompt as their embeddings. LoRA's factors are drawn by arithmetic that rounds alike on every
machine, so that a log need not hold them; it holds the values that other adapters start from
(`kept_start`).
"""

import inspect
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mezo.compatibility import cache_of
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.models.modes import evaluating

SHORT = {"prefix": "prefix_tuning", "prompt": "prompt_tuning"}
_TASKS = "it wants a task's number with every batch, which no objective here gives"
_GRADIENTS = "it is steered by gradients, and there are none"
REFUSED = {  # peft's methods that cannot be trained by forward passes alone, and why
    "adalora": _GRADIENTS,
    "osf": _GRADIENTS,
    "poly": _TASKS,
    "multitask_prompt_tuning": _TASKS,
    "xlora": "it mixes adapters that were trained before, and there are none",
    "cpt": "it has a loss of its own over the prompt's tokens",
    "shadow": "it runs a second model beside the first",
}
QUERY_VALUE = ["query_value"]  # lora_target_modules: the projections of queries and values alone
_PROJECTIONS = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"))
_FROM_ACTIVATIONS = ("prefix_tuning", "cartridge")


def full_name(peft_type: str) -> str:
    """Return peft's own name of a method. Raise InputError, with the nearest name,
    if it is unknown."""
    from peft import PeftType

    name = SHORT.get(peft_type.lower(), peft_type.lower())
    known = [one.name.lower() for one in PeftType]
    if name in REFUSED:
        raise InputError(f"peft_type {peft_type} cannot be combined with MeZO: {REFUSED[name]}")
    if name not in known:
        names = [*SHORT, *(one for one in known if one not in REFUSED)]
        near = get_close_matches(peft_type.lower(), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        raise InputError(f"peft_type {peft_type!r} is unknown; {hint}")
    return name


def method_of(args: ModelArguments) -> str:
    """Return what is trained, as results name it: "", "-lora", "-prefix", ..."""
    if not args.use_peft:
        return ""
    name = full_name(args.peft_type)
    return "-" + next((short for short, full in SHORT.items() if full == name), name)


def is_prompt(args: ModelArguments) -> bool:
    """Return whether the method puts tokens in front of the text."""
    return args.use_peft and "num_virtual_tokens" in _fields(full_name(args.peft_type))


def options_of(text: str | None) -> dict[str, Any]:
    """Return peft_options as a dict; they may hold numbers, truth values and lists of these only.

    Text is refused: an option of peft may name a tokenizer to load or a module to import, and a log
    that somebody else wrote may hold these options.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"peft_options {text!r:.80} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"peft_options {text!r:.80} must be like {{'r': 4}}")
    for name, value in found.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int | float) for item in items):
            raise InputError(f"peft_options: {name} must be numbers or truth values, not {value!r}")
    return found


def with_adapter(model, args: ModelArguments, seed: int):
    """Return the model with a new adapter as `args` says, with initial weights drawn from `seed`.

    The base model is frozen, and the caller's random state stays as it is. Raise InputError, in
    peft's words, where the method does not fit the model.
    """
    from peft import get_peft_model

    name = full_name(args.peft_type)
    # the caller's generator stays
    with peft_errors(name), torch.random.fork_rng(devices=[]), PortableUniform():
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: it reaches the GPUs
        made = get_peft_model(model, _config(name, model, args))
        if starts_at_activations(made):
            _start_at_activations(made, seed)
    return prepared(made)


def _kind(name: str) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name.upper()]]


def _fields(name: str) -> set[str]:
    return {f.name for f in fields(_kind(name))}


def _config(name: str, model, args: ModelArguments):
    known = _fields(name)
    given: dict[str, Any] = {}
    if name == "lora":
        given = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "target_modules": "all-linear"}
    if "num_virtual_tokens" in known:  # it takes part in the forward pass: peft asks what model
        given["task_type"] = "CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION"
        given["num_virtual_tokens"] = args.num_virtual_tokens
    if name == "prompt_tuning":
        given["prompt_tuning_init"] = "SAMPLE_VOCAB"  # real tokens, as for a prefix
    if args.lora_target_modules:
        given["target_modules"] = _targets(model, args.lora_target_modules)
    given |= options_of(args.peft_options)
    for option in given:
        if option not in known:
            raise InputError(f"{name} has no option {option}: it has {', '.join(sorted(known))}")
    return _kind(name)(**given)


def _targets(model, asked: list[str]) -> list[str]:
    """Return the names of the modules that get an adapter; QUERY_VALUE is
    translated for this model."""
    if asked != QUERY_VALUE:
        return asked
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for pair in _PROJECTIONS:
        if names.issuperset(pair):
            return list(pair)
    raise InputError(
        f"{type(model).__name__} has no separate projections of queries and values: name its "
        "modules with --lora_target_modules"
    )


def prepared(model):
    """Return a model in peft's wrapper, new or loaded, made fit for padded batches.

    peft drops the position_ids of prompt tuning; with padding on the left the positions would then
    depend on how long the batch's other texts are. A hook counts them from the mask instead, as
    is done here without a prompt.
    """
    base = model.get_base_model()
    takes = "position_ids" in inspect.signature(base.forward).parameters
    if drops_positions(model) and takes and base.can_generate():
        base.register_forward_pre_hook(_count_positions, with_kwargs=True)
    return model


def trainable_prompt(model):
    """Return a loaded prefix or prompt that can be trained on, which peft's own loading refuses.

    Others (P-tuning, a projected prefix) are saved as the values that they computed, and stay
    frozen.
    """
    config = model.active_peft_config
    if config.peft_type.lower() == "prompt_tuning" or starts_at_activations(model):
        config.inference_mode = False
        model.prompt_encoder.requires_grad_(True)
    return model


def _count_positions(base, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    mask: Any = kwargs.get("attention_mask")
    embeds = kwargs.get("inputs_embeds")
    read: Any = kwargs.get("input_ids") if embeds is None else embeds
    known = kwargs.get("position_ids") is not None or read is None or mask is None
    if not known and mask.dim() == 2:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        kwargs["position_ids"] = positions[:, -read.shape[1] :]
    return args, kwargs


def kept_start(model: torch.nn.Module | None, named: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of an adapter's tensors whose values at the start a run log must hold.

    They are the values that seed and options do not reproduce on every machine: all but constants
    and LoRA's factors. `named` has the trained tensors by name. A model without an adapter has
    none.
    """
    if not hasattr(model, "peft_config"):
        return []
    own = [name for name in named if is_of_adapter(name) and not _DRAWN.search(name)]
    return [name for name in own if not _is_constant(named[name])]


_DRAWN = re.compile(r"\.lora_[AB]\.")  # by PortableUniform, or zero


def _is_constant(tensor: torch.Tensor) -> bool:
    values = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return values.numel() == 0 or bool((values == values.reshape(-1)[0]).all())


class PortableUniform(TorchDispatchMode):
    """A context in which `Tensor.uniform_` on a CPU gives the same bits on every processor.

    torch draws u in [0, 1) exactly everywhere, but rounds u * (to - from) + from once where the
    processor fuses the two operations and twice where it does not. Here it is rounded once: in
    float64 the expression is exact for a float32 tensor whose bounds are of like size.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensor, *bounds = args
        if func is not torch.ops.aten.uniform_.default or not _is_plain(tensor):
            return func(*args, **(kwargs or {}))
        low, high = (torch.tensor(x, dtype=torch.float32) for x in bounds or (0.0, 1.0))
        drawn = func(tensor, **(kwargs or {})).double()
        return tensor.copy_(drawn * (high - low).double() + low.double())


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def is_of_adapter(name: str) -> bool:
    """Return whether a parameter of this name, in peft's wrapper, is an adapter's."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    own = [prefix for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix]
    parts = [*own, "modules_to_save.", "adaption_"]
    return name.startswith("prompt_encoder.") or any(f".{part}" in f".{name}" for part in parts)


def virtual_tokens(model: torch.nn.Module) -> int:
    """Return how many positions of the context an adapter takes up."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def drops_positions(model: torch.nn.Module) -> bool:
    """Return whether peft ignores position_ids, with a warning at every call: see `prepared`."""
    return virtual_tokens(model) > 0 and not starts_at_activations(model)


def starts_at_activations(model: torch.nn.Module) -> bool:
    """Return whether a forward pass of the base model computed the adapter's start."""
    config = getattr(model, "active_peft_config", None)
    if config is None or config.peft_type.lower() not in _FROM_ACTIVATIONS:
        return False
    return not getattr(config, "prefix_projection", False)  # peft cannot invert the projection


@torch.no_grad()
def _start_at_activations(model, seed: int) -> None:
    """Start the prefix at random real tokens (Malladi et al., Appendix E.5; Li and Liang, 2021).

    The model then computes what it would compute after these tokens, and so starts as itself. A
    random prefix, to which every token attends, would disturb it.
    """
    from peft import initialize_kv_prefix_from_past_key_values

    base, count = model.get_base_model(), model.active_peft_config.num_virtual_tokens
    embeddings = base.get_input_embeddings()
    drawn = torch.Generator().manual_seed(seed)
    tokens = torch.randint(embeddings.num_embeddings, (1, count), generator=drawn)
    with evaluating(base):
        states = _keys_and_values(base, tokens.to(embeddings.weight.device))
    initialize_kv_prefix_from_past_key_values(model, past_key_values=states)


def _keys_and_values(base, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values of each layer, (1, heads, tokens, head size)."""
    mask = torch.ones_like(tokens)
    if base.can_generate():
        cache = cache_of(base(input_ids=tokens, attention_mask=mask, use_cache=True))
        return [(layer.keys, layer.values) for layer in cache.layers]
    found: dict[str, list[torch.Tensor]] = {"key": [], "value": []}
    with ExitStack() as hooks:  # encoders return none
        for name, module in base.named_modules():
            kept = found.get(name.rpartition(".")[2])
            if kept is not None and isinstance(module, torch.nn.Linear):
                keep = partial(_keep, kept)
                hooks.callback(module.register_forward_hook(keep).remove)
        base(input_ids=tokens, attention_mask=mask)
    heads, count = base.config.num_attention_heads, tokens.shape[1]
    split = {
        name: [states.view(1, count, heads, -1).transpose(1, 2) for states in layers]
        for name, layers in found.items()
    }
    return list(zip(split["key"], split["value"], strict=True))


def _keep(kept: list[torch.Tensor], module, args: tuple, output: torch.Tensor) -> None:
    kept.append(output)


@contextmanager
def peft_errors(name: str) -> Iterator[None]:
    shown = {"lora": "LoRA"}.get(name, name)
    with warnings.catch_warnings():
        message = "`is_gradient_checkpointing` is deprecated"  # peft asks by the old name
        warnings.filterwarnings("ignore", message, FutureWarning)
        try:
            yield
        except InputError:
            raise
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise InputError(f"{shown}: {error}") from None
