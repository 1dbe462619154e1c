"""Which parameters of a model are trained: by an expression on their names, or its head."""

import re
from typing import Any

import torch

from mezo.errors import InputError
from mezo.models.modes import unwrap


def select(model: torch.nn.Module, trainable: str) -> int:
    """Make the parameters whose names match trainable, freeze the rest, and count the weights.

    Args:
        trainable: a regular expression that is searched in each parameter's name, or "head": the
            output layer, which is everything above the base model and the output embeddings.

    Returns the number of weights that are now trainable. Raises InputError for an expression that
    is malformed or matches no parameter.
    """
    if trainable == "head":
        trainable = head_of(model)
    try:
        pattern = re.compile(trainable)
    except re.error as error:
        raise InputError(f"trainable {trainable!r} is no regular expression: {error}") from None
    chosen = {name for name, _ in model.named_parameters() if pattern.search(name)}
    if not chosen:
        raise InputError(f"trainable {trainable!r} matches no parameter of the model")
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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
