"""Blocks of weights on their way: which they are, how often they come, and who waits for whom."""

import contextlib
import threading

import torch
from offloading import COPIES, loss_of, made

from mezo import MeZO
from mezo.noise import Move, table
from mezo.offload import blocks
from mezo.offload.blocks import BlockCache, blocks_of
from mezo.offload.context import Offload
from mezo.offload.copy_streams import CopyStreams


def test_blocks_are_layers_and_what_is_beside_them():
    names = [block.name for block in blocks_of(made("opt")) if not block.kept]
    layers = [f"model.decoder.layers.{i}" for i in (0, 1)]
    assert names == ["model.decoder.embed_tokens", "model.decoder.embed_positions", *layers]
    covered = [p for block in blocks_of(made("mixtral")) for _, p in block.named]
    assert len({*map(id, covered)}) == len(covered) == len(list(made("mixtral").parameters()))


def test_one_transfer_each_way_a_block_and_step():
    """Also for a tied embedding, that is read at both ends of the model."""
    for name in ("gpt2", "llama"):
        model = made(name)
        optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=3)
        with Offload(model, optimizer, **COPIES) as there:
            for _ in range(3):  # the order is learned
                optimizer.step(loss_of(model))
            counts = there.blocks.loads, there.blocks.stores
            there.blocks._settle()  # what is on its way
            before = [count.copy() for count in counts]
            for _ in range(9):
                optimizer.step(loss_of(model))
            there.blocks._settle()
            moving = [block for block in there.blocks.blocks if not block.kept]
            assert len(moving) >= 4
            for count, then in zip(counts, before, strict=True):
                times = [count[b] - then[b] for b in moving]
                # what is fetched for the next step gets this step's update before or after its end
                assert all(abs(number - 9) <= 1 for number in times), (name, times)


class Clocks(CopyStreams):
    """Streams that count work: an event says how far each of them has come."""

    def __init__(self):
        self.current = threading.local()
        self.known = {name: {} for name in ("compute", "in", "out")}  # what each has waited for
        self.done: dict = {}

    @property
    def name(self):
        return getattr(self.current, "name", "compute")

    @contextlib.contextmanager
    def on(self, name):
        before, self.current.name = self.name, name
        yield
        self.current.name = before

    def event(self):
        mine = self.known[self.name]
        mine[self.name] = mine.get(self.name, 0) + 1
        return dict(mine)

    def wait(self, event):
        for name, at in (event or {}).items():
            mine = self.known[self.name]
            mine[name] = max(mine.get(name, 0), at)

    def join(self, event):
        self.done = {k: max(self.done.get(k, 0), v) for k, v in (self.done | (event or {})).items()}

    def use(self, tensors):
        assert self.name in ("compute", "out")


class Watched(BlockCache):
    """Asserts that work on one stream comes after what it needs of another."""

    def need(self, block):
        loaded = super().need(block)
        assert self.streams.known["compute"].get("in", 0) >= loaded.ready["in"] > 0
        return loaded

    def _store(self, block, loaded, changed):
        super()._store(block, loaded, changed)
        assert self.streams.known["out"]["in"] >= loaded.ready["in"]


def test_copy_streams_wait_for_each_other(monkeypatch):
    """The order that CUDA needs: computing after copying in, copying out after the update."""
    monkeypatch.setattr(blocks, "copy_streams_of", lambda device: Clocks())
    model = made("llama")
    (group,) = MeZO(model.named_parameters()).param_groups
    cache = Watched(
        blocks_of(model),
        torch.device("cpu"),
        1,
        lambda: group,
    )
    for step in range(3):
        for block in cache.blocks:
            cache.need(block)
        for p in model.parameters():
            cache.update(p, table([Move(step, 0, 1.0, 0.1)]))
    cache.close()
    assert sum(cache.stores.values()) >= 2 * len(cache.blocks)
    assert cache.streams.done["compute"] > 0  # blocks are freed when the device is done with them
