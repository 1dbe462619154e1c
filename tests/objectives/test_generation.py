"""Generation: what is sampled depends on (seed, draw, row, position) and the weights alone."""

import math

import pytest
import torch
from models import tiny_model
from tiny_tokenizers import byte_bpe, unigram

from mezo.errors import InputError
from mezo.models.adapters import with_adapter
from mezo.models.arguments import ModelArguments
from mezo.noise import tensor_key
from mezo.objectives.generation import (
    Completion,
    Generation,
    _Gumbel,
    end_tokens,
    generate,
    gumbel,
)

PROMPTS = ["the film", "a charming journey . It was", "no", "boring movie"]
SAMPLED = Generation(8, temperature=1.0, seed=3)
NAMES = ("opt", "llama", "gpt2", "qwen2")


def pair(name="opt"):
    tokenizer = byte_bpe()
    return tiny_model(name, len(tokenizer)), tokenizer


def naive(model, tokenizer, prompt, settings, row, draw=0):
    """Token by token, without cache, padding or batch."""
    ids, made = list(tokenizer(prompt)["input_ids"]), []
    while len(made) < settings.max_new_tokens:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids + made])).logits[0, -1].float()
        if settings.temperature:
            key = tensor_key(settings.seed, "mezo/generation")
            noise = gumbel(key, torch.tensor([row]), len(made), len(scores), draw)
            scores = scores / settings.temperature + noise[0]
        made.append(int(scores.argmax()))
        if made[-1] in end_tokens(model, tokenizer):
            break
    return tuple(made)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [Generation(8), SAMPLED])
def test_the_cached_padded_batch_writes_what_a_plain_loop_writes(name, settings):
    model, tokenizer = pair(name)
    expected = [naive(model, tokenizer, p, settings, i) for i, p in enumerate(PROMPTS)]
    found = generate(model, tokenizer, PROMPTS, settings)
    assert [c.ids for c in found] == expected


def test_rows_do_not_depend_on_the_batch():
    """float64: rounding is far below any difference of scores."""
    model, tokenizer = pair()
    whole = generate(model, tokenizer, PROMPTS, SAMPLED)
    assert generate(model, tokenizer, PROMPTS, SAMPLED, batch_size=1) == whole
    assert generate(model, tokenizer, PROMPTS, SAMPLED, batch_size=3) == whole


def test_another_draw_or_seed_samples_anew_and_torchs_generator_is_not_touched():
    model, tokenizer = pair()
    before = torch.random.get_rng_state()
    first = generate(model, tokenizer, PROMPTS, SAMPLED)
    other = generate(model, tokenizer, PROMPTS, SAMPLED, draw=1)
    seeded = generate(model, tokenizer, PROMPTS, Generation(8, temperature=1.0, seed=4))
    assert first != other != seeded != first
    assert first == generate(model, tokenizer, PROMPTS, SAMPLED)
    assert torch.equal(before, torch.random.get_rng_state())


def test_gumbel_noise_samples_the_softmax():
    """Counts of the argmax over n rows are within 5 sigma of n p."""
    n, p = 20_000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = gumbel(tensor_key(0, "x"), torch.arange(n), 7, 4, draw=2)
    counts = torch.bincount((p.log() + noise).argmax(-1), minlength=4)
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()
    assert abs(float(noise.mean()) - 0.5772) <= 5 * math.pi / math.sqrt(6 * 4 * n)


def test_noise_is_a_function_of_each_of_its_arguments():
    key, rows = tensor_key(0, "x"), torch.tensor([4, 9])
    base = gumbel(key, rows, 3, 10, 0)
    assert torch.equal(base[1:], gumbel(key, torch.tensor([9]), 3, 10, 0))
    assert torch.equal(base[:, :6], gumbel(key, rows, 3, 6, 0))
    others = [gumbel(key, rows, 4, 10, 0), gumbel(key, rows, 3, 10, 1)]
    others += [gumbel(tensor_key(1, "x"), rows, 3, 10, 0), base.flip(0)]
    assert all((base != other).any() for other in others)


def test_like_weights_sample_like_tokens():
    """Common random numbers: a perturbation of 1e-6 flips an argmax about once in 10^5 tokens."""
    model, tokenizer = pair()
    found = generate(model, tokenizer, PROMPTS, SAMPLED)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-6 * torch.ones_like(p))
    assert generate(model, tokenizer, PROMPTS, SAMPLED) == found


def test_top_k_and_top_p_leave_only_likely_tokens():
    model, tokenizer = pair()
    greedy = generate(model, tokenizer, PROMPTS, Generation(8))
    assert generate(model, tokenizer, PROMPTS, Generation(8, temperature=5.0, top_k=1)) == greedy
    assert generate(model, tokenizer, PROMPTS, Generation(8, temperature=1.0, top_p=1e-9)) == greedy


