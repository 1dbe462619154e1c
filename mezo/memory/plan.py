"""Estimate the memory, log size and time of a run from a model's config, without its weights.

A step of each method is carried out on the meta device (meta.py). Three things do not show there
and are added: the memory of the directions, the weights of a block in transit, and the speeds of a
machine, which `calibrate` measures.
"""

import inspect
import json
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mezo import noise
from mezo.compatibility import enable_checkpointing
from mezo.errors import InputError
from mezo.foreign import foreign
from mezo.forms.direction import Part, Row
from mezo.forms.scratch import Moved, Scratch
from mezo.memory.meta import FusedAttention, LiveBytes
from mezo.models.adapters import with_adapter
from mezo.models.arguments import ModelArguments
from mezo.models.loading import located, read_config
from mezo.models.modes import unwrap
from mezo.noise import Move
from mezo.offload.blocks import blocks_of

OPT = {  # hidden size, layers, heads: Zhang et al. (2022), Table 1, and the configs on the hub
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "66b": (9216, 64, 72),
    "175b": (12288, 96, 96),  # its weights are available on request only
}
PLANNED = {
    "in_place": "MeZO, in place",
    "scratch": "MeZO, scratch",
    "low_rank": "MeZO, low rank",
    "offload": "MeZO, offload",
    "lora": "LoRA, AdamW",
    "lora_checkpointing": "LoRA, AdamW, checkpointing",
    "adam": "AdamW",
    "adam_checkpointing": "AdamW, checkpointing",
}
_FEW, _MORE = 2, 4  # numbers of layers that are carried out; the rest is extrapolated
_RECORD = 16  # bytes of a step in a run log: docs/trajectory.md
_ENTRY = 120  # bytes of a tensor in the log's header, besides its name


@dataclass(frozen=True)
class Machine:
    """Speeds of a device, per second, measured by `calibrate` or given."""

    flops: float  # floating-point operations of matrix products, in the model's dtype
    draws: float  # elements of z drawn and applied
    bandwidth: float  # bytes copied between the host and the device
    device: str


@dataclass(frozen=True)
class Plan:
    """What one method needs, in bytes and seconds."""

    method: str
    device: int  # memory of the device that computes: weights, activations, optimizer
    host: int  # host memory, or a file of that size, for weights that are not on the device
    stored: int  # size of the result: a run log, or else the weights or the adapter
    seconds: float | None  # time per step; None without a machine


def config_of(model: str) -> Any:
    """Return the config of an OPT by name, of a folder or a config.json, or of a name on the hub.

    Raises InputError if there is no such model or if no method here trains it.
    """
    from transformers import OPTConfig

    short = model.lower().removeprefix("facebook/").removeprefix("opt-")
    if short in OPT and not Path(model).exists():
        hidden, layers, heads = OPT[short]
        sizes: dict[str, Any] = {"hidden_size": hidden, "ffn_dim": 4 * hidden}
        sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
        if short == "350m":
            return OPTConfig(**sizes, word_embed_proj_dim=512, do_layer_norm_before=False)
        return OPTConfig(**sizes, word_embed_proj_dim=hidden)
    try:
        config = read_config(located(model), trust_remote_code=False)
    except InputError as error:
        known = ", ".join(f"facebook/opt-{name}" for name in OPT)
        raise InputError(f"{error}; known without a file: {known}") from None
    if config.is_encoder_decoder:
        raise InputError(f"model {model} is an encoder-decoder, which no method here trains")
    return config


