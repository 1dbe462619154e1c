"""From prompts to a loss: generate, score, minus the mean; and the count of ties.

    loss = -mean reward        projected_grad = (reward_minus - reward_plus) / (2 eps)

A tie, reward_plus = reward_minus, changes no weight: the step was for nothing. Rewards that take
few values tie often, and less the more prompts there are in a batch.
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
    """Completions of a batch of prompts, and what they were worth."""

    prompts: list[Prompt]
    completions: list[Completion]
    scores: Scores

    @property
    def loss(self) -> float:
        """Minus the mean reward; nan, which refuses the update, if nothing has a reward."""
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
    """Generate a completion a prompt and score it, with the weights as they are.

    Args:
        prompts: texts, or conversations, put into words by the tokenizer's chat template.
        columns: for the reward functions: name -> one value a prompt.
        draw, batch_size: see `generate`.
    """
    functions = _functions(reward_funcs)
    tokens = _worded(tokenizer, prompts)
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
    """The loss of one step, for `MeZO.step`: minus the mean reward of `prompts`.

    Both calls within a step generate with the same noise; give every step another `draw`, or it is
    the same noise again. `on_sample` is told of what each call generated. Make the RewardFunctions
    once if some are async or commands: it is they that keep the event loop and the processes.
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


def _worded(tokenizer, prompts: Sequence[Prompt]) -> list[str] | list[list[int]]:
    """Texts as they are; conversations as the tokens of the chat template, the answer begun."""
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
