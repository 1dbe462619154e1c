"""GGUF files in miniature, written with the package gguf as llama.cpp's converter writes them."""

import json

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tiny_tokenizers import byte_bpe
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SHAPE |= {"max_position_embeddings": 128, "initializer_range": 0.2}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}  # whole K blocks
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "n_inner": None}
GEMMA = {"query_pre_attn_scalar": 256}  # the configs' own, which the file does not have
GGUF_NAMES = {"gemma3_text": "gemma3"}


def tiny_causal_model(name, **changes):
    """A random model with rotary base, norms and biases that are not the defaults."""
    shape = GPT2 if name == "gpt2" else SHAPE
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    given = shape | ({} if name == "gpt2" or name.startswith("gemma3") else rope)
    given |= GEMMA if name.startswith("gemma") else {}
    given |= {"vocab_size": len(byte_bpe()), "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name, **(given | {"pad_token_id": 0} | changes))
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for p in model.parameters():
            if p.dim() == 1:
                p.data.add_(torch.randn_like(p) * 0.1)
    return model


def blocks_of(weight, kind):
    """The weight as bytes of `kind`, row by row; random ones where gguf cannot quantise."""
    try:
        return gguf.quantize(weight.numpy(), kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = weight.shape[0], weight.shape[1] // block * size
        # bytes so small that every half precision number in a block is finite, and below 0.13
        return np.random.default_rng(0).integers(0, 0x30, shape, dtype=np.uint8)


def write_gguf(path, model, kind=Kind.F32, *, embedding=None, pre="default", **extra):
    """Write the model with its matrices as `kind`; in `model` they become what the file has.

    `embedding` is another kind for the embedding. `extra` are more keys, or in the place of those
    written: `{"general.alignment": 64}`; None leaves one out.
    """
    config = model.config
    arch = GGUF_NAMES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    values = _values(config, arch) | _tokenizer(pre, arch) | extra
    for key, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](key, value)
    number = next(n for n, known in gguf.MODEL_ARCH_NAMES.items() if known == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, p in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        here = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert here is not None, name
        one = embedding if embedding is not None and "embd" in here else kind
        _write(writer, here, p, one if p.dim() == 2 else Kind.F32, config, arch)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write(writer, name, p, kind, config, arch):
    turned = arch == "gpt2" and p.dim() == 2 and name.startswith("blk.")
    weight = p.data.T.contiguous() if turned else p.data
    if p.dim() == 1:
        stored = weight.numpy() + (1 if arch.startswith("gemma") else 0)
        if arch.startswith("gemma"):
            p.data.copy_(torch.from_numpy(stored - 1))
        return writer.add_tensor(name, stored)
    data = blocks_of(weight, kind)
    rounded = torch.from_numpy(np.array(gguf.dequantize(data, kind), np.float32))
    p.data.copy_(rounded.T if turned else rounded)
    if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
        query = ".attn_q." in name
        heads = config.num_attention_heads if query else config.num_key_value_heads
        rows = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
        data = rows.swapaxes(1, 2).reshape(data.shape)
    writer.add_tensor(name, data, raw_dtype=kind)


def _values(config, arch):
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    if arch == "gpt2":
        found["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    else:
        found |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "attention.key_length": config.head_dim if arch != "qwen2" else None,
            "rope.dimension_count": config.head_dim if arch == "llama" else None,
        }
        rope = config.rope_parameters
        rope = rope.get("full_attention", rope)
        found["rope.freq_base"] = float(rope["rope_theta"])
    if arch.startswith("gemma"):
        found["attention.sliding_window"] = config.sliding_window
    return {f"{arch}.{key}": value for key, value in found.items()}


def _tokenizer(pre, arch):
    known = json.loads(byte_bpe().backend_tokenizer.to_str())["model"]
    tokens = sorted(known["vocab"], key=known["vocab"].get)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in known["merges"]]
    ends = {token for token in tokens[:5] if token.startswith("<")}
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in ends else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    if arch.startswith("gemma"):  # sentencepiece: scores, and no merges
        scores = [-float(i) for i in range(len(tokens))]
        found |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
        found |= {"tokenizer.ggml.merges": None}
    return found
