"""Text from a causal language model; both passes of an estimate differ in their weights alone.

    token(row, t) = argmax over tokens v of  logit_v / temperature + G(seed, draw, row, t, v)

With G = -log(-log u) of uniforms u this is a sample of softmax(logits / temperature) (Gumbel, 1954;
Maddison et al., 2014). u comes from the counter-based generator of `noise` and depends on the five
numbers alone, which makes common random numbers. Where theta + eps z and theta - eps z give similar
logits, they sample the same token, so that the difference of two rewards is due to the weights and
not to chance. Neither the batch size nor the order of prompts changes what a row samples, and none
of torch's generators is used. Temperature 0 leaves G out, which is greedy decoding.

The loop over tokens, its key-value cache and its positions are `model.generate`'s own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from mezo.errors import InputError
from mezo.models.modes import evaluating, unwrap
from mezo.noise import tensor_key
from mezo.noise.definition import philox
from mezo.objectives.progress import SILENT, Progress
from mezo.objectives.tokens import stack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompts = Sequence[str] | Sequence[Sequence[int]]  # texts, or the tokens of each


@dataclass(frozen=True)
class Generation:
    """How text is generated. Raise InputError for a value outside its domain.

    Args:
        max_new_tokens: limit of a completion in tokens, at least 1.
        min_new_tokens: how many tokens come before the end-of-text token is allowed.
        stop: strings that end a completion; they and what follows are cut off its text.
        temperature: 0 is greedy; 1 samples the model's own distribution.
        top_p, top_k: sample only from the fewest tokens that hold this probability (1: all), from
            this many of the likeliest (0: all). They do not affect a greedy choice.
        seed: of the samples, in [0, 2^64).
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise InputError(f"stop is a tuple of strings: ({self.stop!r},)")
        object.__setattr__(self, "stop", tuple(self.stop))  # a list, from JSON or YAML
        if not self.max_new_tokens >= 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            limit = f"from 0 to max_new_tokens, {self.max_new_tokens}"
            raise InputError(f"min_new_tokens must be {limit}, got {self.min_new_tokens}")
        if not all(self.stop):
            raise InputError("a stop string must not be empty")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not self.top_k >= 0:
            raise InputError(f"top_k must not be negative, got {self.top_k}")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must be in [0, 2^64), got {self.seed}")


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    ids: tuple[int, ...]  # every token it made, the end-of-text token or the stop string's included
    text: str  # without special tokens, cut before the stop string
    finished: bool  # it ended by itself or at a stop string, not at max_new_tokens


def generate(
    model: torch.nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Prompts,
    settings: Generation,
    *,
    batch_size: int | None = None,
    draw: int = 0,
    progress: Progress = SILENT,
) -> list[Completion]:
    """Return one completion per prompt, in order. Modes and generators are left as they were.

    Args:
        model: any causal model of transformers, or peft's wrapper of one.
        prompts: texts, tokenised as the tokenizer does, or lists of token ids, taken as they are.
        batch_size: prompts at a time, those of similar length together; None: all. But for
            rounding, rows are the same in any batch.
        draw: number of the sample, in [0, 2^32); another number gives other samples. Row r is
            sampled with the noise of (settings.seed, draw, r), whatever the prompt.
        progress: is told of the batches.

    Raise InputError for a prompt without tokens, or one too long for the model.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= draw < 2**32:
        raise InputError(f"draw must be in [0, 2^32), got {draw}")
    rows = tokens_of(tokenizer, prompts)
    _check_lengths(model, rows, settings)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    size = batch_size or max(len(rows), 1)
    found: dict[int, Completion] = {}
    with evaluating(model):
        for start in progress.over(range(0, len(order), size), "batch of texts"):
            chosen = order[start : start + size]
            made = _batch(model, tokenizer, rows, chosen, settings, draw)
            found |= dict(zip(chosen, made, strict=True))
    return [found[i] for i in range(len(rows))]


def tokens_of(tokenizer, prompts: Prompts) -> list[list[int]]:
    """Return the tokens of each prompt, without the end token that a tokenizer
    puts after a text."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts and len(texts) < len(prompts):
        raise InputError("prompts are all texts or all lists of token ids")
    rows: list[Any] = [list(prompt) for prompt in prompts]
    if texts:
        encoded = tokenizer(texts, return_special_tokens_mask=True, verbose=False)
        rows = encoded["input_ids"]
        for ids, special in zip(rows, encoded["special_tokens_mask"], strict=True):
            while len(ids) > 1 and special[len(ids) - 1]:
                ids.pop()
    return rows


def _check_lengths(model, rows: list[list[int]], settings: Generation) -> None:
    limit = getattr(unwrap(model).config, "max_position_embeddings", None)
    for i, ids in enumerate(rows):
        if not ids:
            raise InputError(f"prompt {i} has no tokens: a model begins from at least one")
        if limit and len(ids) + settings.max_new_tokens > limit:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens, and with max_new_tokens "
                f"{settings.max_new_tokens} that is more than the model's {limit}: shorten it"
            )


