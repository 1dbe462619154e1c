"""MeZO in a plain PyTorch loop: a causal language model learns one sentence, no backward pass."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mezo import MeZO
from mezo.models.loading import causal_lm

folder = causal_lm()  # the embedded model; any name of the hub does, such as "facebook/opt-125m"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
optimizer = MeZO(model.named_parameters(), lr=3e-5, eps=1e-3, seed=0)

batch = tokenizer("the quick brown fox jumps over the lazy dog", return_tensors="pt")
for step in range(201):
    loss = optimizer.step(lambda: model(**batch, labels=batch["input_ids"]).loss)
    if step % 40 == 0:
        print(f"step {step:3}  loss {loss:.3f}")
