"""Calibration: what is subtracted, for a task's candidates and for an example's own."""

from dataclasses import replace

import pytest
import torch
from models import tiny_model
from shared_prompts import CHOICE, EXAMPLES, TOLERANCE, batch_of
from tiny_tokenizers import byte_bpe, word_piece

from mezo import MeZO, tasks
from mezo.errors import InputError
from mezo.evaluation.evaluate import evaluate
from mezo.objectives import form_for
from mezo.tasks import Example, custom_task

WORDS = [" a terrible, awful, boring movie", " great"]
LONG = replace(custom_task("{sentence} It was", WORDS), sfc_prompt=" It was")
SENTENCES = [Example({"sentence": s}, i, f"row {i}") for i, s in enumerate(("dull", "no wit"))]


@pytest.fixture(scope="module")
def bpe():
    return byte_bpe()


@pytest.fixture(scope="module")
def model():
    return tiny_model("opt")


def log_probs(model, tokenizer, prompt, candidate):
    """Of the candidate's tokens after the prompt."""
    ids = tokenizer(prompt + candidate, return_tensors="pt").input_ids
    start = len(tokenizer(prompt).input_ids)
    found = model(input_ids=ids).logits.log_softmax(-1)[0].detach()
    return torch.stack([found[t - 1, ids[0, t]] for t in range(start, ids.shape[1])])


def close(found, expected):
    assert (found.detach() - expected).abs().max() <= 4 * TOLERANCE[torch.float64]  # sums


def refused(match, call, *args, **options):
    with pytest.raises(InputError, match=match) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


def test_surface_form_competition_subtracts_sums_after_the_tasks_short_prompt(model, bpe):
    """log p(candidate | prompt) - log p(candidate | short prompt): no mean over tokens."""
    form = form_for(model, bpe, LONG).calibrate(model, "sfc")
    expected = [
        [
            log_probs(model, bpe, f"{e.fields['sentence']} It was", c).sum()
            - log_probs(model, bpe, "It was", c).sum()
            for c in WORDS
        ]
        for e in SENTENCES
    ]
    close(form.scores(model, batch_of(form, SENTENCES)), torch.tensor(expected))


@pytest.mark.parametrize("kind", ["sfc", "content_free"])
def test_an_examples_own_candidates_are_scored_after_the_neutral_prompt_too(kind, model, bpe):
    form = form_for(model, bpe, CHOICE).calibrate(model, kind)
    scores = form.scores(model, batch_of(form)).detach()
    for example, row in zip(EXAMPLES, scores, strict=True):
        for k, candidate in enumerate(example.candidates):
            parts = [
                log_probs(model, bpe, prompt, candidate)
                for prompt in (f"{example.fields['premise']} so", "so")
            ]
            plain, neutral = (p.sum() if kind == "sfc" else p.mean() for p in parts)
            close(row[k], plain - neutral)
        assert (row[len(example.candidates) :] == -torch.inf).all()
    assert form.loss(model, batch_of(form)).isfinite()
    assert evaluate(model, form, EXAMPLES).predictions == tuple(scores.argmax(-1).tolist())


@pytest.mark.parametrize("share", [True, False])
def test_a_calibrated_loss_takes_both_signs_at_once(share, bpe):
    model = tiny_model("opt").float()
    form = form_for(model, bpe, CHOICE, share=share).calibrate(model, "sfc")
    optimizer = MeZO(model.named_parameters(), eps=0.1, seed=1, perturbation="low_rank")
    perturbed, batch = optimizer.direction(0), batch_of(form)
    with torch.no_grad():
        pair = form.pair_loss(model, batch, perturbed.both)
        for sign, found in zip((+1, -1), pair, strict=True):
            with perturbed.at(sign):
                assert abs(found - form.loss(model, batch)) <= 1000 * 2.0**-24 * abs(found)


def test_demonstrations_stand_before_the_neutral_prompt_if_they_came_first(model, bpe):
    """The reference's calibration of in-context learning; afterwards they are in one prompt."""
    plain = form_for(model, bpe, CHOICE)
    shown = EXAMPLES[:1]
    first = plain.in_context(model, shown).calibrate(model, "sfc")
    assert first.neutral.texts(EXAMPLES[2])[0].endswith("\n\nso dull")
    later = plain.calibrate(model, "sfc").in_context(model, shown)
    assert later.neutral.texts(EXAMPLES[2]) == ["so dull"]
    assert first.texts(EXAMPLES[2]) == later.texts(EXAMPLES[2])


def test_a_candidate_may_begin_the_text_where_something_precedes_it(bpe):
    """No sfc_prompt: the prior is that after the first special token. GPT-2 has none."""
    model, bare = tiny_model("opt"), replace(LONG, sfc_prompt="")
    form = form_for(model, bpe, bare).calibrate(model, "sfc")
    found = form.offsets.tolist()
    expected = [log_probs(model, bpe, "", c).sum() for c in WORDS]
    close(torch.tensor(found), torch.tensor(expected))
    gpt2 = form_for(tiny_model("gpt2"), byte_bpe(bos=False), bare)
    refused("the sfc prompt of custom: nothing precedes", gpt2.calibrate, tiny_model("gpt2"), "sfc")


def test_what_cannot_be_calibrated_is_refused(model, bpe):
    form = form_for(model, bpe, LONG)
    refused("must be content_free or sfc, got 'prior'", form.calibrate, model, "prior")
    masked = form_for(tiny_model("bert"), word_piece(), tasks.get("sst2"))
    refused("calibration 'sfc' is for causal models", masked.calibrate, tiny_model("bert"), "sfc")


def test_models_of_fixed_words_refuse_an_examples_own_candidates(bpe):
    sst2, own = tasks.get("sst2"), Example({"sentence": "dull"}, 0, "row 4", candidates=(" a",))
    for name in ("bert", "encoder"):
        form = form_for(tiny_model(name), word_piece(), sst2)
        refused("row 4 has candidates of its own: they need a causal", form.encode, own)
    refused("choice has no mask_prompt", form_for, tiny_model("bert"), word_piece(), CHOICE)
