"""Cheaper steps: if the lower layers are frozen, their output for an example is computed once.

    with FrozenLower(model, layers=4):        # freezes all that runs before layer 4
        optimizer = MeZO(model.named_parameters(), ...)
        optimizer.step(lambda: model(**batch).loss)      # runs the layers from 4 on

A step then costs two forward passes of the upper layers. The price is memory: the states that enter
the first trained layer are kept for every text seen (tokens x hidden size x bytes).
"""

import inspect
from typing import Any

import torch

from mezo.errors import InputError
from mezo.models.modes import evaluating, unwrap

ROWS = ("position_ids", "token_type_ids")  # beside input_ids, what a lower layer's states depend on
ABOVE = ("labels", "use_cache", "logits_to_keep", "return_dict")  # what they do not depend on


class FrozenLower:
    """A context in which `model` skips its frozen lower layers for texts it has seen.

    It works for any transformers model that is called with input_ids and attention_mask, and whose
    layers are one torch.nn.ModuleList and pass on a tensor of shape (batch, tokens, hidden). The
    states of a text are computed in evaluation mode, alone and without padding, so that they depend
    neither on the batch nor on the order. Except at padding, the output is that of the plain
    forward pass, up to rounding: the first call runs both ways and compares. Key-value caches that
    a call returns are useless. Leaving the context drops the states and the skipping. What was
    frozen stays frozen, and so does what is tied to it (an output embedding).

    Raise InputError if there is no such list, if it has too few layers, or if the outputs differ.
    """

    def __init__(self, model: torch.nn.Module, layers: int):
        self.model, self.first = model, layers
        name, self.layers = _stack(model)
        if not 0 < layers < len(self.layers):
            raise InputError(f"{name} has {len(self.layers)} layers, {layers} cannot be frozen")
        self._accepts = inspect.signature(unwrap(model).forward).parameters
        self._states: dict[tuple, torch.Tensor] = {}
        self._entering: torch.Tensor | None = None  # what enters the first trained layer, if known
        self._compared = False
        for p in self._below():
            p.requires_grad_(False)
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError(f"with {layers} frozen layers nothing is left to train")

    def __enter__(self) -> "FrozenLower":
        self._undo = []
        for layer in self.layers[: self.first]:
            self._undo.append((layer, layer.__dict__.get("forward")))  # accelerate's own, say
            layer.forward = self._skipping(layer.forward)
        look_up = self.model.register_forward_pre_hook(self._look_up, with_kwargs=True)
        forget = self.model.register_forward_hook(self._forget, always_call=True)
        self._hooks = look_up, forget
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer, forward in self._undo:
            if forward is None:
                del layer.forward  # the class's own again
            else:
                layer.forward = forward
        self._states.clear()

    def _below(self) -> list[torch.nn.Parameter]:
        """Return the parameters of all modules that run, or begin to, before the first
        trained layer."""
        run: list[torch.nn.Module] = []
        hooks = [
            module.register_forward_pre_hook(lambda module, args: run.append(module))
            for module in self.model.modules()
        ]
        device = next(self.model.parameters()).device
        try:
            self._run_lower(torch.zeros(1, 1, dtype=torch.long, device=device), {})
        finally:
            for hook in hooks:
                hook.remove()
        stack = {id(layer) for layer in self.layers}
        if [m for m in run if id(m) in stack] != self.layers[: self.first + 1]:
            raise InputError(f"{type(self.model).__name__} does not run its layers once, in order")
        above = {id(m) for layer in self.layers[self.first :] for m in layer.modules()}
        return [p for m in run if id(m) not in above for p in m.parameters(recurse=False)]

    def _skipping(self, forward):
        def skip_or_forward(hidden_states, *args, **kwargs):
            if self._entering is not None:
                return self._entering
            output = forward(hidden_states, *args, **kwargs)
            if not isinstance(output, torch.Tensor):
                raise InputError(
                    f"a layer that passes on a {type(output).__name__} cannot be cached"
                )
            return output

        return skip_or_forward

    def _look_up(self, model, args, kwargs) -> None:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        known = {name for name, value in kwargs.items() if value is not None and value is not False}
        unknown = known - {"input_ids", "attention_mask", *ROWS, *ABOVE}
        if args or unknown:
            what = ", ".join(sorted(unknown)) or "arguments by position"
            raise InputError(f"a model with cached layers does not take {what}")
        if ids is None or mask is None or mask.shape != ids.shape:
            raise InputError("a model with cached layers needs input_ids and their attention_mask")
        mask = mask.bool()
        behind_padding = bool((mask[:, 1:] & ~mask[:, :-1]).any())
        if behind_padding and "position_ids" in self._accepts and "position_ids" not in known:
            raise InputError("cached layers and padding on the left: pass position_ids")
        entering = self._enter(ids, mask, {k: v for k, v in kwargs.items() if k in known & {*ROWS}})
        if not self._compared:
            self._compare(kwargs, entering, mask)
            self._compared = True
        self._entering = entering

    def _forget(self, *call) -> None:
        self._entering = None  # a call of an inner module would take it for its own

    @torch.no_grad()
    def _enter(self, ids, mask, rest: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what enters the first trained layer, (batch, tokens, hidden); 0 for padding."""
        inputs = torch.stack([ids, *(value.expand_as(ids) for value in rest.values())])
        known = inputs.cpu()  # one wait for the device, not one per row
        states = []
        for i, keep in enumerate(mask.cpu()):
            key = (*rest, *known[:, i, keep].flatten().tolist())
            if key not in self._states:
                text, *others = inputs[:, i, mask[i]].unsqueeze(1)  # (1, tokens) each
                found = self._run_lower(text, dict(zip(rest, others, strict=True)))
                self._states[key] = found[0].clone()
            states.append(self._states[key])
        entering = states[0].new_zeros(*ids.shape, states[0].shape[-1])
        entering[mask] = torch.cat(states)  # row by row, whichever side is padded
        return entering

    def _run_lower(self, ids: torch.Tensor, rest: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the states at the first trained layer, for one text without padding."""
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **rest}
        found, _ = self._run_into(self.layers[self.first], inputs)
        if found.shape[:2] != ids.shape:
            raise InputError(f"{type(self.model).__name__} adds tokens of its own (a soft prompt)")
        return found

    def _run_into(self, layer: torch.nn.Module, inputs: dict) -> tuple[torch.Tensor, float]:
        """Return the states that a layer is called with, and the tolerance of their arithmetic."""
        seen: list[tuple[torch.Tensor, float]] = []

        def stop(module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            kind = states.device.type  # within the forward: autocast is on, if it is
            half = states.element_size() == 2 or torch.is_autocast_enabled(kind)
            seen.append((states, 0.1 if half else 0.01))
            raise _Stop

        hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
        cache = {"use_cache": False} if "use_cache" in self._accepts else {}
        try:
            with evaluating(self.model):
                self.model.forward(**(inputs | cache))
        except _Stop:
            return seen[0]
        finally:
            hook.remove()
        raise InputError(f"{type(self.model).__name__} does not run its layers one by one")

    def _compare(self, kwargs: dict[str, Any], entering: torch.Tensor, mask: torch.Tensor) -> None:
        """Raise InputError unless the last layer gets the same states with skipping as without.

        A wrong position or mask changes a token's states by a large part of their norm; rounding
        changes them by far less than 1 % (10 % in 16 bits).
        """
        plain, tolerance = self._run_into(self.layers[-1], kwargs)
        self._entering = entering
        try:
            skipped, _ = self._run_into(self.layers[-1], kwargs)
        finally:
            self._entering = None
        plain, skipped = plain[mask].float(), skipped[mask].float()
        off = float(((plain - skipped).norm(dim=-1) / plain.norm(dim=-1)).max())
        if not off <= tolerance:
            raise InputError(
                f"{type(self.model).__name__} cannot skip lower layers: its states would be off by "
                f"{100 * off:.2g} %; train without frozen layers"
            )


class _Stop(Exception):
    """Raised at the layer in question, since the layers above need not be computed."""


def _stack(model: torch.nn.Module) -> tuple[str, list[Any]]:
    """Return the name and the list of the model's layers: the longest ModuleList of one class.

    Lists within lists (the experts of a layer) do not count.
    """
    lists: dict[str, torch.nn.ModuleList] = {}
    for name, module in model.named_modules():  # outer ones first
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, torch.nn.ModuleList) and not inner:
            lists[name] = module
    stacks = {name: list(m) for name, m in lists.items() if len({type(x) for x in m}) == 1}
    if not stacks:
        raise InputError(f"{type(model).__name__} has no list of layers to freeze")
    name = max(stacks, key=lambda name: len(stacks[name]))
    return name, stacks[name]
