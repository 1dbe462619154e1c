"""Models whose weights stay in their files."""

import pytest
import torch
from offloading import WORDS, made, same
from transformers import AutoModelForCausalLM

from mezo.offload.context import load_offloaded


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "mixtral"])
def test_models_are_loaded_by_mapping_their_shards(tmp_path, name):
    """As from_pretrained loads them, buffers, ties and renamed weights included."""
    model = made(name, torch.bfloat16)
    model.save_pretrained(tmp_path / "m", max_shard_size="8KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    found = load_offloaded(tmp_path / "m", folder=tmp_path / "experts")
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in expected.named_parameters()]
    assert same(found, expected)
    with torch.no_grad():
        assert torch.equal(found(WORDS).logits, expected(WORDS).logits)
    assert not any(hasattr(module, "_hf_hook") for module in found.modules())
    found.save_pretrained(tmp_path / "again")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), expected)


@pytest.mark.parametrize("folder", [None, "converted"])
def test_weights_of_another_dtype_are_converted(tmp_path, folder):
    """In memory, or in files that need no name: nothing is left of them."""
    made("opt").save_pretrained(tmp_path / "m")
    folder = folder and tmp_path / folder
    found = load_offloaded(tmp_path / "m", dtype=torch.bfloat16, folder=folder)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert same(found, expected)
    assert folder is None or not list(folder.iterdir())
