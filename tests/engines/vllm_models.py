"""Models that vLLM knows, small and random."""

import torch
import transformers
from tiny_tokenizers import byte_bpe

SHAPE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128}
KINDS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        {"tie_word_embeddings": True},
    ),
}


def saved(kind, folder):
    """A random model: fused matrices, biases (Qwen), a tied head (Qwen), grouped heads."""
    tokenizer, (model_class, config_class, more) = byte_bpe(), KINDS[kind]
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        config = config_class(**SHAPE, vocab_size=len(tokenizer), initializer_range=0.1, **more)
        model = model_class(config).float().eval()
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer
