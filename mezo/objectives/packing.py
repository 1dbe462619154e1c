"""Candidates of one example in one row: the tokens that they have in common are read once.

    rows      p1 p2 p3 a1 a2      packed    p1 p2 p3 a1 a2 b1
              p1 p2 p3 b1         position   0  1  2  3  4  3

A token sees the common ones and those of its own branch (a 4-D attention mask), and its position is
the number of tokens that it sees before itself, so each branch is computed as in a row of its own.
One forward pass without a cache does it: its memory is that of the tokens, and the noise of
theta + eps z is drawn once. A model that ignores such a mask (recurrence, ALiBi) gets plain rows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from mezo.objectives.tokens import stack

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Batch = dict[str, torch.Tensor]
IGNORED = -100  # target of padding, torch's own ignore_index
COMMON = -1  # branch of the tokens that all rows of an example begin with
# How far a token looks in some layers, by the names that transformers' configurations have. The
# model's own mask has this bound; a mask that is passed in replaces it.
BOUNDS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")


def reach(config: "PretrainedConfig") -> int | None:
    """Return the shortest distance beyond which some layer does not look; None where all do."""
    found = (getattr(config.get_text_config(), name, None) for name in BOUNDS)
    return min((bound for bound in found if isinstance(bound, int) and bound > 0), default=None)


def pack(
    rows: Sequence[Sequence[tuple[int, ...]]],
    row: Sequence[Sequence[int]],
    targets: Sequence[Sequence[list[int]]],
    filler: int,
) -> Batch:
    """Pack B examples of up to K candidates into B rows of tokens.

    Args:
        rows: for each example, the different rows that its candidates make.
        row: for each candidate, the index of its row in its example.
        targets: for each candidate, the tokens to be scored; the last is read at its row's end.

    Returns: input_ids, attention_mask (B, T), padded on the left; branch (B, N), of the last N
    tokens, those that are read and what is behind them; rows (R, 2), example and branch of each
    row; row (B, K), the number of a candidate's; targets (B, K, L) and place (B, K, L), where each
    is read, counted from the end of the packed row. What an example has less is IGNORED.
    """
    ids, branches, places = [], [], []
    pairs: list[list[int]] = []
    numbers: list[list[int]] = []
    most = max(map(len, row))
    for b, (mine, own, wanted) in enumerate(zip(rows, row, targets, strict=True)):
        common, packed, branch, starts = _joined(mine)
        for j, tokens in zip(own, wanted, strict=True):
            inside = range(len(mine[j]) - len(tokens), len(mine[j]))  # places in the row itself
            at = [i if i < common else starts[j] + i - common for i in inside]
            places.append([i - len(packed) for i in at])
        missing = most - len(own)
        places += [[-1]] * missing
        numbers.append([len(pairs) + j for j in own] + [len(pairs)] * missing)
        pairs += [[b, j] for j in range(len(mine))]
        ids.append(packed)
        branches.append(branch)
    place = stack(places, -1, "left").view(len(row), most, -1)
    behind = max(sum(j != COMMON for j in branch) for branch in branches)
    read = max(behind, -int(place.min()))
    return {
        **padded(ids, filler),
        "branch": stack([[COMMON] * read + branch for branch in branches], COMMON, "left")[
            :, -read:
        ],
        "rows": torch.tensor(pairs),
        "row": torch.tensor(numbers),
        "targets": _targets(targets, most),
        "place": place,
    }


def _joined(rows: Sequence[tuple[int, ...]]) -> tuple[int, list[int], list[int], list[int]]:
    """Return how many tokens all rows begin with, the packed row, its branches,
    and their starts."""
    places = enumerate(zip(*rows, strict=False))
    common = next((i for i, tokens in places if len(set(tokens)) > 1), min(map(len, rows)))
    packed, branch, starts = list(rows[0][:common]), [COMMON] * common, []
    for j, row in enumerate(rows):
        starts.append(len(packed))
        packed += row[common:]
        branch += [j] * (len(row) - common)
    return common, packed, branch, starts


def spread(
    rows: Sequence[Sequence[tuple[int, ...]]],
    row: Sequence[Sequence[int]],
    targets: Sequence[Sequence[list[int]]],
    filler: int,
) -> Batch:
    """Return the same as R plain rows: input_ids, attention_mask (R, T), row (B,
    K), targets (B, K, L)."""
    most, first, numbers = max(map(len, row)), 0, []
    for mine, own in zip(rows, row, strict=True):
        numbers.append([first + j for j in own] + [first] * (most - len(own)))
        first += len(mine)
    ids = [one for mine in rows for one in mine]
    return padded(ids, filler) | {"row": torch.tensor(numbers), "targets": _targets(targets, most)}


def padded(rows: Sequence[Sequence[int]], filler: int, side: str = "left") -> Batch:
    """Return input_ids and attention_mask of shape (rows, longest)."""
    mask = stack([[1] * len(row) for row in rows], 0, side)
    return {"input_ids": stack(rows, filler, side), "attention_mask": mask}


def _targets(targets: Sequence[Sequence[list[int]]], most: int) -> torch.Tensor:
    flat = [t for own in targets for t in (*own, *[[IGNORED]] * (most - len(own)))]
    return stack(flat, IGNORED, "left").view(len(targets), most, -1)


def packed_inputs(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return the packed rows: input_ids, attention_mask (B, 1, T, T) to be added to scores,
    position_ids.

    An additive mask suits both transformers' eager and sdpa attention.
    """
    length, read = batch["input_ids"].shape[1], batch["branch"].shape[1]
    branch = F.pad(batch["branch"], (length - read, 0), value=COMMON)
    own = (branch[:, None] == COMMON) | (branch[:, None] == branch[:, :, None])
    before = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    visible = before & own & batch["attention_mask"][:, None].bool()
    itself = torch.eye(length, dtype=torch.bool, device=branch.device)  # padding sees something
    mask = torch.zeros(visible.shape, dtype=dtype, device=branch.device)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": mask.masked_fill_(~(visible | itself), torch.finfo(dtype).min)[:, None],
        "position_ids": (visible.sum(-1) - 1).clamp(min=0),
    }


def apart(batch: Batch, numbers: torch.Tensor | None = None) -> Batch:
    """Return plain rows of packed ones, all or those of the `numbers`: input_ids
    and attention_mask."""
    rows = batch["rows"] if numbers is None else batch["rows"][numbers]
    example, read = rows[:, 0], batch["branch"].shape[1]
    branch, real = batch["branch"][example], batch["attention_mask"][example].bool()
    own = (branch == COMMON) | (branch == rows[:, 1:])
    keep = torch.cat([real[:, :-read], real[:, -read:] & own], dim=1)
    order = keep.long().argsort(dim=1, stable=True)[:, -int(keep.sum(1).max()) :]  # padding first
    return {
        "input_ids": batch["input_ids"][example].gather(1, order),
        "attention_mask": keep.gather(1, order).long(),
    }


def repeat_rows(whole: Batch, batch: Batch, times: int) -> Batch:
    """Number the rows of the copies in `whole`, which `closures.repeated` has made of a batch."""
    examples, rows = len(batch["row"]), len(batch["rows" if "rows" in batch else "input_ids"])
    for i in range(1, times):
        whole["row"][i * examples : (i + 1) * examples] += i * rows
        if "rows" in batch:
            whole["rows"][i * rows : (i + 1) * rows, 0] += i * len(batch["input_ids"])
    return whole
