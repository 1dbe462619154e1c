"""A GGUF file as the base model of runs, logs, replays and adapters."""

import shutil

import pytest

pytest.importorskip("gguf")

from folders import mezo, reviews, same_weights, training
from gguf import GGMLQuantizationType as Kind
from gguf_writing import tiny_causal_model, write_gguf

from mezo import trajectory
from mezo.models import gguf_files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The converted models of a test are its own; the test may empty the folder."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(gguf_files, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def base(tmp_path):
    """A tiny model in blocks, and reviews to train on."""
    reviews(tmp_path / "reviews.jsonl")
    return write_gguf(tmp_path / "tiny.gguf", tiny_causal_model("llama"), Kind.Q4_1)


def emptied(cache):
    """What a colleague's machine has: nothing."""
    shutil.rmtree(cache)
    cache.mkdir()


def test_a_colleague_with_the_same_file_replays_the_log(base, tmp_path, cache, capsys):
    """The log names the file's SHA-256; both ways of replay give the run's last weights."""
    last = {"load_best_model_at_end": False}
    code, _, told = mezo(capsys, "train", *training(tmp_path, base, **last))
    assert code == 0, told
    log, run = tmp_path / "a run" / "run.mezo", tmp_path / "a run"
    began = trajectory.read(log).header["config"]["gguf_sha256"]
    assert began == gguf_files.gguf_sha256(base)
    emptied(cache)
    here = base.rename(tmp_path / "elsewhere.gguf")
    for extra in ([], ["--by_tensor"]):
        out = tmp_path / f"replayed{len(extra)}"
        words = ["--model", here, "--log", log, "--output_dir", out, *extra]
        code, _, told = mezo(capsys, "replay", *words)
        assert code == 0, told
        assert same_weights(out, run)


def test_another_file_is_refused_by_its_fingerprint(base, tmp_path, cache, capsys):
    """At once, before it is converted; the line has both."""
    mezo(capsys, "train", *training(tmp_path, base, max_steps=2))
    log = tmp_path / "a run" / "run.mezo"
    other = write_gguf(tmp_path / "other.gguf", tiny_causal_model("llama"), Kind.Q8_0)
    emptied(cache)
    for extra in ([], ["--by_tensor"]):
        words = ["--model", other, "--log", log, "--output_dir", tmp_path / "out", *extra]
        code, _, told = mezo(capsys, "replay", *words)
        assert code == 2
        (line,) = told.splitlines()
        assert gguf_files.gguf_sha256(base) in line
        assert gguf_files.gguf_sha256(other) in line
    assert not list(cache.iterdir())
    assert not (tmp_path / "out").exists()


def test_an_adapter_finds_its_base_in_another_s_cache(base, tmp_path, cache, capsys):
    """Its config names a folder of the cache that it was trained with, by the file's digest."""
    lora = {"use_peft": True, "max_steps": 2}
    code, _, told = mezo(capsys, "train", *training(tmp_path, base, **lora))
    assert code == 0, told
    words = ["--test_file", tmp_path / "reviews.jsonl", "--prompt", "{text} It was"]
    words += ["--candidates", " terrible", " great", "--json"]
    code, before, told = mezo(capsys, "eval", "--model", tmp_path / "a run", *words)
    assert code == 0, told
    moved = cache.rename(tmp_path / "another cache")
    cache.mkdir()
    code, _, told = mezo(capsys, "eval", "--model", tmp_path / "a run", *words)
    assert code == 2
    assert gguf_files.gguf_sha256(base) in told
    for entry in moved.iterdir():
        entry.rename(cache / entry.name)
    code, after, told = mezo(capsys, "eval", "--model", tmp_path / "a run", *words)
    assert (code, after) == (0, before), told
