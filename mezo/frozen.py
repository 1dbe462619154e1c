"""Cheaper steps: where the lower layers are frozen, their output for an example is computed once.

    with FrozenLower(model, layers=4):        # freezes the embeddings and the layers 0 to 3
        optimizer = MeZO(model.named_parameters(), ...)
        optimizer.step(lambda: model(**batch).loss)      # runs the layers from 4 on

A step then costs two forward passes of the upper layers. The price is memory: the states that enter
the first trained layer are kept for every text seen (tokens x hidden size x bytes).
"""

from collections.abc import Sequence
from typing import Any

import torch

from .errors import InputError


class FrozenLower:
    """A context in which `model` skips its frozen lower layers for texts it has seen.

    Any transformers model whose layers are one torch.nn.ModuleList and pass on a tensor of shape
    (batch, tokens, hidden), called with input_ids and attention_mask. The states of a text are
    computed alone, without padding, so that they do not depend on the batch or on the order.
    Equal to the plain forward up to rounding, for models in eval mode without key-value cache.
    Leaving the context drops the states and the skipping; the parameters stay frozen.

    Raises InputError if there is no such list or it has too few layers.
    """

    def __init__(self, model: torch.nn.Module, layers: int):
        self.model, self.first = model, layers
        name, self.layers = _stack(model)
        if not 0 < layers < len(self.layers):
            raise InputError(f"{name} has {len(self.layers)} layers, {layers} cannot be frozen")
        above = {id(p) for layer in self.layers[layers:] for p in layer.parameters()}
        prefixes = tuple(f"{name}.{i}." for i in range(layers))
        for key, p in model.named_parameters():
            if key.startswith(prefixes) or ("embed" in key and id(p) not in above):
                p.requires_grad_(False)
        self._states: dict[tuple[int, ...], torch.Tensor] = {}
        self._entering: torch.Tensor | None = None  # what enters the first trained layer, if known

    def __enter__(self) -> "FrozenLower":
        for i in range(self.first):
            layer: Any = self.layers[i]
            layer.forward = self._skipping(layer.forward)
        self._hook = self.model.register_forward_pre_hook(self._look_up, with_kwargs=True)
        return self

    def __exit__(self, *exception) -> None:
        self._hook.remove()
        for i in range(self.first):
            del self.layers[i].forward  # the class's own again
        self._states.clear()
        self._entering = None

    def _skipping(self, forward):
        def skip_or_forward(hidden_states, *args, **kwargs):
            if self._entering is None:
                return forward(hidden_states, *args, **kwargs)
            return self._entering

        return skip_or_forward

    @torch.no_grad()
    def _look_up(self, model, args, kwargs) -> None:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if args or ids is None or mask is None or kwargs.get("past_key_values") is not None:
            raise InputError("frozen layers need a call with input_ids and attention_mask by name")
        rows = [row[keep] for row, keep in zip(ids, mask.bool(), strict=True)]
        states = [self._of(row) for row in rows]
        entering = states[0].new_zeros(*ids.shape, states[0].shape[-1])
        entering[mask.bool()] = torch.cat(states)  # row by row, whichever side is padded
        self._entering = entering

    def _of(self, row: torch.Tensor) -> torch.Tensor:
        """The states of one text at the first trained layer, shape (tokens, hidden)."""
        key = tuple(row.tolist())
        if key not in self._states:
            self._entering = None
            seen: list[torch.Tensor] = []
            layer = self.layers[self.first]
            hook = layer.register_forward_pre_hook(lambda m, args: _stop(seen, args[0]))
            try:
                self.model.forward(input_ids=row[None], attention_mask=torch.ones_like(row)[None])
            except _Stop:
                self._states[key] = seen[0][0].clone()
            finally:
                hook.remove()
        return self._states[key]


class _Stop(Exception):
    """Raised at the first trained layer: what is above need not be computed."""


def _stop(seen: list[torch.Tensor], states: torch.Tensor):
    seen.append(states)
    raise _Stop


def _stack(model: torch.nn.Module) -> tuple[str, Sequence[torch.nn.Module]]:
    """The name and the list of the model's layers: the longest ModuleList of one class."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len({type(m) for m in module}) == 1
    ]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of layers to freeze")
    name, module = max(lists, key=lambda pair: len(pair[1]))
    return name, list(module)
