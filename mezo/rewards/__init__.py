"""Reward functions as the objective: any number that a program computes from generated text.

    closure = rewards.closure(model, tokenizer, prompts, short, Generation(40, temperature=1.0))
    optimizer.step(closure)                                   # two generations, no backward

The loss is minus the mean reward. A function is called exactly as TRL's GRPOTrainer calls it:

    def short(prompts, completions, completion_ids, **columns) -> list[float | None]:
        return [-len(ids) for ids in completion_ids]

so that what was written for GRPO runs here. Both halves of an estimate generate from the same
prompts with the same noise (`generation.py`). Nothing that was generated is ever executed.
"""

from mezo.rewards.command import Command
from mezo.rewards.functions import RewardFunc, RewardFunctions, Scores
from mezo.rewards.objective import Sampled, Ties, closure, sample
from mezo.rewards.resolve import resolve
from mezo.rewards.text import exact_match, token_f1

__all__ = ["Command", "RewardFunc", "RewardFunctions", "Sampled", "Scores", "Ties", "closure"]
__all__ += ["exact_match", "resolve", "sample", "token_f1"]
