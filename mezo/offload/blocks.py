"""Copy blocks of weights to the device and back while it computes with other blocks.

    a block is needed           it is loaded if it is absent, and its queued updates are made
    it has changed              it is written back while the device computes with it
    both passes have left it    it is evicted, and the block that is needed next is loaded

One thread loads and updates, another writes back. The next block is predicted from the order of the
last pass. On a CPU nothing is copied: weights in a mapped file are read and updated in place.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from mezo.offload.copy_streams import copy_streams_of
from mezo.trajectory.program import Action, Program, make_

_KEPT_EACH, _KEPT_ALL = 32, 2  # the largest block's size over that of what always stays


@dataclass(eq=False)
class Block:
    """Parameters that are moved together: a decoder layer, an embedding, the head."""

    name: str
    named: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    kept: bool = False  # pinned: it is small, and stays on the device

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for _, p in self.named)


def blocks_of(model: torch.nn.Module) -> list[Block]:
    """Divide the model's parameters into blocks, in the model's order. Tied ones count once.

    Each entry of a ModuleList or Sequential is one block, including the lists inside it. Elsewhere
    each module is a block of the parameters that it holds itself. Small blocks are pinned.
    """
    entries: list[str] = []  # names of the modules that are blocks as a whole
    for name, module in model.named_modules():  # outer ones first
        inner = any(name.startswith(f"{outer}.") for outer in entries)
        if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) and not inner:
            prefix = f"{name}." if name else ""
            entries += [f"{prefix}{child}" for child, _ in module.named_children()]
    found: dict[str, Block] = {}
    for name, p in model.named_parameters():
        parent = name.rpartition(".")[0]
        parts = parent.split(".")
        uppers = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        home = next((upper for upper in uppers if upper in set(entries)), parent)
        found.setdefault(home, Block(home)).named.append((name, p))
    blocks = list(found.values())
    largest, kept = max((block.nbytes for block in blocks), default=0), 0
    for block in blocks:
        size = block.nbytes
        if size * _KEPT_EACH <= largest and (kept + size) * _KEPT_ALL <= largest:
            block.kept, kept = True, kept + size
    return blocks


def must_copy(device: torch.device, write_every: int) -> bool:
    """Return whether a block is copied before it is used.

    On a CPU it is read and updated in place, unless updates are to be delayed.
    """
    return write_every != 1 or device.type != "cpu"


@dataclass(eq=False)
class Loaded:
    """A block on the device: its tensors, by the id of the parameter."""

    tensors: dict[int, torch.Tensor]
    made: Counter = field(default_factory=Counter)  # number of queued updates made, by parameter
    ready: Any = None  # CUDA: the event after which it may be read


class BlockCache:
    """Holds at most two blocks on the device at a time, and the pinned ones.

    `update(p, *actions)` queues a program's actions on a weight, until its block is next loaded.

    Args:
        blocks: The model's blocks, as `blocks_of` returns them.
        device: The device that computes.
        write_every: Number of updates after which a block is written back. With 0 it never is, and
            each load makes all of its updates again.
        settings: Returns the noise's settings, with the keys of a run log's header.
        given_up: Called with a block that will not be needed for a while.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        device: torch.device,
        write_every: int,
        settings: Callable[[], Mapping[str, Any]],
        given_up: Callable[[Block], None] = lambda block: None,
    ):
        self.blocks, self.device, self.write_every = blocks, device, write_every
        self.settings, self.given_up = settings, given_up
        self.home = {id(p): block for block in blocks for _, p in block.named}
        self.copies = must_copy(device, write_every)
        self.loads, self.stores = (
            Counter[Block](),
            Counter[Block](),
        )  # numbers of transfers, for tests
        self._waiting: dict[int, list[tuple[Action, ...]]] = {key: [] for key in self.home}
        self._resident: dict[Block, Future[Loaded]] = {}
        self._stored: dict[Block, Future[None]] = {}
        self._next_block: dict[Block, Block] = {}  # which one was needed next, the last time
        self._last: Block | None = None
        self._loader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.streams = copy_streams_of(device)

    def update(self, p: torch.Tensor, *actions: Action) -> None:
        self._waiting[id(p)].append(actions)

    @property
    def waits(self) -> bool:
        """Whether there are updates that the weights at home do not have."""
        return any(self._waiting.values())

    def need(self, block: Block) -> Loaded:
        """Return the block with all its updates made, evict others, and prefetch the next one.

        Only one thread may call it at a time.
        """
        if block is not self._last and not block.kept:
            if self._last is not None:
                self._next_block[self._last] = block
            self._last = block
        if block not in self._resident:
            left = self._leave([block])
            self._resident[block] = self._loader.submit(self._load, block, left)
        loaded = self._loaded(block)
        if self._is_behind(block, loaded):
            event = self.streams.event()
            self._loader.submit(self._catch_up, block, loaded, event).result()
        self.streams.wait(loaded.ready)
        self.streams.use(loaded.tensors.values())
        if not block.kept:
            following = self._next_block.get(block, self._in_order(block))
            left = self._leave([block, following])
            if following not in self._resident:
                self._resident[following] = self._loader.submit(self._load, following, left)
        return loaded

    def _loaded(self, block: Block) -> Loaded:
        try:
            return self._resident[block].result()
        except Exception:
            del self._resident[block]  # the next call tries again
            raise

    def flush(self) -> None:
        """Make and write all queued updates, and leave nothing on the device."""
        self.drop()
        try:
            for block in self.blocks:
                if any(self._waiting[id(p)] for _, p in block.named):
                    self._loader.submit(self._load, block, [], True).result()
                    self._settle()
                    self.given_up(block)
        finally:
            self.drop()

    def drop(self) -> None:
        """Evict every block once its pending writes are done."""
        self._settle()
        self._leave([], kept=True)
        self._last = None

    def close(self) -> None:
        self.drop()
        for pool in (self._loader, self._writer):
            pool.shutdown()

    def _settle(self) -> None:
        wait(self._resident.values())
        for future in self._stored.values():
            future.result()  # an error in writing is raised here, if nowhere before
        self._stored.clear()

    def _in_order(self, block: Block) -> Block:
        """Guess the next block of the first pass: the one that the model lists next."""
        moving = [other for other in self.blocks if not other.kept]
        return moving[(moving.index(block) + 1) % len(moving)]

    def _leave(self, stay: Iterable[Block], kept: bool = False) -> list:
        """Evict every other block except pinned ones; return what to free, and when."""
        left = []
        for block in [b for b in self._resident if b not in stay and (kept or not b.kept)]:
            left.append((self._resident.pop(block), self.streams.event(), self._stored.get(block)))
            self.given_up(block)
        return left

    # The rest runs in the loader's and the writer's threads, where no Ctrl-C arrives.

    def _load(self, block: Block, left: list, write: bool = False) -> Loaded:
        for _, event, stored in left:  # two blocks at a time, not three
            self.streams.join(event)
            if stored is not None:
                stored.result()
        left.clear()
        if (stored := self._stored.get(block)) is not None:
            stored.result()
        self.loads[block] += 1
        with self.streams.on("in"):
            loaded = Loaded({id(p): self._copy(p) for _, p in block.named})
            event = self.streams.event()
        self._catch_up(block, loaded, event, write)
        return loaded

    def _copy(self, p: torch.Tensor) -> torch.Tensor:
        home = p.detach()
        if not self.copies:
            return home
        there = torch.empty_like(home, device=self.device)  # keeps strides
        return there.copy_(home, non_blocking=True)

    def _is_behind(self, block: Block, loaded: Loaded) -> bool:
        return any(loaded.made[id(p)] < len(self._waiting[id(p)]) for _, p in block.named)

    def _catch_up(self, block: Block, loaded: Loaded, event: Any, write: bool = False) -> None:
        changed = []
        with self.streams.on("in"):
            self.streams.wait(event)
            for name, p in block.named:
                waiting = self._waiting[id(p)][loaded.made[id(p)] :]
                if waiting:
                    tensor = loaded.tensors[id(p)]
                    with torch.no_grad():
                        program = Program([action for actions in waiting for action in actions])
                        make_(tensor, {"name": name}, dict(self.settings()), program, {})
                    loaded.made[id(p)] += len(waiting)
                if loaded.made[id(p)]:
                    changed.append(p)
            loaded.ready = self.streams.event()
        most = max((loaded.made[id(p)] for p in changed), default=0)
        if changed and (write or (self.write_every and most >= self.write_every)):
            for p in changed:
                del self._waiting[id(p)][: loaded.made[id(p)]]  # atomic: another thread appends
                loaded.made[id(p)] = 0
            if self.copies:
                self._stored[block] = self._writer.submit(self._store, block, loaded, changed)

    def _store(self, block: Block, loaded: Loaded, changed: list[torch.Tensor]) -> None:
        self.stores[block] += 1
        with torch.no_grad(), self.streams.on("out"):
            self.streams.wait(loaded.ready)
            for p in changed:
                p.detach().copy_(loaded.tensors[id(p)], non_blocking=True)
            self.streams.use(loaded.tensors.values())
            self.streams.join(self.streams.event())
