"""Train models that are larger than the device's memory, with weights on the host or in files.

    model = load_offloaded("opt-66b/")                     # nothing is read yet
    optimizer = MeZO(model.named_parameters(), lr=1e-6)
    with offload(model, optimizer, device="cuda"):
        for batch in loader:
            optimizer.step(lambda: model(**batch).loss)

A step makes one pass over the weights. Each block (a decoder layer, an embedding) is copied to the
device once, takes the update of the previous step, is used by both forward passes, which take
turns, and is written back. The device therefore holds two blocks, a perturbed matrix, and twice the
activations of one forward pass.

Weights, losses and run log equal those of the run without offloading, to the bit. The model's
modules need no change: torch's functions are given the copy on the device wherever they read a
parameter.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from mezo import noise
from mezo.compatibility import CACHE_ARGUMENTS, accelerator
from mezo.distributed.exchange import Link
from mezo.errors import InputError
from mezo.forms import factors
from mezo.forms.direction import Part
from mezo.forms.updates import Update
from mezo.mezo import MeZO
from mezo.models.mapped import Homes, load_mapped, move_to_file
from mezo.noise import Move
from mezo.offload.blocks import Block, BlockCache, blocks_of
from mezo.offload.device_reads import DeviceReads
from mezo.offload.interleaved import Interleaved, Walked
from mezo.offload.turns import Turns
from mezo.optimizer import Weights
from mezo.rules import name_of
from mezo.trajectory.program import Program, Write, split_at_writing

__all__ = ["Offload", "load_offloaded", "offload"]


def load_offloaded(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    folder: str | Path | None = None,
    auto: Any = None,
    **kwargs: Any,
) -> Any:
    """Load a model, in eval mode, whose weights stay in its safetensors files until they are read.

    The weights are memory-mapped, so that the model behaves like any model on the CPU, and takes
    memory as weights are read. A modified weight keeps its memory; the files are never written.

    Args:
        name: A folder or a name on the hub.
        dtype: The model's dtype; weights with another dtype in the files are converted.
        folder: A folder for converted weights (without it they take memory), and for experts'
            weights, which files hold one by one and the model joins.
        auto: transformers.AutoModelForCausalLM, or another such class.
        kwargs: Passed to its `from_pretrained`.

    Raises InputError for a model that cannot be loaded.
    """
    import transformers

    auto = auto or transformers.AutoModelForCausalLM
    return load_mapped(str(name), auto, dtype, folder, **kwargs)


def offload(
    model: torch.nn.Module,
    optimizer: MeZO | None = None,
    *,
    device: str | torch.device | None = None,
    folder: str | Path | None = None,
    write_every: int = 1,
) -> "Offload":
    """Return a context in which `model`, whose weights are on the CPU, computes on `device`.

    Within the context the weights on the CPU lag behind by the queued updates, so call
    `optimizer.write()` or `flush()` before you read or save them; leaving the context flushes.
    Calls of the model use the updated weights. Inputs may be on any device, and outputs are
    returned on the device of the inputs.

    Args:
        model: The model, with all parameters on the CPU.
        optimizer: The optimizer of its parameters; without one, only inference is possible.
        device: The device that computes; None means the accelerator, or the CPU if there is none.
        folder: Folder for a memory-mapped file of the model's size that holds the weights, for
            models larger than the host's memory. The file is temporary; the run is in its log.
        write_every: Number of updates after which a block is written back. With 0 it never is, and
            `folder` must be None. Every visit then repeats all updates, at the cost of a draw of z
            for each, and only the run log is written, from which `mezo replay --by_tensor` makes
            the tuned model.

    Raises InputError for a model, an optimizer or options that cannot be offloaded.
    """
    return Offload(model, optimizer, device=device, folder=folder, write_every=write_every)


class Offload:
    """The context that `offload` returns."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: MeZO | None = None,
        *,
        device: str | torch.device | None = None,
        folder: str | Path | None = None,
        write_every: int = 1,
    ):
        self.model, self.optimizer = model, optimizer
        found = accelerator() if device is None else torch.device(device)
        self.device = torch.device("cpu") if found is None else found
        if write_every < 0:
            raise InputError(f"write_every must be at least 1, or 0 for never, got {write_every}")
        if not write_every and folder is not None:
            raise InputError("folder is for weights that are written: with write_every=0 none is")
        self.folder, self.write_every = folder, write_every
        self.pins = self.device.type == "cuda" and folder is None and write_every > 0
        self._homes: Homes | None = None
        for name, p in model.named_parameters():
            _check_parameter(name, p)
        if optimizer is not None:
            self._check(optimizer)

    def _check(self, optimizer: MeZO) -> None:
        trained = optimizer.trained()
        half = any(p.element_size() == 2 for _, p, _ in trained)
        check_settings(optimizer.settings | {"rule": optimizer.rule}, half=half)
        if isinstance(optimizer.processes, Link) and optimizer.processes.size > 1:
            raise InputError(f"a run of {optimizer.processes.size} processes cannot use offload")
        mine = {id(p) for p in self.model.parameters()}
        for name, p, _ in trained:
            if id(p) not in mine:
                raise InputError(f"the optimizer's {name} is not a parameter of the model")

    def __enter__(self) -> "Offload":
        with ExitStack() as stack:
            if self.folder is not None and self._homes is None:
                self._homes = move_to_file(self.model, Path(self.folder))
            elif self.pins:
                for p in self.model.parameters():
                    p.data = p.data.pin_memory()
            self.blocks = BlockCache(
                blocks_of(self.model),
                self.device,
                self.write_every,
                lambda: self.optimizer.param_groups[0] if self.optimizer else {},
                self._given_up,
            )
            stack.callback(self.blocks.close)
            self.threads = ThreadPoolExecutor(2**16)  # as many as there are halves; they wait
            stack.callback(self.threads.shutdown)
            self._ahead: dict[tuple[int, int], Interleaved] = {}  # by step and probe
            self._summed: dict[int, list[Move]] = {}  # low rank: the updates of this interval
            self._local = threading.local()
            stack.enter_context(self._hooks())
            stack.callback(self._release)
            if self.optimizer is not None:
                self.take(self.optimizer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        with self._stack:
            if self.optimizer is not None:
                self.optimizer.write()
                if not self.write_every and self.blocks.waits:
                    self.optimizer.guards.append(_refuse_lost)
            self.flush()

    def take(self, optimizer: MeZO) -> None:
        """Let the optimizer use the offloaded weights until the context is left."""
        if optimizer.weights is self:
            return
        self._check(optimizer)
        if not isinstance(optimizer.weights, Weights):
            raise InputError("the optimizer's model is offloaded already")
        self._release()
        self.optimizer, optimizer.weights = optimizer, self

    def _release(self) -> None:
        if self.optimizer is not None and self.optimizer.weights is self:
            self.optimizer.weights = Weights()

    def flush(self) -> None:
        """Make all queued updates, so that the weights on the CPU can be read or saved."""
        if self.write_every:
            self.blocks.flush()

    @contextmanager
    def reading(self, turns: Turns | None = None, number: int = 0) -> Iterator[None]:
        """Let this thread read parameters from the device within the context, as `model(...)` does.

        With `turns`, it is one of several threads that take turns.
        """
        before = getattr(self._local, "mode", None)
        if before is not None and turns is None:
            yield
            return
        mode = DeviceReads(self.blocks, turns, number)
        self._local.mode = mode
        try:
            with mode:
                yield
        finally:
            self._local.mode = before

    # what MeZO asks of `optimizer.Weights`

    here = False

    def direction(self, optimizer: MeZO, probe: int) -> Interleaved:
        """One pass over the weights for all that `optimizer.together` has, unless each walks them
        from where the last one ended. The closure of the first one's estimate is that of all."""
        step = optimizer.settings["step"]
        if (made := self._ahead.pop((step, probe), None)) is not None:
            return made
        probes, optimizer.together = optimizer.together, ()
        if probe not in probes or optimizer.form.moves_weights or optimizer.memory.paired:
            return self._new(optimizer, probe)
        self._ahead = {(step, one): self._new(optimizer, one) for one in probes}
        group = list(self._ahead.values())
        for one in group:
            one.group = group
        return self._ahead.pop((step, probe))

    def _new(self, optimizer: MeZO, probe: int) -> Interleaved:
        inner = optimizer.plan.new(probe)
        if optimizer.form.moves_weights:
            how = {"sides": inner.sides, "memory": inner.memory, "states": inner.states}
            inner = Walked(inner.parts, inner.settings, probe, **how)
        return Interleaved(inner, self)

    def move_(
        self, optimizer: MeZO, part: Part, moves: Sequence[Move], update: Update | None = None
    ) -> None:
        """The moves are made when the block is there the next time."""
        if not len(moves):
            return
        settings, table = optimizer.settings, noise.table(moves)
        for name, p, _ in part.rows:
            if not factors.is_factored(p, settings):
                self.blocks.update(p, table)
                continue
            state = optimizer.state.get(p, {})
            with self.reading():  # the sum is kept on the device
                factors.update_(p, name, table, settings, state)
            optimizer.state[p] = state
            self._summed.setdefault(id(p), []).extend(moves)
            if (settings["step"] + 1) % settings["interval"] == 0:
                self._write_sum(p, settings["step"], state)

    def end_step_(self, optimizer: MeZO) -> None:
        """Matrices at an interval's end are on their way already."""

    def queue(self, optimizer: MeZO, p: torch.Tensor, name: str, program: Program) -> bool:
        """The moves of a replay, too, are made when the block is there."""
        settings, state = optimizer.param_groups[0], optimizer.state.get(p, {})
        if not factors.is_factored(p, settings):
            self.blocks.update(p, *program.actions)
            return True
        before, (written, rest) = self._summed.pop(id(p), []), split_at_writing(program.actions)
        if written:
            self.blocks.update(p, noise.table(before), *written)
            before = []
            state.clear()
        with self.reading():
            for table in rest:
                factors.update_(p, name, table, settings, state)
        if state:
            optimizer.state[p] = state
            self._summed[id(p)] = [*before, *(Move(*row) for x in rest for row in x.tolist())]
        return True

    def as_written(self, optimizer: MeZO) -> Iterator[tuple[str, torch.Tensor]]:
        """Of one tensor after another; with write_every=0 each is copied on the device."""
        self.flush()
        settings = optimizer.settings
        for name, p, _ in optimizer.trained():
            here: torch.Tensor = p
            if not self.write_every:
                with self.reading():
                    here = torch.clone(p).detach()
            state = optimizer.state.get(p, {})
            yield name, factors.as_written(here, name, settings["step"] - 1, settings, state)

    def write_(self, optimizer: MeZO) -> None:
        group = optimizer.param_groups[0]
        trained = {id(p): p for _, p, _ in optimizer.trained()}
        if self._summed:
            optimizer.memory.written = group["step"]
        for key in [*self._summed]:
            self._write_sum(trained[key], group["step"] - 1, optimizer.state[trained[key]])
        self.flush()

    def _write_sum(self, p: torch.Tensor, step: int, state: dict) -> None:
        self.blocks.update(p, noise.table(self._summed.pop(id(p))), Write(step))
        state.clear()

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """The model's calls read from the device, where its inputs and buffers are too."""
        from accelerate.utils import find_device, send_to_device

        def enter(module, args, kwargs):
            stack, came = ExitStack(), find_device((args, kwargs))
            if getattr(self._local, "mode", None) is None:
                stack.enter_context(self.reading())
            self._local.entered = [*getattr(self._local, "entered", ()), (stack, came)]
            return move(args, self.device), move(kwargs, self.device)

        def leave(module, args, output):
            *self._local.entered, (stack, came) = self._local.entered
            stack.close()
            return move(output, came)

        def move(given: Any, to: torch.device | None) -> Any:
            if self.device.type == "cpu" or to is None:
                return given
            # the cache stays on the device from one call to the next
            return send_to_device(given, to, skip_keys=CACHE_ARGUMENTS)

        buffers = [(b, b.data) for b in self.model.buffers()]
        whole: Any = self.model
        called = [whole]
        if hasattr(whole, "get_base_model"):  # peft's wrapper generates by what it wraps
            called.append(whole.get_base_model())
        hooks = []
        for module in called:
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            hooks.append(module.register_forward_hook(leave, always_call=True))
        try:
            for b, home in buffers:
                b.data = home.to(self.device)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for b, home in buffers:
                b.data = b.data.to(home.device)

    def _given_up(self, block: Block) -> None:
        if self._homes is not None:
            self._homes.give_up([p for _, p in block.named])


def _refuse_lost() -> None:
    """Raise InputError: the weights of the next step would be the base model's."""
    raise InputError(
        "offload with write_every=0 was left, and the updates of the run are in its log alone: "
        "make all steps within one context, or go on from the weights that a replay makes"
    )


def _check_parameter(name: str, p: torch.Tensor) -> None:
    if p.is_meta or p.device.type != "cpu":
        where = "the meta device" if p.is_meta else str(p.device)
        raise InputError(
            f"parameter {name} is on {where}: offload takes a model on the CPU, or one "
            "from load_offloaded; leave device_map away"
        )
    if not p.is_floating_point():
        raise InputError(f"parameter {name} is quantised ({p.dtype}): offload does not take it")


def check_settings(settings: Mapping[str, Any], half: bool) -> None:
    """Raise InputError for settings that offload does not support.

    `half` says whether there are 16-bit weights.
    """
    if not settings["rule"].linear:
        name = name_of(type(settings["rule"]))
        raise InputError(f"rule {name} cannot be combined with offload: take sgd")
    if settings["estimator"] != "two_point":
        raise InputError(
            f"estimator {settings['estimator']} cannot be combined with offload: take two_point"
        )
    if settings["layers"]:
        raise InputError("layers (modified, keep) cannot be combined with offload")
    if half and settings["rounding"] in ("compensated", "master"):
        raise InputError(
            f"rounding {settings['rounding']!r} keeps a buffer as large as the weights: with "
            "offload take stochastic"
        )