def skeleton(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """Return the model on the meta device: the config's first architecture, or a causal one."""
    import transformers

    named = (config.architectures or [None])[0]
    made: Any = getattr(transformers, named, None) if named else None
    with foreign(f"a model of type {config.model_type}"), torch.device("meta"):
        model = made(config) if made else transformers.AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


class Planner:
    """Plans runs of one model with one batch size and length; see `plan`.

    The loss is computed at the last position of each row, as for a candidate, or at all positions
    with `all_logits`. `make` creates the model of a config, possibly with an adapter; parameters
    that require no gradient are not trained.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        batch: int,
        length: int,
        *,
        all_logits: bool = False,
        rank: int = 8,
        make: Callable[[Any, torch.dtype], torch.nn.Module] = skeleton,
    ):
        self.config, self.dtype, self.batch, self.length = config, dtype, batch, length
        self.all_logits, self.rank, self.make = all_logits, rank, make
        self.model = make(config, dtype)
        self._accepts = inspect.signature(unwrap(self.model).forward).parameters
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise InputError(f"max_length is {length}, the model's context {limit}")
        self.named = list(self.model.named_parameters())
        self.parameters = sum(p.numel() for _, p in self.named)
        self.weights = sum(_bytes(p) for _, p in self.named)
        self.buffers = sum(map(_bytes, self.model.buffers()))
        (self._forward,) = self._of_layers(lambda config: [self._flops(config)])

    def plan(self, method: str, steps: int, machine: Machine | None = None) -> Plan:
        """Return the plan of a method, one of PLANNED.

        Raises InputError if the method is unknown or cannot be used with the dtype.
        """
        if method not in PLANNED:
            raise InputError(f"method must be one of {', '.join(PLANNED)}, got {method!r}")
        made: Callable[[], tuple[int, int, float, float]] = getattr(self, f"_{method}")
        device, host, flops, draws = made()
        stored = sum(len(name) + _ENTRY for name, _ in self.named) + _RECORD * steps
        if method.startswith("lora"):
            adapted = self._adapted(self.config).parameters()
            stored = 4 * sum(p.numel() for p in adapted if p.requires_grad)
        elif method.startswith("adam"):
            stored = self.weights
        seconds = None
        if machine is not None:
            seconds = flops / machine.flops + draws / machine.draws
            if method == "offload":  # to and fro at once
                seconds = max(seconds, self.weights / machine.bandwidth)
        return Plan(method, device, host, stored, seconds)

    def _in_place(self):
        if self.dtype.itemsize < 4:
            raise InputError("16-bit weights cannot be perturbed in place: use scratch")
        return self._base() + self.forward(), 0, 2 * self._forward, 3 * self.parameters

    def _scratch(self):
        peak = self.forward(perturbed=True)
        return self._base() + peak, 0, 2 * self._forward, 3 * self.parameters

    def _low_rank(self):
        peak, factors = self.forward(2 * self.batch), self._factors(1)
        return self._base() + peak + factors, 0, 2 * self._forward, factors / 4

    def _offload(self):
        blocks = blocks_of(self.model)
        moving = [block.nbytes for block in blocks if not block.kept]
        around = pairwise([*moving, moving[0]])  # behind the last block comes the first
        two = max(a + b for a, b in around) if len(moving) > 1 else sum(moving)
        kept = sum(block.nbytes for block in blocks if block.kept)
        states = self.batch * self.length * _width(self.config) * self.dtype.itemsize
        device = two + kept + self.buffers + self.forward(perturbed=True) + 2 * states
        return device, self.weights, 2 * self._forward, 3 * self.parameters

    def _adapted(self, config: Any) -> Any:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of Conv1D's fan_in_fan_out
            model = skeleton(config, self.dtype)
            return with_adapter(model, ModelArguments(lora_r=self.rank), 0)

    def _lora(self):
        return self._trained(self._adapted, 3)

    def _lora_checkpointing(self):
        return self._trained(lambda config: _checkpointed(self._adapted(config)), 4)

    def _adam(self):
        return self._trained(lambda config: self.make(config, self.dtype), 3)

    def _adam_checkpointing(self):
        return self._trained(lambda config: _checkpointed(self.make(config, self.dtype)), 4)

    def _trained(self, make: Callable[[Any], Any], passes: int):
        peaks = self._of_layers(lambda config: _backward(make(config), self._loss))
        return self._base() + max(peaks), 0, passes * self._forward, 0.0

    def _of_layers(self, measure: Callable[[Any], list[int]]) -> list[int]:
        """`measure` of the config. Of many equal layers each adds as much: few are enough."""
        layers = getattr(self.config, "num_hidden_layers", 0)
        if layers <= _MORE or getattr(self.config, "layer_types", None):
            return measure(self.config)
        found = []
        for count in (_FEW, _MORE):
            config = deepcopy(self.config)
            config.num_hidden_layers = count
            found.append(measure(config))
        slope = (layers - _MORE) / (_MORE - _FEW)
        return [round(more + (more - few) * slope) for few, more in zip(*found, strict=True)]

    def inference(self) -> int:
        """Return the device memory of a forward pass, in bytes."""
        return self._base() + self.forward()

    def _base(self) -> int:
        return self.weights + self.buffers

    def _factors(self, rank: int) -> int:
        """Return the bytes of A and U of m, and V of n, in float32."""
        return sum(4 * rank * (2 * len(p) + p.shape[1]) for _, p in self.named if p.dim() == 2)

    def forward(self, batch: int | None = None, *, perturbed: bool = False) -> int:
        """Return the peak of a forward pass above weights, in bytes; perturbed: with
        weights made anew."""

        def measure(config: Any) -> list[int]:
            model = self.make(config, self.dtype)
            named = model.named_parameters() if perturbed else []
            rows = [Row(name, p, (0, 0)) for name, p in named if p.requires_grad]
            settings = {"eps": 1.0, "step": 0, "distribution": "gaussian"}
            remade = _Remade(
                Scratch([Part({}, noise.Rows(rows))], settings), [Move(0, 0, 1.0, 1.0)]
            )
            known = [*model.parameters(), *model.buffers()]
            with torch.no_grad(), FusedAttention(), LiveBytes(known) as living, remade:
                self._loss(model, batch)
            return [living.peak]

        return self._of_layers(measure)[0]

    def _loss(self, model: Any, batch: int | None = None) -> torch.Tensor:
        batch = batch or self.batch
        ids = torch.zeros(batch, self.length, dtype=torch.long, device="meta")
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        optional = {"use_cache": False} | ({} if self.all_logits else {"logits_to_keep": 1})
        given |= {key: value for key, value in optional.items() if key in self._accepts}
        output = model(**given)
        logits = output.logits if "logits" in output else output.last_hidden_state[:, 0]
        logits = logits.view(-1, logits.shape[-1]).float()
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device="meta"))

    def _flops(self, config: Any) -> int:
        counter, model = FlopCounterMode(display=False), self.make(config, self.dtype)
        with torch.no_grad(), FusedAttention() as attention, LiveBytes(), counter:
            self._loss(model)
        return counter.get_total_flops() + attention.flops


class _Remade(Moved):
    """Allocates theta + eps z without computing it."""

    def moved(self, name: str, tensor: torch.Tensor, key) -> torch.Tensor:
        return torch.empty_like(tensor, requires_grad=False)

    def slice(self, name: str, tensor: torch.Tensor, key, index: int) -> torch.Tensor:
        return torch.empty_like(tensor[index], requires_grad=False)

    def lookup(self, input, weight, padding_idx=None, max_norm=None, *args, **kwargs):
        rows = min(input.numel(), len(weight))
        if rows < input.numel():
            weight = torch.empty_like(weight, requires_grad=False)
        return F.embedding(input, weight.detach())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _checkpointed(model: Any) -> Any:
    again = {"context_fn": lambda: (nullcontext(), FusedAttention())}  # within backward
    enable_checkpointing(model, {"use_reentrant": False} | again)
    return model.train()


def _width(config: Any) -> int:
    return int(config.hidden_size)


def _backward(model: Any, loss: Callable[[Any], torch.Tensor]) -> list[int]:
    """Return an AdamW step's peaks above weights and buffers: of both passes, and of the update."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    with FusedAttention(), LiveBytes([*model.parameters(), *model.buffers()]) as living:
        for _ in range(2):  # the first one makes the states
            living.take()
            loss(model).backward()
            passes = living.take()
            optimizer.step()
            update = living.take()
            optimizer.zero_grad()
    return [passes, update]


def calibrate(device: str, dtype: torch.dtype, seconds: float = 0.3) -> Machine:
    """Measure the speeds of a device, by three measurements of about `seconds` each."""
    size = 1024
    a = torch.randn(size, size, device=device).to(dtype)
    flops = _rate(lambda: a @ a, 2 * size**3, device, seconds)
    z = torch.zeros(2**22, device=device)
    move = noise.table([Move(0, 0, 1.0, 1e-3)])
    draws = _rate(lambda: noise.apply_(z, (0, 0), move), z.numel(), device, seconds)
    host = torch.zeros(2**24, dtype=torch.uint8, pin_memory=device == "cuda")
    there = torch.zeros_like(host, device=device)
    moved = _rate(lambda: there.copy_(host, non_blocking=True), 2**24, device, seconds)
    return Machine(flops, draws, moved, device)


def _rate(call: Callable[[], Any], amount: float, device: str, seconds: float) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    wait()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        call()
        wait()
        count += 1
    return amount * count / (time.perf_counter() - began)


def to_json(plans: list[Plan], planner: Planner, machine: Machine | None) -> str:
    found: dict[str, Any] = {"parameters": planner.parameters, "weights": planner.weights}
    found |= {"machine": machine and asdict(machine), "methods": [asdict(p) for p in plans]}
    return json.dumps(found)
