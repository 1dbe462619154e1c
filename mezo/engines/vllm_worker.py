"""What MeZO adds to a worker of vLLM, through `worker_extension_cls`: nothing of vLLM is replaced.

Every worker draws the part of z that belongs to its own shards. The methods are called by
`collective_rpc`, in all workers at once; what they take and return is of plain types.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.v1.attention.backend import CommonAttentionMetadata

from mezo import noise
from mezo.engines import boxes, vllm_plain  # noqa: F401  # registers unpacked weights in each worker
from mezo.engines.boxes import Box, Heads
from mezo.engines.engine import Change, Point
from mezo.engines.pieces import Piece, Pieces
from mezo.errors import InputError

TABLE = noise.table([noise.Move(0, 0, 1.0, 0.0)]).dtype
PlainChange = tuple[Sequence[str], bytes]  # names, and a table's bytes
PlainPoint = tuple[Sequence[PlainChange], Sequence[PlainChange]]  # walk, look


class MeZOWorker:
    """The methods; `self` is vLLM's worker, which holds `model_runner`."""

    model_runner: Any
    mezo_pieces: Pieces

    def mezo_begin(self, shapes: list, seed: int, distribution: str) -> str | None:
        """Find the run's tensors in the model; return what is wrong with them, if anything is."""
        model = self.model_runner.get_model()
        try:
            found = [
                piece for name, shape in shapes for piece in pieces_of(model, name, tuple(shape))
            ]
        except InputError as error:
            return str(error)
        self.mezo_pieces = Pieces(found, seed, distribution)
        return None

    def mezo_go(self, point: PlainPoint) -> None:
        walk, look = (tuple(map(changed, part)) for part in point)
        self.mezo_pieces.go(Point(walk, look))

    def mezo_score(self, rows: list, asked: list, points: list | None) -> list | None:
        """Return log-probabilities by point and query; None but from the first tensor parallel
        worker."""
        found = []
        for point in points or [None]:
            if point is not None:
                self.mezo_go(point)
            found.append(score(self.model_runner, rows, asked))
        return found if all(one is not None for one in found) else None

    def mezo_tensor(self, name: str) -> list:
        """Return (start, shape, bytes) of the boxes of a tensor that this worker holds."""
        found = []
        for piece in self.mezo_pieces.home():
            if piece.name == name:
                raw = piece.view.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                found.append((list(piece.start), list(piece.view.shape), raw))
        return found

    def mezo_take(self, name: str, shape: list, raw: bytes) -> None:
        """Set a tensor to the values given."""
        self.mezo_pieces.forget()
        for piece in self.mezo_pieces.home():
            if piece.name == name:
                whole = torch.frombuffer(bytearray(raw), dtype=piece.view.dtype).view(*shape)
                piece.view.copy_(whole[piece.box])

    def mezo_forget(self) -> None:
        self.mezo_pieces.forget()


def changed(plain: PlainChange) -> Change:
    names, raw = plain
    return Change(tuple(names), np.frombuffer(raw, TABLE))


