"""The golden prompts of every task through tokenizers with the rules of real ones."""

import pytest
import real_shapes
from golden_prompts import CAUSAL, GENERATION, PAIRS
from models import tiny_model

from mezo import tasks
from mezo.objectives import form_for
from mezo.tasks import Task
from mezo.tasks.listing import shown_example


def bare(text):
    """Without white space, which WordPiece drops and SentencePiece may move."""
    return "".join(text.split())


def form_of(task, tokenizer, kind):
    model = tiny_model(kind, len(tokenizer), context=4096)
    return form_for(model, tokenizer, task, 4000)


@pytest.mark.parametrize("shape", real_shapes.CAUSAL)
@pytest.mark.parametrize("name", [*CAUSAL, *GENERATION])
def test_a_causal_model_reads_the_prompt_and_scores_the_candidate(name, shape):
    """Every token of the candidate is scored and none of the prompt's, for every tokenizer."""
    task, tokenizer = tasks.get(name), real_shapes.CAUSAL[shape]()
    example = shown_example(task)
    form = form_of(task, tokenizer, "opt")
    feature = form.encode(example)
    texts = form.texts(example)
    assert len(texts) == len(feature["targets"])
    for text, row, target in zip(texts, feature["row"], feature["targets"], strict=True):
        whole = [*feature["rows"][row], target[-1]]
        assert bare(tokenizer.decode(whole, skip_special_tokens=True)) == bare(text)
        prompt = GENERATION[name][0] if name in GENERATION else CAUSAL[name][0]
        candidate = bare(text)[len(bare(prompt)) :]
        assert bare(tokenizer.decode(target)) == candidate


@pytest.mark.parametrize("shape", real_shapes.MASKED)
@pytest.mark.parametrize("name", PAIRS)
def test_a_masked_model_reads_the_prompt_and_is_asked_for_words_behind_a_space(name, shape):
    """TREC's template begins with the mask, where byte-level BPE splits a word without a space.

    The published code takes the token of space and word for every template.
    """
    task, tokenizer = tasks.get(name), real_shapes.MASKED[shape]()
    form = form_of(task, tokenizer, "roberta")
    for word, token in zip(task.verbalizers, form.words, strict=True):
        ids = tokenizer(f"It was {word}", add_special_tokens=False)["input_ids"]
        assert token == ids[-1]
        assert tokenizer.decode([token]).strip() in (word, word.lower())
    feature = form.encode(shown_example(task))
    ids = feature["input_ids"]
    assert ids[feature["mask"]] == tokenizer.mask_token_id
    parts = ids[1 : feature["mask"]], ids[feature["mask"] + 1 :]
    text = PAIRS[name][0]
    text = text.lower() if shape == "bert" else text
    end = tokenizer.sep_token or tokenizer.eos_token
    assert bare("<mask>".join(map(tokenizer.decode, parts))) == bare(text) + end


@pytest.mark.parametrize("template", ["{mask}: {text}", "{text} {mask}.", "{text}{mask}"])
def test_a_word_is_taken_as_after_a_space_where_only_columns_stand_before_the_mask(template):
    """The columns are filled at another time: an empty one must not decide on the word's token."""
    tokenizer = real_shapes.roberta()
    assert len(tokenizer("Expression", add_special_tokens=False)["input_ids"]) > 1
    task = Task(
        name="types",
        version=0,
        source="",
        columns=("text",),
        labels=("a", "b"),
        mask_prompt=template,
        verbalizers=("Expression", "Human"),
    )
    words = form_of(task, tokenizer, "roberta").words
    assert tokenizer.convert_ids_to_tokens(words) == ["ĠExpression", "ĠHuman"]
