"""Weights that stay in files and are read when they are used.

Each parameter is mapped: it is an ordinary tensor on the CPU, of which the system keeps as much in
memory as it has room for.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mezo.compatibility import TO_DISK
from mezo.errors import InputError
from mezo.foreign import foreign
from mezo.models.safetensors_files import FLOATS, check_complete

COPY = "weights.safetensors"  # within the folder of move_to_file
_NAMES = {getattr(torch, name): short for short, name in FLOATS.items()}


class Homes:
    """Where the parameters of a model are in a file, by id."""

    def __init__(self) -> None:
        self.maps: dict[int, mmap.mmap] = {}

    def give_up(self, parameters: Iterable[torch.Tensor]) -> None:
        """Drop the parameters' pages from this process; what was written to them is in the file."""
        for p in parameters:
            if id(p) in self.maps:
                self.maps[id(p)].madvise(mmap.MADV_DONTNEED)


def move_to_file(model: torch.nn.Module, folder: Path) -> Homes:
    """Move every parameter to a file in `folder`, tensor by tensor, and map it there.

    The file's space is reserved first, so that a full disk raises InputError at once. The file is
    temporary: during a run it is neither the base model nor the tuned one.
    """
    named, homes = list(model.named_parameters()), Homes()
    header, starts, end = _layout(named)
    path = folder / COPY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # what another model has mapped stays its own
        with open(path, "xb+") as file:
            os.posix_fallocate(file.fileno(), 0, end)
            file.write(header)
            file.flush()
            for (_, p), start in zip(named, starts, strict=True):
                if p.numel():
                    home, data = _map(file, start, p, p.shape, mmap.ACCESS_WRITE)
                    p.data = home.copy_(p.data)
                    homes.maps[id(p)] = data
                    homes.give_up([p])
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise InputError(f"{path}, {end / 1e9:.3g} GB: {error.strerror or error}") from None
    return homes


def _layout(named: Sequence[tuple[str, torch.Tensor]]) -> tuple[bytes, list[int], int]:
    """Return what precedes the data in a safetensors file, the start of each
    parameter, and the end."""
    entries: dict[str, Any] = {}
    starts, at = [], 0
    for name, p in named:
        if p.dtype not in _NAMES:
            raise InputError(
                f"parameter {name} is {p.dtype}: only floating-point weights are moved"
            )
        size = p.numel() * p.element_size()
        entries[name] = {"dtype": _NAMES[p.dtype], "shape": list(p.shape)}
        entries[name]["data_offsets"] = [at, at + size]
        starts.append(at)
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 64)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [first + x for x in starts], first + at


def _map(
    file: BinaryIO, start: int, like: torch.Tensor, shape: Any, access: int
) -> tuple[torch.Tensor, mmap.mmap]:
    """Return a tensor of like's dtype at byte `start` of a file, and the map that holds it."""
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    count = torch.Size(shape).numel()
    length = start - first + count * like.element_size()
    data = mmap.mmap(file.fileno(), length, access=access, offset=first)
    flat = torch.frombuffer(data, dtype=like.dtype, count=count, offset=start - first)
    return flat.view(shape), data


def load_mapped(name: str, auto: Any, dtype: Any, folder: str | Path | None, **kwargs: Any) -> Any:
    """Return the model that transformers loads "on disk", with its parameters mapped from there.

    transformers says where each parameter is and by what name, and writes to `folder` those that
    the files have in another form (experts one by one). Parameters of another dtype are converted
    in memory or, with a folder, in unnamed files there. No other memory is taken. Raise InputError
    for a model that cannot be loaded.
    """
    from accelerate.hooks import remove_hook_from_submodules

    where: dict[str, Any] = {"device_map": TO_DISK, "offload_folder": folder}
    how = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        with foreign(f"model {name}"):
            model, report = auto.from_pretrained(name, **how, **where, **kwargs)
    except InputError as error:
        hint = "; give a folder for them" if "offload_folder" in str(error) else ""
        raise InputError(f"{error}{hint}") from None
    check_complete(name, report)
    places = {name: _place(model, name) for name, p in model.named_parameters() if p.is_meta}
    remove_hook_from_submodules(model)
    for attribute in ("hf_device_map", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa"):
        model.__dict__.pop(attribute, None)  # accelerate's: it is an ordinary model again
    mapped: dict[int, torch.nn.Parameter] = {}
    for own, p in list(model.named_parameters(remove_duplicate=False)):
        if p.is_meta:
            if id(p) not in mapped:
                tensor = _stored(*places[own], p, folder)
                mapped[id(p)] = torch.nn.Parameter(tensor, requires_grad=p.requires_grad)
            module, _, leaf = own.rpartition(".")
            model.get_submodule(module).register_parameter(leaf, mapped[id(p)])
    return model.eval()


def _place(model: torch.nn.Module, name: str) -> tuple[str, str]:
    """Return (file, key in it) of a parameter, from the hook that would load it."""
    module, _, _ = name.rpartition(".")
    found: Any = model.get_submodule(module)._hf_hook
    entry = found.weights_map.dataset.index[name]
    return entry["safetensors_file"], entry["weight_name"]


def _stored(path: str, key: str, p: torch.Tensor, folder: str | Path | None) -> torch.Tensor:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[key]
        dtype = getattr(torch, FLOATS.get(entry["dtype"], ""), None)
        if dtype is None or tuple(entry["shape"]) != tuple(p.shape):
            raise InputError(
                f"{path}: {key} is {entry['dtype']} {entry['shape']}, the model's is {p.dtype} "
                f"{list(p.shape)}"
            )
        like = torch.empty(0, dtype=dtype)
        start = 8 + size + entry["data_offsets"][0]
        found = _map(file, start, like, p.shape, mmap.ACCESS_COPY)[0]
    return found if dtype == p.dtype else _converted(found, p.dtype, folder)


def _converted(tensor: torch.Tensor, dtype: torch.dtype, folder: str | Path | None) -> torch.Tensor:
    if folder is None:
        return tensor.to(dtype)
    like = torch.empty(0, dtype=dtype)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, tensor.numel() * like.element_size())
            home = _map(file, 0, like, tensor.shape, mmap.ACCESS_WRITE)[0]
    except OSError as error:
        raise InputError(f"offload_folder {folder}: {error.strerror or error}") from None
    return home.copy_(tensor)
