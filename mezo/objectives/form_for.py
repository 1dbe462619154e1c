"""The form that fits a model, a tokenizer and a task."""

import inspect
from typing import TYPE_CHECKING, Any

import torch

from mezo.errors import InputError
from mezo.models.adapters import drops_positions, virtual_tokens
from mezo.models.modes import unwrap
from mezo.objectives.causal import Causal
from mezo.objectives.encoder import Encoder
from mezo.objectives.form import Form
from mezo.objectives.generated import Generated
from mezo.objectives.masked import Masked
from mezo.tasks.task import OBJECTIVES, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEEDS = {  # kind of model -> what a task must have for it
    "causal": ("prompt",),
    "masked": ("mask_prompt", "verbalizers"),
    "encoder": ("text", "descriptions"),
}


def form_for(
    model: "PreTrainedModel | torch.nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    max_length: int | None = None,
    *,
    kind: str | None = None,
    truncate: bool = False,
    objective: str | None = None,
    share: bool = True,
) -> Form:
    """Return the form that fits the model: causal, masked or encoder. peft-wrapped models work too.

    Args:
        max_length: limit in tokens; None: the model's and the tokenizer's own.
        kind: "causal", "masked" or "encoder", instead of judging by the model's class.
        truncate: cut longer examples instead of refusing them: on the left, where the template's
            end stays whole, for causal and masked models, on the right for encoders.
        objective: what `loss` is, for causal models: "candidates", the cross-entropy over them, or
            "tokens", the language model's loss on the tokens of the right one alone; None is the
            task's own. A task that generates text is trained by "tokens" on its first answer.
        share: read what candidates have in common once, where the causal model can: two small
            forward passes find that out. False for one that has `FrozenLower` layers.

    Raises InputError if task, tokenizer and model do not go together.
    """
    inner = unwrap(model)
    kind = kind or kind_of(inner)
    _check_needs(task, kind)
    objective = objective or (task.objective if kind == "causal" else "candidates")
    if objective not in OBJECTIVES:
        raise InputError(f"objective must be {' or '.join(OBJECTIVES)}, got {objective!r}")
    if objective == "tokens" and kind != "causal":
        raise InputError(f"objective tokens is for causal models, this one is {kind}")
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} has no offsets: use a fast tokenizer")
    shared: dict[str, Any] = {
        "task": task,
        "tokenizer": tokenizer,
        "accepts": _accepts(model, inner),
        "max_length": _limit(inner, tokenizer, max_length, virtual_tokens(model)),
        "truncate": truncate,
    }
    if kind == "causal" and task.kind == "generation":
        return Generated(**shared, objective="tokens")
    if kind == "causal":
        form = Causal(**shared, objective=objective)
        return form.shared(model) if share and form.branches() else form
    return Encoder.of(**shared) if kind == "encoder" else Masked.of(**shared)


def _check_needs(task: Task, kind: str) -> None:
    if kind not in NEEDS:
        raise InputError(f"kind must be {', '.join(NEEDS)}, got {kind!r}")
    if task.kind == "generation" and kind != "causal":
        raise InputError(f"task {task.name} generates text: it needs a causal model, not {kind}")
    own = task.kind != "classification"  # its candidates come with the examples, or there are none
    needs = (*NEEDS[kind], *(() if own or kind != "causal" else ("candidates",)))
    for need in needs:
        if not getattr(task, need):
            raise InputError(f"task {task.name} has no {need}, which a model of kind {kind} needs")


def kind_of(model: "PreTrainedModel") -> str:
    """Return causal, masked or encoder, by what the model's class can do."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{name} is an encoder-decoder: only causal, masked and encoder models can be run"
        )
    if model.can_generate():
        return "causal"
    if model.get_output_embeddings() is not None:
        return "masked"
    if model.base_model is model:
        return "encoder"
    raise InputError(f"{name} has a head of its own: load a causal, masked or headless model")


def _accepts(model: torch.nn.Module, inner: "PreTrainedModel") -> frozenset[str]:
    """Return the arguments of the forward pass, without those that peft's wrapper drops."""
    names = frozenset(inspect.signature(inner.forward).parameters)
    return names - {"position_ids"} if drops_positions(model) else names


def _limit(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: int | None,
    virtual: int = 0,
) -> int:
    """Return how many tokens model and tokenizer can take, or what was asked for if it is no more.

    An adapter takes `virtual` positions.
    """
    limits = [tokenizer.model_max_length]
    if getattr(model.config, "max_position_embeddings", None):  # ALiBi and recurrence have none
        limits.append(model.config.max_position_embeddings)
    for name, module in model.named_modules():  # RoBERTa's positions start behind padding_idx
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - reserved)
    limits = [limits[0], *(limit - virtual for limit in limits[1:])]
    if asked is None:
        return min(limits)
    if not 2 <= asked <= min(limits):
        raise InputError(f"max_length must be from 2 to {min(limits)}, got {asked}")
    return asked