def test_a_stop_string_ends_a_row_and_is_cut_from_its_text():
    model, tokenizer = pair()
    whole = generate(model, tokenizer, PROMPTS, Generation(12))
    text = whole[0].text
    stop = text[3:6]
    cut = generate(model, tokenizer, PROMPTS, Generation(12, stop=(stop,)))[0]
    assert stop in text
    assert cut.text == text[: text.index(stop)]
    assert cut.finished
    assert not whole[0].finished
    assert cut.ids == whole[0].ids[: len(cut.ids)]
    assert len(cut.ids) < 12


def test_a_stop_string_within_the_prompt_does_not_stop():
    model, tokenizer = pair()
    found = generate(model, tokenizer, ["the film"], Generation(4, stop=("film",)))
    assert len(found[0].ids) == 4


def test_the_end_token_ends_a_row_but_not_before_min_new_tokens():
    model, tokenizer = pair()
    first = generate(model, tokenizer, PROMPTS, Generation(6))[0].ids
    model.generation_config.eos_token_id = first[2]
    at = first.index(first[2]) + 1
    ended = generate(model, tokenizer, PROMPTS, Generation(6))[0]
    assert ended.ids == first[:at]
    assert ended.finished
    longer = generate(model, tokenizer, PROMPTS, Generation(6, min_new_tokens=6))[0]
    assert len(longer.ids) == 6


def test_a_checkpoints_own_sampling_has_no_say():
    model, tokenizer = pair()
    plain = generate(model, tokenizer, PROMPTS, SAMPLED)
    model.generation_config.update(do_sample=True, top_p=0.1, repetition_penalty=2.0, num_beams=2)
    assert generate(model, tokenizer, PROMPTS, SAMPLED) == plain


def test_modes_are_restored_and_adapters_are_run():
    model, tokenizer = pair("llama")
    plain = generate(model, tokenizer, PROMPTS, SAMPLED)
    tuned = with_adapter(model, ModelArguments(lora_target_modules=["q_proj"]), seed=0)
    tuned.train()
    assert generate(tuned, tokenizer, PROMPTS, SAMPLED) == plain  # B is 0
    assert tuned.training
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            p.add_(1.0 if "lora_B" in name else 0.0)
    assert generate(tuned, tokenizer, PROMPTS, SAMPLED) != plain


def test_the_end_that_a_tokenizer_puts_behind_a_text_is_not_read():
    tokenizer = unigram()  # ... </s>
    model = tiny_model("llama", len(tokenizer))
    ids = tokenizer("the film")["input_ids"][:-1]
    given = generate(model, tokenizer, [ids], Generation(4))
    assert generate(model, tokenizer, ["the film"], Generation(4)) == given


def test_no_prompts_no_completions():
    assert generate(*pair(), [], Generation(4)) == []
    assert Completion((1,), "a", True).ids == (1,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"min_new_tokens": 65}, "from 0 to max_new_tokens, 64, got 65"),
        ({"stop": "."}, "stop is a tuple"),
        ({"stop": ("",)}, "must not be empty"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_settings_outside_their_domain_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        Generation(**options)


def test_prompts_that_cannot_be_continued_are_named():
    model, tokenizer = pair()
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        generate(model, tokenizer, [[5], []], Generation(4))
    with pytest.raises(InputError, match=r"prompt 0 has 61 tokens.*more than the model's 64"):
        generate(model, tokenizer, [[5] * 61], Generation(4))
    assert len(generate(model, tokenizer, [[5] * 60], Generation(4))) == 1
    with pytest.raises(InputError, match="all texts or all lists"):
        generate(model, tokenizer, ["a", [5]], Generation(4))
    with pytest.raises(InputError, match="batch_size"):
        generate(model, tokenizer, ["a"], Generation(4), batch_size=0)
    with pytest.raises(InputError, match="draw"):
        generate(model, tokenizer, ["a"], Generation(4), draw=-1)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_logits_are_divided_by_the_temperature(temperature):
    """What is chosen from is logits / temperature + G, with the same G at every temperature."""
    choose = _Gumbel(Generation(temperature=temperature, seed=3), 0, [0, 1], 2)
    logits = torch.linspace(-2, 2, 12).view(2, 6)
    noise = gumbel(choose.key, torch.tensor([0, 1]), 1, 6, 0)
    found = choose(torch.zeros(2, 3, dtype=torch.long), logits)
    assert torch.equal(found, logits / temperature + noise)
