"""The three forms: what the model reads, which tokens are scored, and the scores themselves."""

import copy

import pytest
import torch
from models import tiny_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny_tokenizers import byte_bpe, word_piece
from transformers import BertConfig, BertForSequenceClassification, T5Config
from transformers import T5ForConditionalGeneration as Seq2Seq

from mezo import tasks
from mezo.errors import InputError
from mezo.objectives import form_for, masked
from mezo.objectives.masked import logits_at
from mezo.tasks import Example, custom_task

SST2 = tasks.get("sst2")
SENTENCES = ["a charming journey . ", "no wit , only labored gags and no wit ", "dull"]
EXAMPLES = [Example({"sentence": s}, i % 2, f"row {i}") for i, s in enumerate(SENTENCES)]
# Candidates of several tokens, and of different numbers of them.
LONG = custom_task("{sentence} It was", [" a terrible, awful, boring movie", " great"])
CAUSAL = ["opt", "llama", "gpt2", "qwen2"]
PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # its own
ROUNDING = 2.0**-24  # of float32
# The models are in float64, so that two ways to one score differ by roundings of float32 alone:
# a few in the scores themselves and in the norms and rotations that transformers does in float32.
TOLERANCE = 64 * ROUNDING


@pytest.fixture(scope="module")
def bpe():
    return byte_bpe()


def batch_of(form, examples=EXAMPLES):
    return form.collate([form.encode(example) for example in examples])


def close(actual, expected):
    scale = max(1.0, expected.abs().max().item())
    assert actual.dtype == torch.float32
    assert (actual.double() - expected.double()).abs().max() <= TOLERANCE * scale


def naive(model, tokenizer, task, example):
    """One candidate at a time, nothing padded, all logits."""
    scores = []
    for candidate in task.candidates:
        prompt = tasks.fill(task.prompt, example.fields)
        ids = tokenizer(prompt + candidate, return_tensors="pt").input_ids
        start = len(tokenizer(prompt).input_ids)  # right here: the candidate opens with a space
        log_probs = model(input_ids=ids).logits.log_softmax(-1)[0]
        scores.append(
            torch.stack([log_probs[t - 1, ids[0, t]] for t in range(start, ids.shape[1])])
        )
    return torch.stack([s.mean() for s in scores]).detach()


def refused(match, call, *args, **options):
    with pytest.raises(InputError, match=match) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


# What the model reads


def test_prompts_of_sst2_are_the_papers(bpe):
    """Golden strings: a change of one character is a new version of the task."""
    example = Example({"sentence": "that loves its characters "}, 1)
    causal = form_for(tiny_model("opt"), bpe, SST2)
    assert causal.texts(example) == [
        "that loves its characters It was terrible",
        "that loves its characters It was great",
    ]
    roberta = form_for(tiny_model("roberta"), byte_bpe(mask=True), SST2)
    assert roberta.texts(example) == ["that loves its characters It was <mask>."]
    encoder = form_for(tiny_model("encoder"), word_piece(), SST2)
    assert encoder.texts(example) == ["that loves its characters"]


def test_demonstrations_stand_before_the_prompt_with_their_labels(bpe):
    form = form_for(tiny_model("opt"), bpe, SST2).in_context(None, EXAMPLES[:2])
    assert form.texts(EXAMPLES[2])[1] == (
        "a charming journey . It was terrible\n\n"
        "no wit , only labored gags and no wit It was great\n\n"
        "dull It was great"
    )
    assert form.encode(EXAMPLES[2]) == form_for(tiny_model("opt"), bpe, SST2).encode(
        EXAMPLES[2], demonstrations=EXAMPLES[:2]
    )


def test_demonstrations_that_do_not_fit_are_dropped_from_the_left(bpe):
    plain = form_for(tiny_model("opt"), bpe, SST2, max_length=48)
    form = plain.in_context(None, EXAMPLES * 3)
    feature = form.encode(EXAMPLES[2])
    kept = (EXAMPLES * 3)[feature["dropped"] :]
    assert 0 < feature["dropped"] < 9
    assert feature["length"] <= 48
    assert feature["rows"] == plain.encode(EXAMPLES[2], demonstrations=kept)["rows"]
    refused("row 1 has", plain.encode, EXAMPLES[1], [EXAMPLES[1]]) if not kept else None
    one_more = (EXAMPLES * 3)[feature["dropped"] - 1 :]
    assert plain.encode(EXAMPLES[2], demonstrations=one_more)["dropped"] == 1


# Causal scores


def test_single_token_candidates_share_one_row(bpe):
    form = form_for(tiny_model("opt"), bpe, SST2)
    batch = batch_of(form)
    assert batch["input_ids"].shape[0] == len(EXAMPLES)
    assert batch["targets"].shape == (3, 2, 1)
    for share, rows in ((True, 3), (False, 6)):
        form = form_for(tiny_model("opt"), bpe, LONG, share=share)
        assert batch_of(form)["input_ids"].shape[0] == rows


