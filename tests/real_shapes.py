"""Tokenizers with the rules of real ones and small vocabularies made by hand; no network.

Every word of the tasks' answers is one token where real vocabularies have it: behind a space, and
at the beginning of a line for "Yes", "No" and "Maybe". Everything else falls apart into letters and
bytes, so that a wrong boundary shows.
"""

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

SENTIMENT = ["terrible", "bad", "okay", "good", "great"]
TYPES = ["Description", "Entity", "Expression", "Human", "Location", "Number"]
REPLIES = ["Yes", "No", "Maybe"]  # they begin a line
COMMON = ["It", "was", "the", "Question", "Answer", "?"]
SPACED = [*SENTIMENT, *TYPES, *REPLIES, *COMMON]  # words that follow a space
LINES = [*REPLIES, "I", "The"]  # words that may begin a text or a line
ASCII = [chr(i) for i in range(33, 127)]
# GPT-4's and Llama 3's rule, which gives a line break to the punctuation before it
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _merges(words):
    """Merges that make each word from the left: no part of it but a beginning is a token."""
    return list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))


def _byte_level(special):
    """Byte-level BPE over all bytes, with the special tokens first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges([*("Ġ" + word for word in SPACED), *LINES])
    pieces = [*special, *alphabet, *(a + b for a, b in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizer


def _first(tokenizer, token):
    """Puts a special token in front of every text."""
    place = tokenizer.token_to_id(token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, place)]
    )


def gpt2():
    """GPT-2's: no special token in front."""
    tokenizer = _byte_level(["<|endoftext|>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    names = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def opt():
    """OPT's: GPT-2's rules behind </s>."""
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    _first(tokenizer, "</s>")
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def llama3():
    """Llama 3's: byte-level, with GPT-4's way to split."""
    tokenizer = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    _first(tokenizer, "<|begin_of_text|>")
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def roberta():
    """RoBERTa's: GPT-2's rules between <s> and </s>; <mask> takes the space before it."""
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    mask = AddedToken("<mask>", lstrip=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=mask, **names)


def word_piece(*, lower=True):
    """BERT's, in lower case or with capitals: spaces are dropped, ## marks the rest of a word."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [word.lower() if lower else word for word in [*SPACED, *LINES]]
    letters = sorted({c.lower() if lower else c for c in ASCII})
    pieces = [*special, *letters, *("##" + c for c in letters), *words]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def unigram(*, prefix=True):
    """SentencePiece's unigram, as ALBERT's and T5's: a line break is a space, and several are one.

    With a dummy prefix a text begins as if a space stood before it; without, it does not.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    words = dict.fromkeys(["▁" + word for word in [*SPACED, *LINES]])
    pieces = [(piece, 0.0) for piece in special] + [(word, -4.0) for word in words]
    pieces += [(letter, -8.0) for letter in ["▁", *ASCII] if letter not in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("\n", " "), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    scheme = "always" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens([*special[:4], AddedToken("<mask>", lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    mask = AddedToken("<mask>", lstrip=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=mask, **names)


def llama():
    """Llama's: SentencePiece BPE with bytes for what it has no letter for, and a dummy prefix."""
    special, marked = ["<unk>", "<s>", "</s>"], ["▁" + word for word in SPACED]
    merges = _merges([*marked, *LINES])
    pieces = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *ASCII]
    pieces += [a + b for a, b in merges]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(special)
    _first(tokenizer, "<s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


CAUSAL = {
    "gpt2": gpt2,
    "opt": opt,
    "llama": llama,
    "llama3": llama3,
    "unigram": unigram,
    "unigram without prefix": lambda: unigram(prefix=False),
}
MASKED = {
    "roberta": roberta,
    "bert": word_piece,
    "bert, cased": lambda: word_piece(lower=False),
    "unigram": unigram,
    "unigram without prefix": lambda: unigram(prefix=False),
}
