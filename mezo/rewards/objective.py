"""The loss of a batch of prompts: generate, score, and take minus the mean reward.

    loss = -mean reward        projected_grad = (reward_minus - reward_plus) / (2 eps)

A tie, reward_plus = reward_minus, changes no weight, so that the step is wasted. Rewards with few
distinct values tie often; larger batches tie less often.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mezo.errors import InputError
from mezo.objectives.generation import Completion, Generation, generate
from mezo.record import Record
from mezo.rewards.functions import Prompt, RewardFunc, RewardFunctions, Scores, is_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Sampled:
    """The completions of a batch of prompts, and their rewards."""

    prompts: list[Prompt]
    completions: list[Completion]
    scores: Scores

    @property
    def loss(self) -> float:
        """Minus the mean reward, or nan, which refuses the update, if no sample has a reward."""
        if all(value is None for value in self.scores.total):
            logging.getLogger("mezo").warning(
                "no reward function scored any of %d completions", len(self.completions)
            )
        return -self.scores.mean


def sample(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    reward_funcs: RewardFunctions | RewardFunc | Sequence[RewardFunc],
    generation: Generation,
    *,
    columns: Columns | None = None,
    draw: int = 0,
    batch_size: int | None = None,
    trainer_state: Any = None,
) -> Sampled:
    """Generate one completion per prompt with the present weights, and score them.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts, or conversations, which the tokenizer's chat template renders.
        reward_funcs: One or several reward functions.
        generation: How to generate.
        columns: Further columns for the reward functions: name -> one value per prompt.
        draw, batch_size: See `generate`.
        trainer_state: Passed on to the reward functions.

    Raises InputError as `generate` and `RewardFunctions` do.
    """
    functions = _functions(reward_funcs)
    tokens = worded(tokenizer, prompts)
    made = generate(model, tokenizer, tokens, generation, batch_size=batch_size, draw=draw)
    scores = functions(prompts, made, columns, trainer_state=trainer_state)
    return Sampled(list(prompts), made, scores)


def closure(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    reward_funcs: RewardFunctions | RewardFunc | Sequence[RewardFunc],
    generation: Generation,
    *,
    weights: Sequence[float] | None = None,
    columns: Columns | None = None,
    draw: int = 0,
    batch_size: int | None = None,
    on_sample: Callable[[Sampled], None] | None = None,
) -> Callable[[], float]:
    """Return a closure for `MeZO.step`, whose loss is minus the mean reward of `prompts`.

    Both calls within a step generate with the same noise. Pass another `draw` in every step, or the
    noise repeats. If reward functions are async or commands, create the RewardFunctions once and
    pass them, because they own the event loop and the processes.

    Args:
        weights: Weights of the reward functions; default: 1 each.
        on_sample: Called with what each call of the closure generated.

    The other arguments are those of `sample`. Raises InputError as `sample` does.
    """
    if weights is not None and isinstance(reward_funcs, RewardFunctions):
        raise InputError("weights are RewardFunctions' own: RewardFunctions(functions, weights)")
    functions = _functions(reward_funcs, weights)
    options: dict[str, Any] = {"columns": columns, "draw": draw, "batch_size": batch_size}

    def loss() -> float:
        sampled = sample(model, tokenizer, prompts, functions, generation, **options)
        if on_sample is not None:
            on_sample(sampled)
        return sampled.loss

    loss.looks = False  # type: ignore[attr-defined]  # two more calls would generate text
    return loss


class Ties:
    """Counts estimates whose two rewards were equal; `optimizer.observers.append(Ties())`."""

    def __init__(self) -> None:
        self.estimates = self.ties = 0

    def __call__(self, record: Record) -> None:
        for projected_grad in record.projected_grads:
            self.add(projected_grad)

    def add(self, projected_grad: float) -> None:
        self.estimates += 1
        self.ties += projected_grad == 0


def _functions(
    given: RewardFunctions | RewardFunc | Sequence[RewardFunc],
    weights: Sequence[float] | None = None,
) -> RewardFunctions:
    return given if isinstance(given, RewardFunctions) else RewardFunctions(given, weights)


def worded(tokenizer, prompts: Sequence[Prompt]) -> list[str] | list[list[int]]:
    """Return texts as they are, and conversations as tokens of the chat template for an answer."""
    kinds = {is_conversation(prompt) for prompt in prompts}
    if kinds == {True, False}:
        raise InputError("prompts are all texts or all conversations")
    if kinds != {True}:
        return [str(prompt) for prompt in prompts]
    if not tokenizer.chat_template:
        raise InputError(
            "the prompts are conversations, and the tokenizer has no chat template: give texts"
        )
    options = {"add_generation_prompt": True, "tokenize": False}
    texts = [tokenizer.apply_chat_template(list(prompt), **options) for prompt in prompts]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
