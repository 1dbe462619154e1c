"""Which weights a preset finds, by what modules are and not by what they are called."""

import pytest
import torch
from folders import mezo, model_folder, reviews, training
from models import tiny_model

from mezo.errors import InputError
from mezo.models import trainable


def chosen(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_biases_and_norms_of_a_masked_model_have_the_norms_weights():
    """'bias$|norm' misses LayerNorm.weight of BERT and RoBERTa, for its capitals."""
    model = tiny_model("roberta", 100)
    trainable.select(model, "biases_and_norms")
    found = chosen(model)
    assert any(name.endswith("LayerNorm.weight") for name in found)
    assert "lm_head.layer_norm.weight" in found
    expected = {n for n, p in model.named_parameters() if "layernorm" in n.lower().replace("_", "")}
    expected |= {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert found == expected


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "bert"])
def test_norms_are_found_by_their_modules(kind):
    """gpt2 calls them ln_1, llama input_layernorm; llama's have no bias, and the model none."""
    model = tiny_model(kind, 100)
    count = trainable.select(model, "norms")
    norms = [m for m in model.modules() if type(m).__name__.endswith(("LayerNorm", "RMSNorm"))]
    assert count == sum(p.numel() for m in norms for p in m.parameters()) > 0
    trainable.select(model, "biases_and_norms")
    assert chosen(model) >= {n for n, _ in model.named_parameters() if n.endswith(".bias")}


def test_a_model_without_biases_says_so():
    with pytest.raises(InputError, match="trainable biases: LlamaForCausalLM has none"):
        trainable.select(tiny_model("llama", 100), "biases")
    with pytest.raises(InputError, match="trainable biases_and_norms: Linear has none"):
        trainable.select(torch.nn.Linear(2, 2, bias=False), "biases_and_norms")


def test_a_run_says_how_much_it_trains(tmp_path, capsys):
    """One line: an expression that finds less than was meant is seen before hours are spent."""
    model_folder(tmp_path / "tiny")
    reviews(tmp_path / "reviews.jsonl")
    argv = training(tmp_path, tmp_path / "tiny", max_steps=1, eval_steps=1, save_steps=1)
    code, _, err = mezo(capsys, "train", *argv, "--trainable", "norms")
    assert code == 0
    model = tiny_model("opt", 400)
    trainable.select(model, "norms")
    (line,) = [line for line in err.splitlines() if line.startswith("trainable ")]
    tensors = len(chosen(model))
    assert line.startswith(f"trainable norms: {tensors} tensors, {16 * tensors} of ")
