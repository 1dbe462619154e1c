"""Replay onto a checkpoint's files: the bits of the loaded model's, in the memory of a tensor."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import base, loaded, same, tune, weights
from safetensors.torch import load_file, save_file

from mezo import MeZO, noise, trajectory
from mezo.errors import InputError
from mezo.models import safetensors_files as checkpoint
from mezo.trajectory import replay_checkpoint

CASES = [
    ("opt", torch.float32, {}),
    ("llama", torch.float32, {"distribution": "rademacher", "num_samples": 2}),
    ("llama", torch.bfloat16, {"rounding": "stochastic"}),
    ("opt", torch.bfloat16, {"rounding": "compensated"}),
    ("llama", torch.float16, {"rounding": "master"}),
    ("opt", torch.bfloat16, {"rounding": "nearest", "perturbation": "in_place"}),
]


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize(("kind", "dtype", "options"), CASES)
def test_the_files_are_those_of_the_loaded_model_replayed_and_saved(
    tmp_path, kind, dtype, options, shards
):
    """One file byte for byte, shards tensor by tensor; tied embeddings (OPT) and untied (llama)."""
    size = 20 if dtype == torch.float32 else 10  # three files or four
    few = {"max_shard_size": f"{size}KB"} if shards else {}
    model = base(tmp_path / "base", kind, dtype, **few)
    tune(copy.deepcopy(model), tmp_path / "run.mezo", **options)
    seen: list[tuple[int, int]] = []
    where = (tmp_path / "run.mezo", tmp_path / "base", tmp_path / "out")
    assert replay_checkpoint(*where, progress=lambda *at: seen.append(at)) == 3
    assert seen == [(i + 1, len(seen)) for i in range(len(list(model.parameters())))]
    trajectory.replay(tmp_path / "run.mezo", model)
    model.save_pretrained(tmp_path / "expected")
    expected, found, before = (files(tmp_path / name) for name in ("expected", "out", "base"))
    assert len(found) == len(before) >= (3 + 5 if shards else 1 + 4)  # config and tokenizer
    if shards:  # as the base is cut
        assert json.loads(found[checkpoint.INDEX]) == json.loads(before[checkpoint.INDEX])
        assert same(weights(tmp_path / "out"), weights(tmp_path / "expected"))
    else:
        assert all(found[name] == data for name, data in expected.items())
    assert not same(weights(tmp_path / "base"), weights(tmp_path / "out"))
    again = loaded(tmp_path / "out", type(model))
    assert same(dict(model.named_parameters()), dict(again.named_parameters()))


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_file_is_written_as_safetensors_would(tmp_path):
    """Every kind of tensor, odd names; the bytes are those of save_file."""
    odd = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.arange(3).half()}
    odd |= {"i": torch.arange(2), "none": torch.ones(0, 2), "one": torch.tensor(1.5)}
    odd |= {'\u00fc"\\': torch.ones(1), "u8": torch.arange(5, dtype=torch.uint8)}
    odd |= {"yes": torch.tensor([True]), "f8": torch.ones(3).to(torch.float8_e4m3fn)}
    odd |= {"nan": torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)}
    for i, metadata in enumerate([{"format": "pt"}, None]):
        source = tmp_path / str(i)
        source.mkdir()
        save_file(odd, source / "model.safetensors", metadata)
        found = checkpoint.Checkpoint(source)
        checkpoint.write(found, tmp_path / "out", found.read, {})
        assert files(tmp_path / "out") == files(source)


def test_a_run_in_another_dtype_gives_a_checkpoint_in_it(tmp_path):
    """A float32 run on bfloat16 files and the reverse, some weights frozen: as loaded and saved."""
    for stored, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        place = tmp_path / str(dtype)
        kind = type(base(place / "base", dtype=stored, max_shard_size="10KB"))
        model = loaded(place / "base", kind, dtype)
        tune(copy.deepcopy(model), place / "run.mezo", keep=lambda name: "fc1" in name)
        replay_checkpoint(place / "run.mezo", place / "base", place / "out")
        trajectory.replay(place / "run.mezo", model)
        model.save_pretrained(place / "expected")
        assert same(weights(place / "out"), weights(place / "expected"))
        config, index = (
            json.loads((place / "out" / name).read_text())
            for name in ("config.json", checkpoint.INDEX)
        )
        assert config["dtype"] == str(dtype).removeprefix("torch.")
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.parameters())
        save_file(weights(place / "out"), place / "again.safetensors")
        again = loaded(place / "out", kind)
        assert same(dict(model.named_parameters()), dict(again.named_parameters()))


def test_only_what_was_trained_may_have_been_cast(tmp_path):
    """Trained in float32 on a base left in bfloat16: the frozen weights are copied."""
    model = base(tmp_path / "base", dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data = p.data.float()
    twin = copy.deepcopy(model)
    log, keep = tmp_path / "run.mezo", lambda name: "norm" in name
    optimizer = MeZO([(n, p) for n, p in twin.named_parameters() if keep(n)], lr=1e-2, seed=3)
    with trajectory.record(optimizer, log, model=twin):
        optimizer.step(lambda: sum(float(p.double().square().sum()) for p in twin.parameters()))
    replay_checkpoint(log, tmp_path / "base", tmp_path / "out")
    found, expected = weights(tmp_path / "out"), trajectory.replay(log, model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert {t.dtype for t in found.values()} == {torch.float32, torch.bfloat16}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A base in shards, in `base`, and a run of its norms, run.mezo."""
    folder = tmp_path_factory.mktemp("shards")
    model = base(folder / "base", max_shard_size="20KB")
    tune(model, folder / "run.mezo", keep=lambda name: "norm" in name)
    return folder


