"""Which tokens a piece of text becomes, for tokenizers of several kinds."""

import pytest
import torch
from tiny_tokenizers import byte_bpe, unigram, word_piece

from mezo.errors import InputError
from mezo.objectives.tokens import stack, tokenize


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_bpe(),
        byte_bpe(bos=False),
        byte_bpe(mask=True, trim=True),
        word_piece(),
        unigram(),
    ],
    ids=["bpe with bos", "bpe", "bpe, trimmed offsets", "word piece", "unigram"],
)
@pytest.mark.parametrize("candidate", [" great", " terrible, awful", " zébu"])
def test_the_span_is_the_candidate_for_every_kind_of_tokenizer(tokenizer, candidate):
    """Decoding the span gives the candidate back, special tokens behind it left out."""
    prompt = "the café was never too long It was"
    text = prompt + candidate
    (tokens,) = tokenize(tokenizer, [text], [len(prompt)], [len(text)])
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not special & set(tokens.ids[tokens.first : tokens.last])
    before, span = tokens.ids[tokens.leading : tokens.first], tokens.ids[tokens.first : tokens.last]
    assert tokenizer.decode(before).split()[-1] == "was"
    if tokenizer.unk_token_id not in span:
        spoken = tokenizer.decode(span).replace(" ", "")
        assert spoken in (candidate.replace(" ", ""), "zebu")  # BERT drops accents
    else:
        assert candidate == " zébu"


def test_a_token_across_the_boundary_belongs_to_the_candidate():
    """Prompt "It was ", candidate "great": BPE puts the prompt's space into the candidate."""
    text, bpe = "It was great", byte_bpe()
    (tokens,) = tokenize(bpe, [text], [len("It was ")], [len(text)])
    assert bpe.decode(tokens.ids[tokens.first : tokens.last]) == " great"


def test_a_span_without_tokens_is_refused():
    with pytest.raises(InputError, match="makes no token of ''"):
        tokenize(byte_bpe(), ["It was"], [6], [6])


def test_rows_are_filled_up_on_the_side_asked_for():
    assert torch.equal(stack([[1, 2], [3]], 0, "left"), torch.tensor([[1, 2], [0, 3]]))
    assert torch.equal(stack([[1, 2], [3]], 0, "right"), torch.tensor([[1, 2], [3, 0]]))
