"""Which parameters of a model are trained: by an expression on their names, or its head."""

import re
from typing import Any

import torch

from mezo.errors import InputError
from mezo.models.modes import unwrap


def select(model: torch.nn.Module, trainable: str) -> int:
    """Make the parameters whose names match trainable, freeze the rest, and count the weights.

    Args:
        trainable: a regular expression that is searched in each parameter's name; or one of
            PRESETS: "head", the output layer, which is everything above the base model and the
            output embeddings; "biases", "norms" and "biases_and_norms", by the models' own modules,
            whatever they call them.

    Returns the number of weights that are now trainable. Raises InputError for an expression that
    is malformed or matches no parameter.
    """
    if trainable in PRESETS:
        trainable = PRESETS[trainable](model)
    try:
        pattern = re.compile(trainable)
    except re.error as error:
        raise InputError(f"trainable {trainable!r} is not a regular expression: {error}") from None
    chosen = {name for name, _ in model.named_parameters() if pattern.search(name)}
    if not chosen:
        raise InputError(f"trainable {trainable!r} matches no parameter of the model")
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def told(model: torch.nn.Module, trainable: str) -> str:
    """Return a line that says how much of the model `select` found."""
    found = [p.numel() for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    return (
        f"trainable {trainable}: {len(found):,} tensors, {sum(found):,} of {total:,} weights "
        f"({100 * sum(found) / total:.2g} %)"
    )


def biases_of(model: torch.nn.Module) -> str:
    """Return an expression that matches the names of all biases.

    Raises InputError if there are none.
    """
    names = [n for n, _ in model.named_parameters() if n.rpartition(".")[2].endswith("bias")]
    return _any_of(names, model, "biases")


def norms_of(model: torch.nn.Module) -> str:
    """Return an expression that matches the parameters of all normalising modules.

    They are recognised by the names of their classes: LayerNorm, LlamaRMSNorm, GroupNorm, ...
    Raises InputError if there are none.
    """
    inside = {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    return _any_of([n for n, p in model.named_parameters() if id(p) in inside], model, "norms")


def _biases_and_norms_of(model: torch.nn.Module) -> str:
    found = []
    for one in (biases_of, norms_of):
        try:
            found.append(one(model))
        except InputError:  # RMSNorm has no bias, and its model may have none
            continue
    if not found:
        return _any_of([], model, "biases_and_norms")
    return "|".join(found)


def _any_of(names: list[str], model: torch.nn.Module, asked: str) -> str:
    if not names:
        raise InputError(f"trainable {asked}: {type(unwrap(model)).__name__} has none")
    return "|".join(f"^{re.escape(name)}$" for name in names)


def head_of(model: torch.nn.Module) -> str:
    """Return an expression that matches the names of the head's parameters alone.

    Raises InputError for a model without a head.
    """
    inner: Any = unwrap(model)
    embeddings = inner.get_output_embeddings()
    of_base = set() if inner.base_model is inner else set(map(id, inner.base_model.parameters()))
    head = {id(p) for p in inner.parameters()} - of_base if of_base else set()
    head |= set() if embeddings is None else set(map(id, embeddings.parameters()))
    names = [name for name, p in model.named_parameters() if id(p) in head]
    if not names:
        raise InputError(f"trainable head: {type(inner).__name__} has no head")
    return "|".join(f"^{re.escape(name)}$" for name in names)


PRESETS = {  # words that --trainable takes in place of an expression
    "head": head_of,
    "biases": biases_of,
    "norms": norms_of,
    "biases_and_norms": _biases_and_norms_of,
}
