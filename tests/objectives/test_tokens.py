"""Which tokens a piece of text becomes, for tokenizers of several kinds."""

import pytest
import torch
from tiny_tokenizers import byte_bpe, unigram, word_piece

from mezo.errors import InputError
from mezo.objectives.tokens import Tokens, stack, tokenize


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


def test_a_cut_takes_tokens_behind_the_special_ones_and_the_span_moves_along():
    cut = Tokens([0, 11, 12, 13, 14, 15], leading=1, first=4, last=6).cut(2)
    assert cut == Tokens([0, 13, 14, 15], leading=1, first=2, last=4)
    assert cut.ids[cut.first : cut.last] == [14, 15]
    assert cut.cut(0) == cut


def test_a_token_of_no_characters_is_not_part_of_a_span():
    """Some tokenizers give the mark of a space, or a special token, an empty place in the text."""

    def tokenizer(texts, **options):
        places = [(0, 0), (0, 2), (3, 3), (3, 5), (5, 5)]
        return {
            "input_ids": [[1, 2, 3, 4, 5]],
            "special_tokens_mask": [[1, 0, 0, 0, 0]],
            "offset_mapping": [places],
        }

    (tokens,) = tokenize(tokenizer, ["It was"], [2], [5])
    assert (tokens.first, tokens.last, tokens.leading) == (3, 4, 1)