def pieces_of(model: torch.nn.Module, name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """Yield the boxes of a transformers tensor that this worker's model holds.

    Raises InputError for a tensor that is quantised, missing, or fused in a way not known here.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    path, _, leaf = ((mapper.map_name(name) if mapper else name) or name).rpartition(".")
    module, part = _module(model, path, name)
    p = getattr(module, leaf, None)
    if not isinstance(p, torch.Tensor):
        raise InputError(f"vLLM's {type(model).__name__} holds no parameter {name}")
    method = getattr(module, "quant_method", None)
    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, type(None))
    if not isinstance(method, plain) or not p.is_floating_point():
        kind = type(method).__name__
        raise InputError(
            f"vLLM holds parameter {name} quantised ({kind}, {p.dtype}): full-rank directions need "
            "the weights themselves; leave quantization away"
        )
    start, rows = _box(module, part, shape)
    view = p.detach() if rows is None else p.detach()[rows]
    if tuple(view.shape[len(shape) :]) or any(
        at + n > whole for at, n, whole in zip(start, view.shape, shape, strict=False)
    ):
        raise InputError(
            f"vLLM's {type(module).__name__} holds {tuple(p.shape)} for parameter {name} of "
            f"{shape}: this fused layer is not mapped"
        )
    yield Piece(name, shape, start, view)


def _module(model: torch.nn.Module, path: str, name: str) -> tuple[torch.nn.Module, str | None]:
    """Return the module that holds a tensor, and the tensor's part of it if it is fused."""
    try:
        return model.get_submodule(path), _last(name)
    except AttributeError:
        pass
    parent, _, last = path.rpartition(".")
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        if last in parts:
            try:
                return model.get_submodule(f"{parent}.{fused}"), last
            except AttributeError:
                continue
    raise InputError(
        f"vLLM's {type(model).__name__} holds no module for parameter {name}: a fused layer that "
        "is not mapped, or another model"
    )


def _last(name: str) -> str:
    return name.split(".")[-2] if "." in name else ""


_QKV = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
_MERGED = {"gate_proj": 0, "up_proj": 1}


def _box(module: Any, part: str | None, shape: tuple[int, ...]) -> Box:
    """Return a worker's box of a tensor, by the kind of the layer that holds it."""
    rank, n = getattr(module, "tp_rank", 0), len(shape)
    if isinstance(module, QKVParallelLinear):
        if part not in _QKV:
            raise InputError(f"part {part} of a fused query, key and value layer is not mapped")
        return boxes.of_heads(_QKV[part], rank, _heads(module), n)
    if isinstance(module, MergedColumnParallelLinear):
        if part not in _MERGED or len(module.output_sizes) != 2:
            raise InputError(f"part {part} of a fused layer of {module.output_sizes} is not mapped")
        return boxes.of_merged(_MERGED[part], rank, module.output_sizes, module.tp_size, n)
    if isinstance(module, ColumnParallelLinear):
        return boxes.of_rows(rank * module.output_size_per_partition, n)
    if isinstance(module, RowParallelLinear):
        return boxes.of_columns(rank, module.input_size_per_partition, n)
    if isinstance(module, VocabParallelEmbedding):
        first = module.shard_indices.org_vocab_start_index
        # rows of padding, behind the vocabulary's own, stay as they are
        return boxes.of_rows(first, n, module.shard_indices.org_vocab_end_index - first)
    if isinstance(module, LinearBase) and not isinstance(module, ReplicatedLinear):
        raise InputError(f"vLLM's {type(module).__name__} is not mapped")
    return boxes.of_rows(0, n)


def _heads(module: QKVParallelLinear) -> Heads:
    own = (module.num_heads, module.num_kv_heads, module.head_size, module.v_head_size)
    return Heads(*own, module.num_kv_head_replicas)


@torch.inference_mode()
def score(runner: Any, rows: list[list[int]], asked: list[list[list[int]]]) -> list | None:
    """Return log p of the tokens asked for, query by query, from forward passes of the model
    runner's own model; None in workers without logits.

    Only the hidden states of places that are asked for meet the vocabulary. The passes use blocks
    of the key-value cache from the first on, so that no request may be running, and what the prefix
    cache knows of them must be dropped.
    """
    found: list[list[float]] = []
    budget = runner.scheduler_config.max_num_batched_tokens
    first, missing = 0, False
    while first < len(rows):
        end, tokens = first + 1, len(rows[first])
        while end < len(rows) and tokens + len(rows[end]) <= budget:
            if end - first >= runner.scheduler_config.max_num_seqs:
                break
            end, tokens = end + 1, tokens + len(rows[end])
        chosen = _chosen(runner, rows[first:end], asked[first:end])
        missing |= chosen is None
        found += chosen or []
        first = end
    return None if missing else found


def _chosen(runner: Any, rows: list[list[int]], asked: list) -> list[list[float]] | None:
    hidden = _hidden(runner, rows)
    starts = np.cumsum([0, *map(len, rows)])
    pairs = [
        (int(at) + place, token)
        for at, own in zip(starts, asked, strict=False)
        for place, token in own
    ]
    places = sorted({place for place, _ in pairs})
    where = {place: i for i, place in enumerate(places)}
    logits = runner.model.compute_logits(hidden[torch.tensor(places, device=hidden.device)])
    if logits is None:
        return None
    logits = logits.float()
    log_sums = logits.logsumexp(-1).tolist()
    index = torch.tensor([[where[p], token] for p, token in pairs], device=logits.device).T
    values = logits[index[0], index[1]].tolist()
    flat = iter(v - log_sums[where[p]] for v, (p, _) in zip(values, pairs, strict=True))
    return [[next(flat) for _ in own] for own in asked]


def _hidden(runner: Any, rows: list[list[int]]) -> torch.Tensor:
    """Return the last hidden states of all tokens, one forward pass over rows without padding."""
    device, lengths = runner.device, [len(row) for row in rows]
    tokens = torch.tensor([t for row in rows for t in row], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    metadata: dict[str, Any] = {}
    slots: dict[str, torch.Tensor] = {}
    for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        common = _common(runner, group.kv_cache_spec.block_size, lengths, positions)
        for own in runner.attn_groups[number]:
            made = own.get_metadata_builder(0).build(0, common)
            metadata |= dict.fromkeys(own.layer_names, made)
            slots |= dict.fromkeys(own.layer_names, common.slot_mapping)
    with set_forward_context(
        metadata, runner.vllm_config, num_tokens=len(tokens), slot_mapping=slots
    ):
        # as vLLM calls it: what it has compiled takes these arguments
        given = {"intermediate_tensors": None, "inputs_embeds": None}
        return runner.model(input_ids=tokens, positions=positions, **given)


def _common(runner: Any, block: int, lengths: list[int], positions: torch.Tensor) -> Any:
    """Return the attention's metadata: row after row takes blocks of the cache, from 1 on."""
    device, counts = runner.device, [-(-n // block) for n in lengths]
    if sum(counts) >= runner.kv_cache_config.num_blocks:
        raise InputError(f"the key-value cache holds no {sum(lengths)} tokens: give it more memory")
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    first = 1  # block 0 is vLLM's for padding
    for i, count in enumerate(counts):
        table[i, :count] = torch.arange(first, first + count)
        first += count
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = positions.cpu()
    slots = table[row, at // block].long() * block + at % block
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    sizes = torch.tensor(lengths, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=sizes.to(device),
        num_reqs=len(lengths),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=max(lengths),
        block_table_tensor=table.to(device),
        slot_mapping=slots.to(device),
        positions=positions,
        is_prefilling=torch.ones(len(lengths), dtype=torch.bool),
        seq_lens_cpu_upper_bound=sizes,
    )
