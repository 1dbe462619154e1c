"""Documents from compressed text, and token ids as an endless stream of shuffled windows.

A corpus file is UTF-8 text under zstd, its documents separated by blank lines. A token file is one
uint16 array, each document followed by the tokenizer's separator: `.npy`, or `.npy.xz` where what
travels must be small (2 bytes a token plain, 1.0 to 1.2 compressed).
"""

import io
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

SOURCES = {  # start of a corpus file's name -> what a model card has to say of it
    "imdb": "unlabelled film reviews (Maas et al., 2011), text for research use",
    "wikipedia": "English Wikipedia of 2015, text CC BY-SA 3.0",
}

# The reviews are UTF-8 made from Windows-1252 read as Latin-1: a dash arrives as U+0097.
_WINDOWS_1252 = {
    code: bytes([code]).decode("cp1252")
    for code in range(0x80, 0xA0)
    if code not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)  # undefined there
}


def documents(path: Path) -> Iterator[str]:
    """The documents of a corpus file, in its order."""
    import zstandard  # here alone: the machine that trains has only token files

    lines: list[str] = []
    with zstandard.open(path, "rb") as raw, io.TextIOWrapper(raw, "utf-8", newline="\n") as text:
        for line in text:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).translate(_WINDOWS_1252).strip()
                lines = []
    if lines:
        yield "".join(lines).translate(_WINDOWS_1252).strip()


def licence_of(name: str) -> str:
    """What a card says of the corpus file `name`; its bare name where nothing is known."""
    return next((text for start, text in SOURCES.items() if name.startswith(start)), name)


def save_ids(path: Path, ids: np.ndarray) -> None:
    """Writes uint16 ids as .npy, compressed where the name ends in .xz."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(ids, dtype=np.uint16))


def load_ids(paths: Sequence[Path]) -> np.ndarray:
    """The token files one after the other, as one uint16 array."""
    parts = []
    for path in paths:
        opener = lzma.open if path.suffix == ".xz" else open
        with opener(path, "rb") as file:
            parts.append(np.lib.format.read_array(file))
    return np.concatenate(parts)


def windows(ids: np.ndarray, length: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless int64 batches (batch_size, length).

    An epoch takes each token once, in windows of a new random offset and a new random order.
    """
    random = np.random.default_rng(seed)
    while True:
        first = random.integers(min(length, len(ids) - length + 1))
        starts = random.permutation(np.arange(first, len(ids) - length + 1, length))
        for i in range(0, max(1, len(starts) - batch_size + 1), batch_size):
            chosen = np.resize(starts[i : i + batch_size], batch_size)  # repeats only if too few
            yield torch.from_numpy(ids[chosen[:, None] + np.arange(length)].astype(np.int64))


def consecutive_windows(ids: np.ndarray, length: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Each window once, in order: for the held-out text. Rows that fill no batch are left out."""
    rows = ids[: len(ids) // length * length].reshape(-1, length).astype(np.int64)
    for i in range(0, len(rows) - batch_size + 1, batch_size):
        yield torch.from_numpy(rows[i : i + batch_size])
