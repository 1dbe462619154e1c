"""A folder of safetensors files, read and written one tensor at a time.

    file = length of the header (u64) | header: JSON, padded with spaces to 8 bytes | data

safetensors' own writer takes all tensors of a file at once, so files are written here, with the
same bytes.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open

from mezo.errors import InputError
from mezo.foreign import foreign, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES = {name: short for short, name in FLOATS.items()}
_BESIDE = (  # what goes with the weights: configs and tokenizers; no code
    *("*config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "*.jinja"),
)


class Place(NamedTuple):
    """Where a tensor is: a file of the checkpoint, and the tensor's key in it."""

    file: str
    key: str


class Checkpoint:
    """model.safetensors, or the shards that its index names: headers, and a tensor at a time.

    Raise InputError for a folder without such files, or with files that are not whole.
    """

    def __init__(self, folder: Path):
        self.folder, self.index = folder, _index(folder)
        names = sorted(set(self.index["weight_map"].values())) if self.index else [SINGLE]
        self.metadata: dict[str, dict[str, str] | None] = {}
        self.tensors: dict[Place, dict[str, Any]] = {}  # in the order of the data
        for name in names:
            header = self._header(name)
            self.metadata[name] = header.pop("__metadata__", None)
            keys = sorted(header, key=lambda key: header[key]["data_offsets"])
            self.tensors |= {Place(name, key): header[key] for key in keys}

    def _header(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if path.name != name or not path.is_file():
            hint = "" if self.index else ": its weights must be safetensors"
            raise InputError(f"{self.folder} has no {name}{hint}")
        with foreign(str(path)), safe_open(path, "pt"), open(path, "rb") as file:
            # safe_open checks the file, the header included
            return json.loads(file.read(int.from_bytes(file.read(8), "little")))

    def read(self, place: Place) -> torch.Tensor:
        # opened anew for each: an open file keeps in memory what was read from it
        path = self.folder / place.file
        with foreign(str(path)), safe_open(path, "pt") as file:
            return file.get_tensor(place.key)

    def dtype(self, place: Place) -> str | None:
        """Return torch's name of the floating-point type; None for another type."""
        return FLOATS.get(self.tensors[place]["dtype"])


def _index(folder: Path) -> dict[str, Any] | None:
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} is an adapter: give the folder of its base model")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder with a checkpoint")
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():  # loading's order, too
        return None
    index = read_json(folder / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not (isinstance(files, dict) and files and all(isinstance(x, str) for x in files.values())):
        raise InputError(f"{folder / INDEX} has no weight_map")
    return index


def check_complete(name: str, report: Mapping[str, Any]) -> None:
    """Raise InputError if a checkpoint lacked weights, which loading has then drawn at random.

    Args:
        report: the loading info of `from_pretrained`.

    An encoder's pooler is excepted: no objective here reads it, and many checkpoints lack it.
    """
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"model {name}: the checkpoint lacks {missing[0]}{more}, and random weights would take "
            "its place: load a complete checkpoint of this kind of model"
        )


def write(
    checkpoint: Checkpoint,
    output: Path,
    tensor_of: Callable[[Place], torch.Tensor],
    dtypes: dict[Place, str],
) -> None:
    """Write a checkpoint like `checkpoint`, with other tensors and dtypes (torch's names).

    If the writing ends early, for whatever reason, `output` has no file that looks finished: all
    files are written to a temporary folder in it and renamed at the end, config.json last.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        _refuse_others(checkpoint, output)
        with tempfile.TemporaryDirectory(prefix=".mezo-", dir=output) as folder:
            unfinished, total = Path(folder), 0
            for name in checkpoint.metadata:
                total += _write_file(unfinished / name, checkpoint, name, tensor_of, dtypes)
            _write_beside(checkpoint, unfinished, total, dtypes)
            for name in (INDEX, "config.json"):  # of what is replaced
                (output / name).unlink(missing_ok=True)
            for path in sorted(unfinished.iterdir(), key=_rank):
                os.replace(path, output / path.name)
    except OSError as error:
        where = error.filename or f"output_dir {output}"
        raise InputError(f"{where}: {error.strerror or error}") from None


def _refuse_others(checkpoint: Checkpoint, output: Path) -> None:
    for path in output.glob("*.safetensors"):
        if path.name not in checkpoint.metadata:
            raise InputError(f"output_dir {output} has weights of another model: {path.name}")


def _rank(path: Path) -> tuple[bool, bool]:
    return path.name == "config.json", path.name == INDEX


def _write_file(path: Path, checkpoint: Checkpoint, name: str, tensor_of, dtypes) -> int:
    """Write one file, tensor by tensor; return the bytes of its data."""
    header, order, end = _layout(checkpoint, name, dtypes)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for place in order:
            _write_tensor(file, tensor_of(place))
        if file.tell() != 8 + len(header) + end:
            raise RuntimeError(f"{path} got {file.tell()} bytes, {8 + len(header) + end} were due")
    return end


def _layout(checkpoint: Checkpoint, name: str, dtypes) -> tuple[bytes, list[Place], int]:
    """Return header, places in the order of the data, and bytes of the data of a
    file to be written."""
    rows = []  # (place, bytes an element, what the header says of it)
    for place, info in checkpoint.tensors.items():
        if place.file != name:
            continue
        start, end = info["data_offsets"]
        numel, dtype, cast = math.prod(info["shape"]), info["dtype"], dtypes.get(place)
        size = (end - start) / max(numel, 1)
        if cast is not None and cast != checkpoint.dtype(place):
            dtype, size = _NAMES[cast], getattr(torch, cast).itemsize
        rows.append((place, size, {"dtype": dtype, "shape": info["shape"]}, round(numel * size)))
    if any(info["dtype"] != checkpoint.tensors[place]["dtype"] for place, _, info, _ in rows):
        rows.sort(key=lambda row: (-row[1], row[0].key))  # as safetensors does: aligned
    metadata, header, at = checkpoint.metadata[name], {}, 0
    if metadata is not None:
        header["__metadata__"] = metadata
    for place, _, info, length in rows:
        header[place.key] = info | {"data_offsets": [at, at + length]}
        at += length
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), [row[0] for row in rows], at


def _write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_beside(checkpoint: Checkpoint, folder: Path, total: int, dtypes) -> None:
    """Write the index, the config, and the tokenizer's files."""
    source, casts = checkpoint.folder, {}
    for place, dtype in dtypes.items():
        before = checkpoint.dtype(place)
        if before is not None and before != dtype:
            casts[before] = dtype
    for path in {path for pattern in _BESIDE for path in source.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, folder / path.name)
    if casts and (folder / "config.json").exists():
        config = read_json(folder / "config.json")
        text = json.dumps(_with_dtype(config, casts), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if checkpoint.index is not None:
        metadata = (checkpoint.index.get("metadata") or {}) | {"total_size": total}
        index = checkpoint.index | {"metadata": metadata}
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")


def _with_dtype(config: Any, casts: dict[str, str]) -> Any:
    """Return the config with the weights' new dtype, by which loading goes."""
    if not isinstance(config, dict):
        return config
    found = {key: _with_dtype(value, casts) for key, value in config.items()}
    for key in {"dtype", "torch_dtype"} & found.keys():
        found[key] = casts.get(str(found[key]), found[key])
    return found
