"""Models and examples whose candidates share the tokens of their prompt."""

import torch
from models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from mezo.tasks import Example, Task

ROUNDING = 2.0**-24  # of float32
# Both ways sum in float32 what transformers normalises there (softmax of eager attention, norms,
# rotations), and the scores: some dozens of roundings of numbers of at most 10.
TOLERANCE = {torch.float64: 10 * 64 * ROUNDING, torch.float32: 10 * 1000 * ROUNDING}
CHOICE = Task(
    name="choice",
    version=1,
    source="this test",
    columns=("premise",),
    kind="multiple_choice",
    prompt="{premise} so",
    sfc_prompt=" so",
)
OWN = [
    (" the film was terrible", " a journey"),
    (" it was great", " it was never great", " wit", " no wit and only gags"),
    (" dull",),
]
PREMISES = ["a charming journey . It was", "no wit , only labored gags and no wit", "dull"]
EXAMPLES = [
    Example({"premise": p}, i % len(own), f"row {i}", candidates=own)
    for i, (p, own) in enumerate(zip(PREMISES, OWN, strict=True))
]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}
SMALL |= {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
SMALL |= {"max_position_embeddings": 64, "initializer_range": 0.3}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "experts_implementation": "eager"}
EAGER = ("bloom", "mpt", "gpt_neo")  # float64's least number is -inf in their float32 softmax
SHARING = {  # beside the four that are `tiny_model`s
    "qwen3": {},
    "mistral": {},
    "gemma": {},
    "gemma3_text": {},
    "phi": {"num_key_value_heads": 2},
    "phi3": {},
    "mixtral": EXPERTS,
    "gpt_neox": {},
}
APART = {  # what they are told of the tokens before is not by a mask, or not by positions
    "bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 2},
    "mamba": {"state_size": 4},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
}


def model_of(name, **more):
    if name in ("opt", "llama", "gpt2", "qwen2"):
        return tiny_model(name)
    shape = SMALL if name not in ("bloom", "mpt") else {"vocab_size": 400, "initializer_range": 0.3}
    config = AutoConfig.for_model(name, **(shape | {**SHARING, **APART}.get(name, {}) | more))
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    return model if name in EAGER else model.double()


def batch_of(form, examples=EXAMPLES):
    return form.collate([form.encode(example) for example in examples])