def test_labels_come_first_in_a_batch(bpe):
    """The Trainer takes the number of examples from a batch's first tensor."""
    masked = form_for(tiny_model("roberta"), byte_bpe(mask=True), SST2)
    encoder = form_for(tiny_model("encoder"), word_piece(), SST2)
    for form in (form_for(tiny_model("opt"), bpe, LONG), masked, encoder):
        batch = batch_of(form)
        assert next(iter(batch)) == "labels"
        assert batch["labels"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("task", [SST2, LONG], ids=["one token", "several"])
@pytest.mark.parametrize("name", CAUSAL)
def test_scores_equal_those_of_one_candidate_at_a_time(name, task, bpe):
    """Padding on the left, shared rows and logits at the end alone change nothing."""
    model = tiny_model(name)
    form = form_for(model, bpe, task)
    expected = torch.stack([naive(model, bpe, task, example) for example in EXAMPLES])
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 1e-2  # the test can tell them apart
    close(form.scores(model, batch_of(form)).detach(), expected)
    for example, row in zip(EXAMPLES, expected, strict=True):
        close(form.scores(model, batch_of(form, [example])).detach(), row[None])


def test_a_forward_without_logits_to_keep_or_positions_gives_the_same(bpe):
    """OPT finds its positions by the mask; all logits are made and the last ones read."""
    model = tiny_model("opt")
    form = form_for(model, bpe, LONG, share=False)
    plain = copy.copy(form)
    object.__setattr__(plain, "accepts", frozenset({"input_ids", "attention_mask"}))
    close(plain.scores(model, batch_of(form)).detach(), form.scores(model, batch_of(form)))


def test_logits_are_made_for_the_candidates_positions_alone(bpe):
    model = tiny_model("llama")
    made = []
    model.lm_head.register_forward_hook(lambda module, args, out: made.append(out.shape[1]))
    form = form_for(model, bpe, SST2)
    form.scores(model, batch_of(form))
    assert made == [1]


def test_the_loss_is_the_cross_entropy_of_the_scores_in_float32(bpe):
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny_model("opt").to(dtype)
        form = form_for(model, bpe, LONG)
        batch = batch_of(form)
        scores = form.scores(model, batch)
        assert scores.dtype == torch.float32
        right = scores.log_softmax(-1)[range(3), batch["labels"]]
        close(form.loss(model, batch).detach(), -right.mean().detach())


def test_the_tokens_objective_is_the_mean_over_the_right_candidates_tokens(bpe):
    model = tiny_model("opt")
    form = form_for(model, bpe, LONG, objective="tokens")
    numbers, total = [], 0.0
    for example in EXAMPLES:
        feature = form.encode(example)
        numbers.append(len(feature["targets"][example.label]))
        total += numbers[-1] * naive(model, bpe, LONG, example)[example.label]
    assert len(set(numbers)) > 1
    close(form.loss(model, batch_of(form)).detach(), -total / sum(numbers))


def test_truncation_keeps_the_first_special_token_and_the_templates_end(bpe):
    model = tiny_model("opt")
    whole = form_for(model, bpe, SST2).encode(EXAMPLES[1])
    form = form_for(model, bpe, SST2, max_length=10, truncate=True)
    feature = form.encode(EXAMPLES[1])
    assert feature["length"] == 10
    assert list(feature["rows"][0]) == [whole["rows"][0][0], *whole["rows"][0][-8:]]
    assert feature["targets"] == whole["targets"]
    long = form_for(model, bpe, LONG, max_length=5, truncate=True)
    refused("row 1: a limit of 5 tokens leaves no text", long.encode, EXAMPLES[1])


def test_candidates_may_name_columns(bpe):
    """Multiple choice: each example brings its own candidates."""
    task = custom_task("{premise} so", [" {choice1}", " {choice2}"])
    example = Example({"premise": "It was dull", "choice1": "a ", "choice2": "no"}, 0)
    form = form_for(tiny_model("opt"), bpe, task)
    assert form.texts(example) == ["It was dull so a", "It was dull so no"]


# Masked scores


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_masked_scores_are_the_logits_at_the_mask(name):
    model = tiny_model(name)
    tokenizer = word_piece() if name == "bert" else byte_bpe(mask=True, trim=True)
    form = form_for(model, tokenizer, SST2)
    words = [tokenizer.convert_tokens_to_ids(t) for t in
             (("terrible", "great") if name == "bert" else ("Ġterrible", "Ġgreat"))]  # fmt: skip
    expected = []
    for example in EXAMPLES:
        ids = tokenizer(form.texts(example)[0], return_tensors="pt").input_ids
        place = (ids[0] == tokenizer.mask_token_id).nonzero().item()
        expected.append(model(input_ids=ids).logits[0, place, words].detach())
    close(form.scores(model, batch_of(form)).detach(), torch.stack(expected))


def test_masked_logits_are_made_at_the_mask_alone_and_the_hook_is_gone():
    model = tiny_model("bert")
    form = form_for(model, word_piece(), SST2)
    made = []
    watch = model.cls.register_forward_hook(lambda module, args, out: made.append(out.shape[1]))
    form.scores(model, batch_of(form))
    assert made == [1]
    watch.remove()
    with pytest.raises(IndexError):
        logits_at(model, torch.tensor([9]), {"input_ids": torch.ones(1, 4).long()})
    assert model(torch.ones(1, 4).long()).logits.shape[1] == 4


def test_a_model_without_a_head_or_compiled_gives_the_same_logits_without_a_hook(monkeypatch):
    """Compiled code ignores hooks that come and go: all logits are made, and the mask's are taken.

    Here the compiled call is the plain one.
    """
    model = tiny_model("bert")
    form = form_for(model, word_piece(), SST2)
    expected, made = form.scores(model, batch_of(form)).detach(), []
    model.cls.register_forward_hook(lambda module, args, out: made.append(out.shape[1]))
    monkeypatch.setattr(model, "_compiled_call_impl", model._call_impl)
    close(form.scores(model, batch_of(form)).detach(), expected)
    monkeypatch.setattr(model, "_compiled_call_impl", None)
    monkeypatch.setattr(masked, "_head", lambda model: None)
    close(form.scores(model, batch_of(form)).detach(), expected)
    assert min(made) > 1


def test_a_mask_in_the_data_is_not_the_templates():
    model, tokenizer = tiny_model("roberta"), byte_bpe(mask=True)
    form = form_for(model, tokenizer, SST2)
    feature = form.encode(Example({"sentence": "a <mask> film"}, 0))
    places = [t for t, i in enumerate(feature["input_ids"]) if i == tokenizer.mask_token_id]
    assert feature["mask"] == places[1]


def test_a_masked_text_is_cut_on_the_left():
    form = form_for(tiny_model("bert"), word_piece(), SST2, max_length=9, truncate=True)
    whole = form_for(tiny_model("bert"), word_piece(), SST2).encode(EXAMPLES[1])
    feature = form.encode(EXAMPLES[1])
    assert feature["input_ids"] == [whole["input_ids"][0], *whole["input_ids"][-8:]]
    assert feature["input_ids"][feature["mask"]] == form.tokenizer.mask_token_id


def test_verbalizers_that_are_not_one_token_each_are_refused():
    model = tiny_model("bert")
    words = {"terribly": "must be one token, the tokenizer has t ##e ##r", "日本": r"has \[UNK\]"}
    for word, reason in words.items():
        task = custom_task("{sentence} It was {mask}.", [word, "great"])
        refused(reason, form_for, model, word_piece(), task)
    same = custom_task("{sentence} It was {mask}.", ["Great", "great"])
    refused("verbalizers Great, great share a token", form_for, model, word_piece(), same)
    bare = byte_bpe()
    refused("has no mask token", form_for, tiny_model("roberta"), bare, SST2)


# Encoder scores


def encoder():
    model, tokenizer = tiny_model("encoder"), word_piece()
    return model, tokenizer, form_for(model, tokenizer, SST2)


def embedding(model, tokenizer, text):
    states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return torch.nn.functional.normalize(states.mean(0), dim=0).detach()


def test_encoder_scores_are_twenty_times_the_cosine_with_each_description():
    model, tokenizer, form = encoder()
    anchors = torch.stack([embedding(model, tokenizer, d) for d in SST2.descriptions])
    rows = torch.stack([embedding(model, tokenizer, s.strip()) for s in SENTENCES])
    close(form.scores(model, batch_of(form)).detach(), 20 * rows @ anchors.T)


def test_encoder_demonstrations_are_averaged_with_the_description():
    """A label without demonstrations keeps its description."""
    model, tokenizer, form = encoder()
    shown = form.in_context(model, [EXAMPLES[0], EXAMPLES[2]])  # both of label 0
    anchors = torch.stack([embedding(model, tokenizer, d) for d in SST2.descriptions])
    mean = sum(embedding(model, tokenizer, SENTENCES[i].strip()) for i in (0, 2)) / 2
    anchors[0] = torch.nn.functional.normalize((anchors[0] + mean) / 2, dim=0)
    rows = embedding(model, tokenizer, SENTENCES[1].strip())[None]
    close(shown.scores(model, batch_of(shown, EXAMPLES[1:2])), 20 * rows @ anchors.T)


# Any form


def test_calibration_subtracts_the_scores_of_an_empty_example(bpe):
    model = tiny_model("opt").train()
    form = form_for(model, bpe, SST2)
    calibrated = form.calibrate(model)
    assert model.training
    model.eval()
    empty = naive(model, bpe, custom_task("It was{sentence}", SST2.candidates),
                  Example({"sentence": ""}, 0))  # fmt: skip
    scores = form.scores(model, batch_of(form))
    close(calibrated.scores(model, batch_of(form)).detach(), scores.detach() - empty)
    close(calibrated.calibrate(model).offsets, calibrated.offsets)


@PEFT
@pytest.mark.parametrize("name", ["opt", "roberta", "encoder"])
def test_a_lora_wrapped_model_scores_as_its_merged_weights(name):
    """peft's wrapper is looked through, and its adapter is in force."""
    tokenizer = {"opt": byte_bpe(), "roberta": byte_bpe(mask=True)}.get(name)
    tokenizer = tokenizer or word_piece()
    base = tiny_model(name)
    modules = ["q_proj", "v_proj"] if name == "opt" else ["query", "value"]
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        lora = LoraConfig(target_modules=modules, r=2, init_lora_weights=False)
        wrapped = get_peft_model(copy.deepcopy(base), lora).double().eval()
    form = form_for(wrapped, tokenizer, SST2)
    scores = form.scores(wrapped, batch_of(form)).detach()
    assert (scores - form.scores(base, batch_of(form))).abs().max() > 1e-2
    merged = wrapped.merge_and_unload()
    close(scores, form.scores(merged, batch_of(form)).detach())


@PEFT
@pytest.mark.parametrize("name", ["opt", "llama", "roberta"])
def test_a_prefix_scores_the_same_padded_or_not(name):
    """The prefix comes before the padding; positions are counted by the mask."""
    kind = "CAUSAL_LM" if name != "roberta" else "FEATURE_EXTRACTION"
    tokenizer = byte_bpe(mask=name == "roberta")
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = get_peft_model(tiny_model(name), PrefixTuningConfig(kind, num_virtual_tokens=3))
        model.double().eval()
    form = form_for(model, tokenizer, SST2)
    padded = form.scores(model, batch_of(form)).detach()
    for example, row in zip(EXAMPLES, padded, strict=True):
        close(form.scores(model, batch_of(form, [example])).detach(), row[None])


def test_the_kind_may_be_named_and_a_wrong_one_is_refused(bpe):
    model = tiny_model("bert")
    assert type(form_for(model.bert, word_piece(), SST2)).__name__ == "Encoder"
    assert type(form_for(model, word_piece(), SST2, kind="masked")).__name__ == "Masked"
    refused("kind must be causal, masked, encoder, got 'lm'", form_for, model, bpe, SST2, kind="lm")
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    classifier = BertForSequenceClassification(BertConfig(**small, vocab_size=50))
    refused("has a head of its own", form_for, classifier, bpe, SST2)
    t5 = Seq2Seq(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    refused("is an encoder-decoder", form_for, t5, bpe, SST2)


def test_what_does_not_go_together_is_refused(bpe):
    model = tiny_model("opt")
    masked = custom_task("{sentence} It was {mask}.", ["bad", "good"])
    refused("custom has no prompt, which a model of kind causal", form_for, model, bpe, masked)
    refused("max_length must be from 2 to 64, got 65", form_for, model, bpe, SST2, 65)
    refused("objective must be candidates or tokens", form_for, model, bpe, SST2, objective="x")
    bert, words = tiny_model("bert"), word_piece()
    refused("tokens is for causal", form_for, bert, words, SST2, objective="tokens")
    long = Example({"sentence": "no wit " * 40}, 0, "train.tsv row 9")
    for name, tokenizer in {"opt": bpe, "bert": words, "encoder": words}.items():
        form = form_for(tiny_model(name), tokenizer, SST2)
        refused("train.tsv row 9 has .* tokens, the limit is 64", form.encode, long)
    refused("for causal models and encoders", form_for(bert, words, SST2).encode, long, [long])
    refused("for causal models and encoders", form_for(bert, words, SST2).in_context, bert, [long])
    refused("by form.in_context", encoder()[2].encode, long, [long])


def test_an_example_that_gives_no_tokens_is_refused(bpe):
    form = form_for(tiny_model("gpt2"), byte_bpe(bos=False), custom_task("{t}", ["a", "b"]))
    refused("row 3: nothing precedes", form.encode, Example({"t": ""}, 0, "row 3"))


def test_the_context_of_roberta_leaves_out_the_positions_before_the_first():
    """64 positions behind padding_idx 0, in a table of 65."""
    assert form_for(tiny_model("roberta"), byte_bpe(mask=True), SST2).max_length == 64
