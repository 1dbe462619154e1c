"""Candidates that share their prompt's tokens: the same scores, from fewer tokens."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PrefixTuningConfig, get_peft_model
from shared_prompts import (
    APART,
    CHOICE,
    EXAMPLES,
    OWN,
    ROUNDING,
    SHARING,
    TOLERANCE,
    batch_of,
    model_of,
)
from tiny_tokenizers import byte_bpe

from mezo import MeZO
from mezo.errors import InputError
from mezo.objectives import form_for
from mezo.objectives.packing import apart, pack, spread
from mezo.tasks import Example

WINDOWS = [("mistral", "sliding_window"), ("gpt_neo", "window_size")]


@pytest.fixture(scope="module")
def bpe():
    return byte_bpe()


def naive(model, tokenizer, example, task=CHOICE):
    """One candidate at a time, nothing padded, all logits; -inf up to four candidates."""
    scores = []
    for candidate in example.candidates:
        prompt = f"{example.fields['premise']} so"
        ids = tokenizer(prompt + candidate, return_tensors="pt").input_ids
        start = len(tokenizer(prompt).input_ids)
        log_probs = model(input_ids=ids).logits.log_softmax(-1)[0].detach()
        scores.append(torch.stack([log_probs[t - 1, ids[0, t]] for t in range(start, len(ids[0]))]))
    return torch.stack([s.mean() for s in scores])


def assert_scores(found, model, tokenizer, examples=EXAMPLES):
    assert found.dtype == torch.float32
    for row, example in zip(found.detach(), examples, strict=True):
        expected = naive(model, tokenizer, example)
        assert (row[: len(expected)] - expected).abs().max() <= TOLERANCE[model.dtype]
        assert (row[len(expected) :] == -torch.inf).all()


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "qwen2", *SHARING])
def test_scores_of_shared_prompts_equal_those_of_one_candidate_at_a_time(name, bpe):
    """Among them models with a shorter reach in some layers, and with experts."""
    model = model_of(name)
    form = form_for(model, bpe, CHOICE)
    assert form.share == 64
    batch = batch_of(form)
    assert batch["input_ids"].shape[0] == len(EXAMPLES)
    assert_scores(form.scores(model, batch), model, bpe)


@pytest.mark.parametrize("name", APART)
def test_models_that_heed_no_such_mask_get_a_row_for_each_candidate(name, bpe):
    model = model_of(name)
    form = form_for(model, bpe, CHOICE)
    assert form.share == 0
    batch = batch_of(form)
    assert batch["input_ids"].shape[0] == sum(map(len, OWN))
    assert_scores(form.scores(model, batch), model, bpe)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kinds_of_attention_take_the_mask(attention, bpe):
    """Also where it was changed after the form was made."""
    model = model_of("llama").float()  # as EAGER
    form = form_for(model, bpe, CHOICE)
    model.set_attn_implementation(attention)
    assert form_for(model, bpe, CHOICE).share == 64
    assert_scores(form.scores(model, batch_of(form)), model, bpe)


@pytest.mark.parametrize(("name", "bound"), WINDOWS)
def test_rows_beyond_a_window_are_not_shared(name, bound, bpe):
    """The mask that the model is given takes the place of its own, which knows the window."""
    more = {"attention_types": [[["global", "local"], 1]]} if name == "gpt_neo" else {}
    more |= {"num_layers": 2, "num_heads": 2} if name == "gpt_neo" else {}
    model = model_of(name, **{bound: 12}, **more)
    form = form_for(model, bpe, CHOICE)
    assert form.share == 12
    assert "branch" not in batch_of(form)
    assert_scores(form.scores(model, batch_of(form)), model, bpe)
    alone = [Example({"premise": "dull"}, 0, candidates=OWN[0][:1])]
    assert "branch" not in batch_of(form, alone)  # one row has nothing to share
    short = [Example({"premise": "dull"}, 0, candidates=OWN[0])]
    assert "branch" in batch_of(form, short)
    assert_scores(form.scores(model, batch_of(form, short)), model, bpe, short)
    wrong = copy.copy(form)
    object.__setattr__(wrong, "share", 64)  # the test would see it
    with pytest.raises(AssertionError):
        assert_scores(wrong.scores(model, batch_of(wrong)), model, bpe)


def test_the_tokens_of_a_prompt_are_computed_once(bpe):
    model, seen = model_of("llama"), []
    form = form_for(model, bpe, CHOICE)
    hook = lambda module, args, out: seen.append(out.shape[:2])  # noqa: E731
    model.model.layers[0].register_forward_hook(hook)
    model.lm_head.register_forward_hook(hook)
    feature = form.encode(EXAMPLES[1])
    form.scores(model, form.collate([feature]))
    prompt = len(bpe("no wit , only labored gags and no wit so").input_ids)
    assert feature["rows"][3] == tuple(bpe(form.texts(EXAMPLES[1])[3]).input_ids[:-1])
    branches = sum(len(row) - prompt for row in feature["rows"])
    assert seen == [(1, prompt + branches), (1, 1 + branches)]  # and logits from the prompt's end


def test_the_loss_and_its_gradient_are_those_of_rows_apart(bpe):
    model, gradients = model_of("opt"), []
    for share in (True, False):
        form = form_for(model, bpe, CHOICE, share=share)
        model.zero_grad()
        loss = form.loss(model, batch_of(form))
        loss.backward()
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat([loss.detach().double()[None], *parts]))
    size = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= 64 * ROUNDING * size
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("share", [True, False])
def test_the_tokens_objective_reads_the_right_candidates_alone(share, bpe):
    model, seen = model_of("opt"), []
    form = form_for(model, bpe, CHOICE, objective="tokens", share=share)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    loss = form.loss(model, batch_of(form))
    total = numbers = 0
    for example in EXAMPLES:
        feature = form.encode(example)
        numbers += len(feature["targets"][example.label])
        mean = naive(model, bpe, example)[example.label]
        total += len(feature["targets"][example.label]) * mean
    assert abs(loss.item() + total / numbers) <= TOLERANCE[torch.float64]
    rights = [f["rows"][f["row"][f["label"]]] for f in map(form.encode, EXAMPLES)]
    assert seen[0] == (3, max(map(len, rights)))


@pytest.mark.parametrize("objective", ["candidates", "tokens"])
@pytest.mark.parametrize("share", [True, False])
def test_both_losses_come_from_one_forward_pass(share, objective, bpe):
    """Along low-rank directions, where the model at either end is asked as well."""
    model = model_of("opt").float()
    form = form_for(model, bpe, CHOICE, objective=objective, share=share)
    optimizer = MeZO(model.named_parameters(), eps=0.1, seed=1, perturbation="low_rank")
    perturbed, batch = optimizer.direction(0), batch_of(form)
    with torch.no_grad():
        pair = form.pair_loss(model, batch, perturbed.both)
        for sign, found in zip((+1, -1), pair, strict=True):
            with perturbed.at(sign):
                expected = form.loss(model, batch)
            assert abs(found - expected) <= 1000 * ROUNDING * abs(expected)  # float32 throughout
    assert abs(pair[0] - pair[1]) > 1e-2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_prefix_that_comes_later_takes_rows_apart(bpe):
    """peft puts its tokens before a mask of two dimensions alone."""
    base = model_of("llama")
    form = form_for(base, bpe, CHOICE)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = get_peft_model(base, PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=3))
    model.double().eval()
    late, early = form, form_for(model, bpe, CHOICE)
    assert early.share == 0
    found, expected = (f.scores(model, batch_of(f)).detach() for f in (late, early))
    assert torch.equal(found.isinf(), expected.isinf())
    assert (found - expected).nan_to_num().abs().max() <= TOLERANCE[torch.float64]


def test_a_label_beyond_the_examples_own_candidates_is_refused(bpe):
    form = form_for(model_of("opt"), bpe, CHOICE)
    wrong = Example({"premise": "dull"}, 2, "row 7", candidates=OWN[0])
    with pytest.raises(InputError, match="row 7: label 2 is not one of 2 candidates"):
        form.encode(wrong)


TEXT = st.lists(st.integers(1, 3), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=1, max_size=3))
def test_packed_rows_hold_the_plain_ones(texts):
    """Whatever they have in common: nothing, all, a row that another begins with."""
    rows = [list(dict.fromkeys(map(tuple, own))) for own in texts]
    row = [[own.index(tuple(text)) for text in mine] for own, mine in zip(rows, texts, strict=True)]
    targets = [[text[1:] for text in mine] for mine in texts]
    packed, plain = pack(rows, row, targets, 0), spread(rows, row, targets, 0)
    found = apart(packed)
    assert torch.equal(found["attention_mask"], plain["attention_mask"])
    kept = plain["attention_mask"] == 1
    assert torch.equal(found["input_ids"][kept], plain["input_ids"][kept])
    for key in ("row", "targets"):
        assert torch.equal(packed[key], plain[key])
    for b, mine in enumerate(texts):
        for k, text in enumerate(mine):  # a target is read at the token before it in the text
            places = packed["place"][b, k][packed["targets"][b, k] != -100]
            assert packed["input_ids"][b][places].tolist()[1:] == text[2 : 1 + len(places)]
