"""A log is a file from anybody: whatever is in it, InputError or a log, in little memory."""

import copy
import io
import json
import lzma
import struct
import tracemalloc
import zlib
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from logs import eventful, run
from models import Regression

from mezo import trajectory
from mezo.cli import main as cli
from mezo.errors import InputError
from mezo.trajectory.compact import MAX_VALUES
from mezo.trajectory.format import COMPACT, MAGIC, checksum, layout

FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=list(HealthCheck),
)
ODD = [10**400, -(2**63), 2**32, 10**9, 1e308, -0.0, float("nan"), float("inf"), "\ud800", "\x1b["]
ODD += ["", [], {}, [[]], [1e-3, 1e-3], [1] * 9, "in_place", True, None]
VALUES = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain log, an eventful one, and the compact forms of both."""
    path = tmp_path_factory.mktemp("logs")
    run(path / "plain.mezo", steps=3)
    eventful(path / "eventful.mezo")
    for name in ("plain", "eventful"):
        trajectory.compact(path / f"{name}.mezo", path / f"{name}.small")
    return path


def survives(folder, data):
    """Whatever is done with the file, it is a log or it is an InputError."""
    path = folder / "fuzzed"
    path.write_bytes(data)
    out = folder / "out"
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")), redirect_stderr(io.StringIO()):
        codes = [
            cli.main(["log", str(path), *options])
            for options in (["--recover", "--json"], ["--steps"])
        ]
    assert set(codes) <= {0, 2}
    if codes[-1]:
        return False
    for read in (
        lambda: list(trajectory.read(path).steps)[:100],
        lambda: trajectory.compact(path, out),
        lambda: trajectory.merge([path, folder / "plain.mezo"], out),
        lambda: trajectory.merge([folder / "plain.mezo", path], out),
        lambda: trajectory.replay(path, Regression(torch.float32)),
    ):
        out.unlink(missing_ok=True)
        try:
            read()
        except InputError:
            continue
    return True


def places(value, path=()):
    """The path of every value within a JSON value."""
    children = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, child in children:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from places(child, (*path, key))


@st.composite
def changed(draw, value):
    """A JSON value with some of its parts replaced, removed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(list(places(value)) or [()])) or [None]
        if last is None:
            return value
        parent = value
        for key in path:
            parent = parent[key]
        how = draw(st.integers(0, 3))
        if how == 0:
            del parent[last]
        elif how == 1 and isinstance(parent, list):
            parent.append(parent[last])
        else:
            parent[last] = draw(VALUES)
    return value


@st.composite
def edited(draw, data):
    """Bytes with some stretches replaced by others."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=9)) + data[at + draw(st.integers(0, 9)) :]
    return data


def segment(text, magic=MAGIC):
    return magic + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text))


def headers(data):
    """The headers of a log's segments."""
    found, at = [], 0
    while (at := data.find(MAGIC, at)) >= 0:
        (length,) = struct.unpack_from("<I", data, at + 8)
        found.append(json.loads(data[at + 12 : at + 12 + length]))
        at += 12 + length
    return found


def records(header, start, body):
    """As many records of a header's layout as `body` fills, each with its checksum."""
    try:
        size = layout(header).itemsize - 4
    except Exception:  # of a header that describes none
        return body
    if not 8 <= size <= len(body):
        return body
    parts = [body[i : i + size] for i in range(0, len(body) - size + 1, size)]
    return b"".join(
        part + struct.pack("<I", checksum(part, start + i)) for i, part in enumerate(parts)
    )


@FUZZ
@given(st.binary(max_size=300), st.sampled_from([b"", MAGIC, COMPACT]), st.booleans())
def test_random_bytes(folder, data, magic, whole):
    """The second half with a checksum over all, so that a compact log's reader looks at them."""
    data = magic + data
    survives(folder, data + struct.pack("<I", zlib.crc32(data)) if whole else data)


@FUZZ
@given(st.data())
def test_headers_with_other_values(folder, data):
    """Their checksums are right: the values themselves are what is refused."""
    log = headers(
        (folder / data.draw(st.sampled_from(["plain", "eventful"])))
        .with_suffix(".mezo")
        .read_bytes()
    )
    which = data.draw(st.integers(0, len(log) - 1))
    log[which] = data.draw(changed(log[which]))
    body, parts = data.draw(st.binary(max_size=300)), []
    for header in log[: which + 1]:
        start = header.get("start", 0)
        parts.append(segment(json.dumps(header).encode()))
        parts.append(
            records(header, start if type(start) is int and 0 <= start < 2**40 else 0, body)
        )
    survives(folder, b"".join(parts))


@FUZZ
@given(st.data())
@example(None)
def test_headers_of_other_bytes(folder, data):
    header = headers((folder / "plain.mezo").read_bytes())[0]
    text = json.dumps(header).encode()
    if data is not None:
        survives(folder, segment(data.draw(edited(text))))
        return
    assert survives(folder, segment(text))
    deep = b"[" * 10**5
    for odd in (
        b"",
        b"[]",
        b"null",
        b"{}",
        deep,
        b'{"a":' + deep,
        b"1" * 10**5,
        b"\xff",
        b'"\\ud800"',
    ):
        assert not survives(folder, segment(odd))
        assert not survives(folder, segment(text) + segment(odd))
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        assert not survives(folder, segment(text.decode().encode(encoding)))


