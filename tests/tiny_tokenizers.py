"""Tokenizers of three kinds in miniature: trained on nothing, read from no network."""

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    PreTrainedTokenizerFast,
)

TEXT = (
    "a charming journey . It was great no wit , only labored gags terrible awful boring movie "
    "wonderful enjoyable the film of year simply brilliant and never too long dull It was"
)
WORDS = sorted(set(TEXT.split()))
LETTERS = "abcdefghijklmnopqrstuvwxyz.,I<>"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def byte_bpe(*, bos=True, mask=False, trim=False):
    """As OPT's and GPT-2's, or as RoBERTa's: mask, offsets without the leading space, </s> last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spaced = ["Ġ" + word for word in WORDS]
    merges = dict.fromkeys((word[:i], word[i]) for word in spaced for i in range(1, len(word)))
    pieces = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if mask:
        ends = ("</s>", 2), ("<s>", 1)
        tokenizer.post_processor = processors.RobertaProcessing(
            *ends, trim_offsets=trim, add_prefix_space=False
        )
    elif bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    names = NAMES | (
        {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"} if mask else {}
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def word_piece():
    """As BERT's: lower case, spaces dropped."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    pieces = [*special, *LETTERS.lower(), *("##" + c for c in LETTERS.lower())]
    pieces += [word for word in map(str.lower, WORDS) if len(word) > 1]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def unigram():
    """As T5's and ALBERT's: the space is a mark at the front of a piece; </s> is last."""
    pieces = [(piece, 0.0) for piece in SPECIAL] + [("▁" + word, -3.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in "▁" + LETTERS if "▁" + letter not in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)
