"""The commands with --engine vllm, from end to end on tiny models; `make test-vllm` runs them."""

import json

import pytest
import transformers
from folders import OWN, mezo, reviews
from tiny_tokenizers import byte_bpe
from vllm_models import SHAPE, saved

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

SMALL = {"max_model_len": 128, "max_num_seqs": 16, "gpu_memory_utilization": 0.2}
SMALL |= {"distributed_executor_backend": "uni", "enforce_eager": True}
VLLM = ["--engine", "vllm", "--engine_options", json.dumps(SMALL)]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def refused(capsys, *words):
    """The last line of a command that is refused; vLLM's own log may stand above it."""
    code, out, err = mezo(capsys, *words)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()[-1:]
    assert line.startswith("mezo: ")
    return line


def test_an_evaluation_in_vllm_is_that_of_transformers(tmp_path, capsys):
    """The same metric and, within 2e-3, the same loss; a tuned model's weights are given to it."""
    saved("llama", tmp_path / "model")
    rows = reviews(tmp_path / "reviews.jsonl")
    asked = ["eval", "--model", tmp_path / "model", "--test_file", rows, *OWN, "--json"]
    (_, plain, _), (code, served, err) = mezo(capsys, *asked), mezo(capsys, *asked, *VLLM)
    assert code == 0, err
    plain, served = json.loads(plain), json.loads(served)
    assert served["accuracy"] == plain["accuracy"]
    assert served["loss"] == pytest.approx(plain["loss"], abs=2e-3)
    assert served["n"] == plain["n"] == 24


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        (["--engine", "vlm"], "engine must be one of transformers, vllm, got 'vlm'"),
        (["--engine", "vllm", "--engine_options", "{"], "engine_options is not JSON"),
        (
            ["--engine", "vllm", "--engine_options", '{"tensor_paralel_size": 2}'],
            "vLLM has no option tensor_paralel_size; did you mean tensor_parallel_size?",
        ),
        (["--engine", "vllm", "--engine_options", '{"quantization": "fp8"}'], "no weights of full"),
    ],
)
def test_a_typo_is_one_line(engine, told, tmp_path, capsys):
    saved("llama", tmp_path / "model")
    rows = reviews(tmp_path / "reviews.jsonl")
    asked = ["eval", "--model", tmp_path / "model", "--test_file", rows, *OWN]
    assert told in refused(capsys, *asked, *engine)


@pytest.mark.slow
def test_a_model_that_is_fused_otherwise_is_refused_before_a_step(tmp_path, capsys):
    """Phi-3's files have query, key and value in one tensor, which no worker knows to split."""
    config = transformers.Phi3Config(**SHAPE, vocab_size=len(byte_bpe()), pad_token_id=0)
    transformers.Phi3ForCausalLM(config).float().save_pretrained(tmp_path / "model")
    byte_bpe().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"the film {i}"} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rules.py").write_text(
        "def short(completions, **k): return [1.0] * len(completions)"
    )
    given = {"model": tmp_path / "model", "train_file": tmp_path / "prompts.jsonl", "max_steps": 2}
    given |= {"reward": f"{tmp_path}/rules.py:short", "output_dir": tmp_path / "run", "use_cpu": 1}
    given |= {"learning_rate": 1e-3, "max_completion_length": 4}
    words = [f"--{name}={value}" for name, value in given.items()]
    line = refused(capsys, "train", *words, *VLLM)
    assert "part qkv_proj of a fused query, key and value layer is not mapped" in line
    assert not list((tmp_path / "run").glob("*.safetensors"))
