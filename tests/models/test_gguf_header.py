"""The header of a GGUF file: what is read, and that no length in it is believed."""

import os
import struct

import pytest

from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.models.gguf_files import gguf_file
from mezo.models.gguf_header import read_header
from mezo.models.loading import load

TEXT, ARRAY, COUNT = 8, 9, 4


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def key(name, kind, data):
    return text(name) + struct.pack("<I", kind) + data


ARCHITECTURE = key("general.architecture", TEXT, text("llama"))
ROW = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 5, 8, 64)


def header(*keys, rows=(ROW,), version=3, tensors=None, values=None):
    counts = len(rows) if tensors is None else tensors, len(keys) if values is None else values
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *rows])


def written(tmp_path, data):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(data)
    return path


def test_values_and_tensors_are_read_as_they_were_written(tmp_path):
    """Shapes in torch's order, offsets from the file's start; of an array its length."""
    names = struct.pack("<IQ", TEXT, 2) + text("a") + text("bc")
    numbers = struct.pack("<IQ3f", 6, 3, 1, 2, 3)
    keys = [ARCHITECTURE, key("tokens", ARRAY, names), key("scores", ARRAY, numbers)]
    keys += [key("general.alignment", COUNT, struct.pack("<I", 64))]
    data = header(*keys)
    path = written(tmp_path, data + bytes(1000))
    found = read_header(path)
    assert found.architecture == "llama"
    assert found.values["tokens"] == 2
    assert found.values["scores"] == 3
    (tensor,) = found.tensors
    assert (tensor.name, tensor.shape, tensor.kind) == ("token_embd.weight", (5, 32), 8)
    assert tensor.numel == 160
    assert tensor.start == -(-len(data) // 64) * 64 + 64
    assert found.size == len(data) + 1000


HUGE = 2**63


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no GGUF file"),
        (b"PK\3\4 and more", "no GGUF file"),
        (b"GGUF", "cut off or damaged"),
        (header(ARCHITECTURE, version=1), "has GGUF version 1"),
        (header(ARCHITECTURE, tensors=HUGE), "cut off or damaged"),
        (header(ARCHITECTURE, values=HUGE), "cut off or damaged"),
        (header(key("x", ARRAY, struct.pack("<IQ", COUNT, HUGE))), "cut off or damaged"),
        (header(key("x", ARRAY, struct.pack("<IQ", TEXT, HUGE))), "cut off or damaged"),
        (header(key("x", ARRAY, struct.pack("<IQ", ARRAY, 1))), "cut off or damaged"),
        (header(key("x", 77, b"")), "cut off or damaged"),
        (header(struct.pack("<Q", HUGE)), "cut off or damaged"),
        (header(ARCHITECTURE, rows=[text("w") + struct.pack("<I", 2**31)]), "cut off or damaged"),
        (header(ARCHITECTURE, rows=[ROW.replace(b"token", b"\x1b[2JX")]), "cut off or damaged"),
        (header(), "does not name its architecture"),
        (header(key("general.architecture", COUNT, bytes(4))), "does not name its architecture"),
        (header(ARCHITECTURE, key("general.alignment", COUNT, bytes(4))), "alignment cannot be 0"),
        (header(ARCHITECTURE, key("split.count", 2, b"\3\0")), "one of 3 parts of a model"),
    ],
)
def test_no_length_is_believed(tmp_path, data, message):
    """A number that says 2^63 is refused at once, and costs neither time nor memory."""
    with pytest.raises(InputError, match=message):
        read_header(written(tmp_path, data))


def test_every_cut_of_a_header_is_refused(tmp_path):
    """There is no length at which the reader ends otherwise than in one line."""
    data = header(ARCHITECTURE, key("tokens", ARRAY, struct.pack("<IQ", TEXT, 1) + text("a")))
    for length in range(len(data)):
        with pytest.raises(InputError, match=r"no GGUF file|cut off or damaged"):
            read_header(written(tmp_path, data[:length]))


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    """Opening a FIFO would wait for ever; a folder, and nothing at all, have lines of their own."""
    fifo = tmp_path / "pipe.gguf"
    os.mkfifo(fifo)
    with pytest.raises(InputError, match=r"pipe\.gguf is not a regular file"):
        load(ModelArguments(str(fifo)))
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(InputError, match=r"folder\.gguf is a folder without a GGUF file"):
        load(ModelArguments(str(tmp_path / "folder.gguf")))
    with pytest.raises(InputError, match="no such file"):
        load(ModelArguments(str(tmp_path / "missing.gguf")))


def test_other_names_mean_no_gguf_file(tmp_path):
    """A hub name, a folder of safetensors with a GGUF file beside them."""
    assert gguf_file("facebook/opt-125m") is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.gguf").write_bytes(b"")
    assert gguf_file(str(tmp_path)) is None
