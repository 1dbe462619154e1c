"""The benchmark of a GPU runs here with tiny models: its first run there is likely to be right."""

import json
import math
import subprocess

import pytest

from benchmarks import gpu, overhead

QUICK = [
    "replay",
    "noise",
    "all_at_once",
    "floors_small",
    "profile_small",
    "memory_small",
    "together",
]


def test_the_sections_run_and_the_json_is_written_after_each(tmp_path, monkeypatch, capsys):
    """A section that fails is told and keeps none of the others."""

    def broken(plan):
        raise RuntimeError("no such device")

    monkeypatch.setitem(gpu.SECTIONS, "offload", broken)
    plan = gpu.Plan(**gpu.DRY | {"elements": 2**10, "small_sizes": ((1, 5),)})
    found = gpu.run(plan, ["offload", *QUICK], tmp_path / "gpu.json")
    assert json.loads((tmp_path / "gpu.json").read_text()).keys() == found.keys()
    assert found["offload"] == {"failed": "RuntimeError('no such device')"}
    assert not [name for name in QUICK if "failed" in found[name]]
    assert found["replay"] == {"gaussian": True, "rademacher": True, "gaussian16": True}
    assert found["floors_small"]["1x5"]["stacked"] > 0
    assert found["profile_small"]["scratch, gaussian16"]["kernels"]
    assert [row["stacked"] for rows in found["together"].values() for row in rows] == [True, True]
    assert "no such device" in capsys.readouterr().out


def test_the_step_in_vllm_is_told_beside_the_step_here(monkeypatch, capsys):
    """vLLM runs in a process of its own; its line of JSON is read, and both aims are judged."""
    line = json.dumps({"share": 0.9, "seconds_of_a_step": 0.02, "samples_per_second": 5.0})
    done = subprocess.CompletedProcess([], 0, f"vLLM talks\n{line}\n", "")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *given, **how: done)
    found = gpu.engine(gpu.Plan(**gpu.DRY))
    assert found["share"] == 0.9
    assert found["seconds_of_a_step_here"] > 0
    out = capsys.readouterr().out
    assert "90.0 % of a step is scoring (the aim is 85 %); a step takes 20.00 ms" in out
    done.returncode, done.stderr = 1, "Traceback\nmezo: vLLM is not there\n"
    with pytest.raises(RuntimeError, match="mezo: vLLM is not there"):
        gpu.engine(gpu.Plan(**gpu.DRY))


def test_a_section_begins_only_while_there_is_time(tmp_path, capsys):
    plan = gpu.Plan(**gpu.DRY | {"budget": 0.0})
    found = gpu.run(plan, ["replay"], tmp_path / "gpu.json")
    assert "replay" not in found
    assert "no time is left for replay" in capsys.readouterr().out


def test_without_a_device_the_command_says_what_runs_here(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no CUDA device; --dry runs tiny models" in capsys.readouterr().err


def test_overhead_is_measured_for_every_form():
    found = overhead.measure(1, layers=1)
    assert found["tensors"] == 20
    assert found["us_a_tensor"].keys() == set(overhead.FORMS)
    assert all(map(math.isfinite, found["us_a_tensor"].values()))