def _batch(
    model, tokenizer, rows: list[list[int]], chosen: list[int], settings: Generation, draw: int
) -> list[Completion]:
    batch = [rows[i] for i in chosen]
    weight: Any = unwrap(model).get_input_embeddings().weight
    device = unwrap(model).device if weight.is_meta else weight.device  # offloaded: its hooks know
    ids = stack(batch, tokenizer.pad_token_id or 0, "left").to(device)
    mask = stack([[1] * len(row) for row in batch], 0, "left").to(device)
    ends = _Ends(tokenizer, end_tokens(model, tokenizer), settings.stop, ids)
    # generate() reads the forms of sampling only where it samples itself, by torch's generator
    choose = [_Gumbel(settings, draw, chosen, ids.shape[1])] if settings.temperature else []
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=_config(tokenizer, settings, ends.ids),
        logits_processor=choose,
        stopping_criteria=[ends],
    )
    made = made[:, ids.shape[1] :].tolist()
    lengths = ends.lengths.tolist()
    return [ends.completion(row, length) for row, length in zip(made, lengths, strict=True)]


def end_tokens(model: torch.nn.Module, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's
    generation_config."""
    more = unwrap(model).generation_config.eos_token_id
    more = [more] if isinstance(more, int) else more or []
    return sorted({tokenizer.eos_token_id, *more} - {None})


def _config(tokenizer, settings: Generation, ends: list[int]) -> GenerationConfig:
    """Return greedy search over the model's logits, without the checkpoint's own sampling."""
    plain: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    plain |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True}
    plain |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or None,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id or 0,
        return_dict_in_generate=False,
        **plain,
    )


class _Gumbel(LogitsProcessor):
    """logits -> logits / temperature + G, and -inf for what top_k and top_p leave out."""

    def __init__(self, settings: Generation, draw: int, rows: list[int], prompt: int):
        self.settings, self.draw, self.rows, self.prompt = settings, draw, rows, prompt
        self.key = tensor_key(settings.seed, "mezo/generation")

    def __call__(self, input_ids, scores):
        settings, scores = self.settings, scores.float() / self.settings.temperature
        if settings.top_k:
            scores = TopKLogitsWarper(settings.top_k)(input_ids, scores)
        if settings.top_p < 1:
            scores = TopPLogitsWarper(settings.top_p)(input_ids, scores)
        rows = torch.tensor(self.rows, device=scores.device)
        place = input_ids.shape[1] - self.prompt
        return scores + gumbel(self.key, rows, place, scores.shape[1], self.draw)


def gumbel(
    key: tuple[int, int], rows: torch.Tensor, place: int, count: int, draw: int
) -> torch.Tensor:
    """Return standard Gumbel noise (rows, count) in float32, a function of its arguments alone.

    A token has 24 bits of u, so G is in [-2.9, 16.7]. The uniforms are equal on every device; the
    two logarithms are equal up to rounding.
    """
    blocks = torch.arange(-(-count // 4), device=rows.device)[None].expand(len(rows), -1)
    where = (blocks, torch.full_like(blocks, place), rows[:, None].expand_as(blocks))
    words = torch.stack(philox((*where, torch.full_like(blocks, draw)), key), dim=-1)
    u = (2 * (words.view(len(rows), -1)[:, :count] >> 9) + 1).float() * 2.0**-24  # in (0, 1)
    return -(-torch.log1p(-u)).log()  # of 1 - u: where G is large, u keeps all its digits


class _Ends(StoppingCriteria):
    """Notes the length at which each row ended, by a token or by a stop string."""

    def __init__(self, tokenizer, ids: list[int], stop: tuple[str, ...], prompts: torch.Tensor):
        self.tokenizer, self.ids, self.stop, self.prompt = tokenizer, ids, stop, prompts.shape[1]
        self.ending = torch.tensor(ids, dtype=torch.long, device=prompts.device)
        self.lengths = torch.zeros(len(prompts), dtype=torch.long, device=prompts.device)
        # a token is at least a byte; one more, as decoding may drop a space in front
        self.window = max((len(text.encode()) for text in stop), default=0) + 1

    def __call__(self, input_ids, scores, **kwargs):
        going, made = self.lengths == 0, input_ids.shape[1] - self.prompt
        ended = torch.isin(input_ids[:, -1], self.ending)
        if self.stop:
            tails = input_ids[:, max(self.prompt, input_ids.shape[1] - self.window) :]
            texts = {i: self.text(tails[i].tolist()) for i in going.nonzero().flatten().tolist()}
            stopped = [i for i, text in texts.items() if any(s in text for s in self.stop)]
            ended[stopped] = True
        self.lengths[going & ended] = made
        return self.lengths > 0

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def completion(self, ids: list[int], length: int) -> Completion:
        ids = ids[:length] if length else ids
        text = self.text(ids)
        cuts = [at for at in map(text.find, self.stop) if at >= 0]
        return Completion(tuple(ids), text[: min(cuts)] if cuts else text, length > 0)
