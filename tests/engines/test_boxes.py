"""Each worker of an engine draws its own part of z: random splits against the whole tensor.

Nothing of an engine is needed here. What a worker holds is cut from the whole tensors by `chunk`,
heads repeated and matrices fused, as vLLM's loaders cut them; its boxes come from
mezo/engines/boxes.py. test_vllm.py shows that vLLM's own layers are told to these functions.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo import noise
from mezo.engines import Change, Point, boxes
from mezo.engines.boxes import Box, Heads
from mezo.engines.pieces import Piece, Pieces

HIDDEN = 6
SPLITS = st.fixed_dictionaries(
    {
        "workers": st.sampled_from([1, 2, 4]),
        "key_heads": st.sampled_from([1, 2, 4]),
        "groups": st.sampled_from([1, 2, 3]),  # query heads of a key head, times the workers
        "size": st.integers(1, 5),
        "value_size": st.integers(1, 5),
        "biased": st.booleans(),
        "seed": st.integers(0, 2**32),
    }
)


def whole(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(values, seed, moves):
    """The definition, on whole tensors."""
    found = {name: p.clone() for name, p in values.items()}
    for name, p in found.items():
        noise.apply_(p, noise.tensor_key(seed, name), moves)
    return found


def pieces_of(held, values, where):
    """The pieces of one worker; `where` has a box by name, `held` the parameter that holds it."""
    for name, box in where.items():
        view = held[name] if box.rows is None else held[name][box.rows]
        yield Piece(name, tuple(values[name].shape), box.start, view)


def walk_of(values, moves, split):
    """Move every worker's tensors, and return them beside those cut from moved whole tensors."""
    seed, workers = split["seed"], split["workers"]
    after, found = moved(values, seed, moves), []
    for rank in range(workers):
        held, where = split["cut"](values, rank)
        pieces = Pieces(pieces_of(held, values, where), seed, "gaussian")
        pieces.apply([Change(tuple(values), moves)])
        found.append((held, split["cut"](after, rank)[0]))
    return found


def heads_of(split):
    """A worker's heads; key heads are repeated where workers outnumber them, as in vLLM."""
    workers, keys = split["workers"], split["key_heads"]
    key, replicas = (keys // workers, 1) if keys >= workers else (1, workers // keys)
    query = split["groups"] * max(keys, workers) // workers
    return Heads(query, key, split["size"], split["value_size"], replicas)


def attention(split):
    """Whole tensors of a layer's attention, and what a worker holds of them in one fused matrix."""
    heads, workers, keys = heads_of(split), split["workers"], split["key_heads"]
    rows = {
        "q_proj": workers * heads.query * heads.size,
        "k_proj": keys * heads.size,
        "v_proj": keys * heads.value_size,
    }
    shapes = {f"{name}.weight": (n, HIDDEN) for name, n in rows.items()}
    shapes |= {f"{name}.bias": (n,) for name, n in rows.items()} if split["biased"] else {}
    values = {name: whole(shape, i) for i, (name, shape) in enumerate(shapes.items())}

    def cut(values, rank):
        held, where = {}, {}
        for leaf in ("weight", "bias") if split["biased"] else ("weight",):
            q, k, v = (values[f"{name}.{leaf}"] for name in rows)
            at, parts = rank // heads.replicas, workers // heads.replicas
            fused = torch.cat([q.chunk(workers)[rank], k.chunk(parts)[at], v.chunk(parts)[at]])
            for part, name in enumerate(rows):
                held[f"{name}.{leaf}"] = fused
                where[f"{name}.{leaf}"] = boxes.of_heads(part, rank, heads, q.dim())
        return held, where

    return values, cut


@settings(deadline=None, max_examples=60)
@given(SPLITS)
def test_fused_heads_draw_the_whole_tensors_z(split):
    """Grouped heads, values of another size than keys, biases, key heads that workers share."""
    values, cut = attention(split)
    moves = noise.table([noise.Move(3, 1, 0.9, 0.5)])
    for held, expected in walk_of(values, moves, split | {"cut": cut}):
        assert all(torch.equal(held[name], expected[name]) for name in held)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 2, 3]), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32))
def test_merged_rows_columns_and_padded_rows_draw_the_whole_tensors_z(workers, each, odd, seed):
    """Gate and up in one matrix, a row-parallel matrix, and a vocabulary that is padded."""
    size = workers * each
    shapes = {
        "gate": (size, HIDDEN),
        "up": (size, HIDDEN),
        "down": (odd, size),
        "down.bias": (odd,),
    }
    shapes |= {"embed": (odd, HIDDEN), "norm": (HIDDEN,)}
    values = {name: whole(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    moves = noise.table([noise.Move(3, 1, 1.0, 0.5), noise.Move(4, 0, 0.9, -0.1)])
    padded = -(-odd // workers)

    def cut(values, rank):
        fused = torch.cat([values[name].chunk(workers)[rank] for name in ("gate", "up")])
        first, end = min(rank * padded, odd), min((rank + 1) * padded, odd)
        table = torch.zeros(padded, HIDDEN)  # the rows behind the vocabulary's are padding
        table[: end - first] = values["embed"][first:end]
        held = {"gate": fused, "up": fused, "embed": table}
        held |= {name: values[name].clone() for name in ("down.bias", "norm")}
        held["down"] = values["down"].chunk(workers, 1)[rank].clone()
        where = {
            name: boxes.of_merged(part, rank, (size, size), workers, 2)
            for part, name in enumerate(("gate", "up"))
        }
        where["down"] = boxes.of_columns(rank, each, 2)
        where |= {"down.bias": boxes.of_columns(rank, each, 1), "norm": boxes.of_rows(0, 1)}
        return held, where | {"embed": boxes.of_rows(first, 2, end - first)}

    for held, expected in walk_of(values, moves, {"workers": workers, "seed": seed, "cut": cut}):
        assert all(torch.equal(held[name], expected[name]) for name in held)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_box_of_a_tensor_is_a_part_of_its_z(data):
    """Looks and walks of a box, whole rows or not, are cuts of those of the whole tensor."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    end = tuple(data.draw(st.integers(at + 1, n)) for at, n in zip(start, shape, strict=True))
    box = tuple(slice(at, to) for at, to in zip(start, end, strict=True))
    values = {"w": whole(shape, 0)}
    walk, look = (noise.table([noise.Move(s, 0, 1.0, 0.5)]) for s in (3, 4))
    view = values["w"][box].clone()
    pieces = Pieces([Piece("w", shape, start, view)], 5, "gaussian")
    pieces.go(Point((Change(("w",), walk),), (Change(("w",), look),)))
    walked = moved(values, 5, walk)
    assert torch.equal(view, moved(walked, 5, look)["w"][box])
    assert torch.equal(pieces.home()[0].view, walked["w"][box])


@pytest.mark.parametrize("wrong", [Box((1, 0), slice(0, 4)), Box((0, 0), slice(2, 6))])
def test_a_box_at_another_place_draws_another_z(wrong):
    """The tests above would see a box that is off by a row, in the tensor or in the matrix."""
    values = {"w": whole((8, HIDDEN), 0)}
    held = values["w"].clone()[:6]
    moves = noise.table([noise.Move(3, 1, 1.0, 0.5)])
    pieces = Pieces(pieces_of({"w": held}, values, {"w": wrong}), 5, "gaussian")
    pieces.apply([Change(("w",), moves)])
    assert not torch.equal(held[:4], moved(values, 5, moves)["w"][:4])