def test_no_steps_give_the_base(tuned, tmp_path):
    assert replay_checkpoint(tuned / "run.mezo", tuned / "base", tmp_path, until=0) == 0
    assert same(weights(tmp_path), weights(tuned / "base"))
    replay_checkpoint(tuned / "run.mezo", tuned / "base", tmp_path, until=2)
    two = weights(tmp_path)
    assert not same(two, weights(tuned / "base"))
    replay_checkpoint(tuned / "run.mezo", tuned / "base", tmp_path)
    assert not same(two, weights(tmp_path))


SHARD = "model-00002-of-00003.safetensors"


def changed(name):
    def change(folder):
        rows = load_file(folder / SHARD)
        key = next(key for key in rows if name in key)
        rows[key] = rows[key] + 1
        save_file(rows, folder / SHARD, {"format": "pt"})

    return change


def index_with(name):
    def change(folder):
        index = json.loads((folder / checkpoint.INDEX).read_text())
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)
        (folder / checkpoint.INDEX).write_text(json.dumps(index))

    return change


def without_index(folder):
    (folder / checkpoint.INDEX).unlink()


def reshaped(folder):
    rows = {key: tensor[:8] for key, tensor in load_file(folder / SHARD).items()}
    save_file(rows, folder / SHARD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("norm"), "another base model: sha256 of"),
        (changed("fc1"), "kept frozen are not those"),
        (reshaped, r"norm.* is F32 of shape \[8\], the log has float32 of shape \[16\]"),
        (without_index, r"no model\.safetensors: its weights must be safetensors"),
        (index_with("../../x.safetensors"), r"has no \.\./\.\./x\.safetensors"),
        (index_with(3), "has no weight_map"),
        (lambda f: (f / checkpoint.INDEX).write_text("{}"), "has no weight_map"),
        (lambda f: (f / SHARD).unlink(), f"has no {SHARD}"),
        (lambda f: os.truncate(f / SHARD, 2000), SHARD),
        (lambda f: (f / SHARD).write_bytes(b"{}"), SHARD),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter"),
        (shutil.rmtree, "is not a folder with a checkpoint"),
    ],
)
def test_a_wrong_base_is_refused_before_anything_is_written(tuned, tmp_path, change, message):
    shutil.copytree(tuned / "base", tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(InputError, match=message) as caught:
        replay_checkpoint(tuned / "run.mezo", tmp_path / "base", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_wrong_call_is_refused(tuned, tmp_path):
    log, folder = tuned / "run.mezo", tuned / "base"
    with pytest.raises(InputError, match="is the base model's own folder"):
        replay_checkpoint(log, folder, folder / ".." / "base")
    with pytest.raises(InputError, match="has 3 steps, until must be from 0 to 3, got 4"):
        replay_checkpoint(log, folder, tmp_path, until=4)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: File exists"):
        replay_checkpoint(log, folder, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model-00009-of-00009.safetensors").write_text("")
    with pytest.raises(InputError, match="has weights of another model: model-00009"):
        replay_checkpoint(log, folder, tmp_path / "other")


def test_verify_false_takes_any_base_of_the_right_shape(tuned, tmp_path):
    shutil.copytree(tuned / "base", tmp_path / "base")
    changed("norm")(tmp_path / "base")
    replay_checkpoint(tuned / "run.mezo", tmp_path / "base", tmp_path / "out", verify=False)
    assert not same(weights(tmp_path / "base"), weights(tmp_path / "out"))


def test_what_is_cut_off_does_not_look_finished(tuned, tmp_path):
    """Whatever stops it: nothing new is there, and what was there before is whole."""

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay_checkpoint(tuned / "run.mezo", tuned / "base", tmp_path, progress=stop)
    assert not list(tmp_path.iterdir())
    replay_checkpoint(tuned / "run.mezo", tuned / "base", tmp_path)
    before = files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        replay_checkpoint(tuned / "run.mezo", tuned / "base", tmp_path, until=1, progress=stop)
    assert files(tmp_path) == before


def test_the_config_is_renamed_last(tuned, tmp_path, monkeypatch):
    """Stopped between two renames, the folder has no config.json, old or new."""
    replay_checkpoint(tuned / "run.mezo", tuned / "base", tmp_path)
    seen, replace = [], os.replace

    def recording(source, target):
        seen.append(Path(target).name)
        assert not (tmp_path / "config.json").exists()
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", recording)
    replay_checkpoint(tuned / "run.mezo", tuned / "base", tmp_path)
    assert seen[-2:] == [checkpoint.INDEX, "config.json"]


def test_a_slice_of_a_tensor_is_replayed_as_in_the_whole(tuned):
    """Any rows, any order of tensors, any number of threads: z is a function of the element."""
    log = trajectory.read(tuned / "run.mezo")
    (moves,) = trajectory.program.program_of(log.header, log.steps, 0).actions
    whole = torch.randn(300, 701, generator=torch.Generator().manual_seed(0))
    slices, key, before = whole.clone(), noise.tensor_key(6, "weight"), torch.get_num_threads()
    noise.apply_(whole, key, moves)
    try:
        for threads, rows in ((3, slice(123, 300)), (1, slice(7, 123)), (2, slice(0, 7))):
            torch.set_num_threads(threads)
            noise.apply_(slices[rows], key, moves, offset=rows.start * 701)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(slices, whole)


def test_replay_cannot_go_back():
    """One step makes one number of two: which of them it was is not in the log."""
    move, one = noise.Move(0, 0, 1.0, 1e-3), torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    n = 1000
    bases = torch.ones(n), one.expand(n).clone()
    ends = [start.clone() for start in bases]
    for end in ends:
        noise.apply_(end, noise.tensor_key(6, "weight"), [move])
    assert not bool((bases[0] == bases[1]).any())
    assert bool((ends[0] == ends[1]).any())


MEMORY = """
import sys
from mezo.memory.measured import PeakMemory
from mezo.trajectory import replay_checkpoint
replay_checkpoint(*sys.argv[1:4])  # small: what is imported and compiled once does not count
with PeakMemory() as peak:
    replay_checkpoint(*sys.argv[4:])
print(peak.bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark cannot be reset")
def test_the_memory_is_that_of_a_tensor(tmp_path):
    """8 tensors of 32 MB in two files, two of them trained: less than 3 above the start."""
    argv = []
    for name, rows in (("small", 1), ("large", 1024)):
        folder, tensors = (
            tmp_path / name,
            {f"t{i}": torch.full((rows, 8192), 0.5) for i in range(8)},
        )
        folder.mkdir()
        for i in range(2):
            half = dict(list(tensors.items())[4 * i : 4 * i + 4])
            save_file(half, folder / f"{i}.safetensors")
        index = {"weight_map": {f"t{i}": f"{i // 4}.safetensors" for i in range(8)}}
        (folder / checkpoint.INDEX).write_text(json.dumps(index))
        trained = [(name, tensors[name].requires_grad_()) for name in ("t1", "t6")]
        optimizer = MeZO(trained, lr=1e-3, seed=3, distribution="rademacher")
        with trajectory.record(optimizer, tmp_path / f"{name}.mezo"):
            first = tensors["t1"].detach()[0]
            optimizer.step(lambda first=first: float(first.sum()))
        argv += [tmp_path / f"{name}.mezo", folder, tmp_path / f"{name} out"]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, argv)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 3 * 2**25, done.stdout
    assert same(weights(argv[-1]), {key: tensor.detach() for key, tensor in tensors.items()})
