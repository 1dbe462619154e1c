"""A reward function as the objective: text is sampled, a program judges it, no gradient exists.

Runs offline in seconds: a small language model learns to use short words. The function is
what TRL's GRPOTrainer takes; under the Trainer it goes into MeZOPolicyTrainer(reward_funcs=...).
"""

from mezo import Generation, MeZO, rewards
from mezo.models.arguments import ModelArguments
from mezo.models.loading import load
from mezo.models.trainable import select

model, tokenizer = load(ModelArguments("causal-lm"))
prompts = ["This film", "I went to see", "The plot", "My wife and I", "It", "The actors"] * 4


def short_words(completions, **kwargs) -> list[float]:
    texts = [text.split() for text in completions]
    return [-sum(map(len, words)) / len(words) if words else None for words in texts]


select(model, r"bias|layer_norm")
optimizer = MeZO(model.named_parameters(), lr=6e-3, eps=3e-2, seed=0)
generation = Generation(max_new_tokens=12, temperature=1.0)
judge = rewards.RewardFunctions(short_words)


def show() -> None:
    found = rewards.sample(model, tokenizer, prompts, judge, generation, draw=2**31)
    print(f"{prompts[0] + found.completions[0].text!r}: reward {found.scores.mean:.3f}")


show()
for step in range(20):
    optimizer.step(rewards.closure(model, tokenizer, prompts, judge, generation, draw=step))
show()