@FUZZ
@given(st.data())
def test_files_of_other_bytes(folder, data):
    name = data.draw(st.sampled_from(["plain.mezo", "eventful.mezo", "plain.small"]))
    survives(folder, data.draw(edited((folder / name).read_bytes())))


def small(head, streams, length=None):
    """A compact log of any head and streams, its checksum right."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    packed = lzma.compress(text, preset=0)
    length = len(text) if length is None else length
    data = COMPACT + struct.pack("<II", length, len(packed)) + packed + b"".join(streams)
    return data + struct.pack("<I", zlib.crc32(data))


def parts_of(data):
    """(head, streams by column) of a compact log."""
    size = struct.unpack_from("<I", data, 12)[0]
    head, at, streams = json.loads(lzma.decompress(data[16 : 16 + size])), 16 + size, {}
    for name, column in head["columns"].items():
        streams[name] = data[at : at + column["bytes"]]
        at += column["bytes"]
    return head, streams


def test_what_is_changed_below_is_a_log_before(folder):
    for name in ("plain", "eventful"):
        head, streams = parts_of((folder / f"{name}.small").read_bytes())
        assert survives(folder, small(head, streams.values()))
        parts = [
            segment(json.dumps(h).encode()) for h in headers((folder / f"{name}.mezo").read_bytes())
        ]
        assert survives(folder, parts[0])


@FUZZ
@given(st.data())
def test_compact_heads_with_other_values(folder, data):
    name = data.draw(st.sampled_from(["plain.small", "eventful.small"]))
    head, streams = parts_of((folder / name).read_bytes())
    survives(folder, small(data.draw(changed(head)), streams.values()))


@FUZZ
@given(st.data())
def test_compact_columns_of_other_bytes(folder, data):
    """Other numbers in a whole stream, or a broken stream."""
    head, streams = parts_of((folder / "eventful.small").read_bytes())
    name = data.draw(st.sampled_from(list(streams)))
    if data.draw(st.booleans()) and streams[name]:
        raw = lzma.decompress(streams[name])
        streams[name] = lzma.compress(data.draw(edited(raw))[: len(raw)].ljust(len(raw)), preset=0)
    else:
        streams[name] = data.draw(edited(streams[name]))
    head["columns"][name]["bytes"] = len(streams[name])
    survives(folder, small(head, streams.values()))


def bomb(size):
    """An xz stream of `size` zeros: 7,000 times as much as it is itself."""
    packer = lzma.LZMACompressor(preset=0)
    parts = [packer.compress(bytes(2**22)) for _ in range(size // 2**22)]
    return b"".join(parts) + packer.flush()


def test_little_memory_is_taken_for_what_a_file_says_of_its_size(folder):
    """Streams of a gigabyte, heads of absurd counts, dictionaries without end: all refused."""
    head, streams = parts_of((folder / "plain.small").read_bytes())
    huge, files = bomb(2**28), []
    wide = {"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**28}
    for stream in (huge, lzma.compress(bytes(9), filters=[wide])):
        other = copy.deepcopy(head)
        other["columns"]["grads"]["bytes"] = len(stream)
        files.append(small(other, [stream, *list(streams.values())[1:]]))
    packed = COMPACT + struct.pack("<II", 2**20, len(huge)) + huge
    files += [packed + struct.pack("<I", zlib.crc32(packed)), small(head, (), 2**32 - 1)]
    for count in (10**9, 2**32 - 1, 2**63, 10**400):
        for key in ("values", "planes", "bytes"):
            other = copy.deepcopy(head)
            other["columns"]["losses"][key] = count
            files.append(small(other, streams.values()))
        other = copy.deepcopy(head)
        other["segments"][0]["steps"] = count
        files.append(small(other, streams.values()))
        other = headers((folder / "plain.mezo").read_bytes())[0]
        for key, value in (("cycles", [count]), ("start", count), ("lr", [count] * 9)):
            text = json.dumps(other | {key: value}).encode()
            files.append(segment(text) + bytes(99))
    files.append(MAGIC + struct.pack("<I", 2**31) + bytes(99))
    del huge, packed
    tracemalloc.start()
    for data in files:
        (folder / "fuzzed").write_bytes(data)
        with pytest.raises(InputError):
            trajectory.read(folder / "fuzzed")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_the_largest_compact_log_takes_bounded_memory(folder):
    """All the numbers that are allowed, in 50 KB: a step is an object only when it is looked at."""
    head, _ = parts_of((folder / "plain.small").read_bytes())
    steps = MAX_VALUES // 2
    zeros = bomb(steps)
    del head["segments"][1:]  # the digests at its end
    head["segments"][0] |= {"steps": steps, "exponents": [24] * -(-steps // 4096)}
    for name in ("grads", "exceptions", "losses"):
        head["columns"][name] = {"values": steps, "planes": 1, "bytes": len(zeros)}
    tracemalloc.start()
    (folder / "fuzzed").write_bytes(small(head, [zeros] * 2 + [b""] + [zeros]))
    log = trajectory.read(folder / "fuzzed")
    assert len(log.steps) == steps
    assert log.steps[-1].record.projected_grads == (0.0,)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28
