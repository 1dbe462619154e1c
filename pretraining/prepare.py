"""From texts to token ids: python -m pretraining.prepare causal --source reviews.txt.zst ...

Writes to --output_dir: train.0.npy (and on, with --shards), heldout.npy, data.json (what was
taken), and tokenizer/, which AutoTokenizer loads. `causal` trains a byte-level BPE with OPT's
special tokens; `masked` takes the WordPiece of the encoder that masked.py trains on.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pretraining.corpus import documents, save_ids
from pretraining.masked import encoder_folder

BATCH = 500  # documents encoded in one call


def train_tokenizer(
    texts: list[str], *, vocab_size: int, lowercase: bool, context: int
) -> PreTrainedTokenizerBase:
    """A byte-level BPE that opens each text with </s>, as OPT's does."""
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],  # OPT's ids 0 to 3
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
    )


def equal_shares(sources: list[list[str]], characters: float) -> list[str]:
    """As much of each source, about `characters` together, for the tokenizer to learn from."""
    taken = []
    for texts in sources:
        room = characters / len(sources)
        for text in texts:
            taken.append(text)
            room -= len(text)
            if room < 0:
                break
    return taken


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], separator: int, limit: float
) -> tuple[list[np.ndarray], int]:
    """Token ids of whole texts until `limit` tokens, and the bytes of the texts taken."""
    parts: list[np.ndarray] = []
    tokens = size = 0
    for i in range(0, len(texts), BATCH):
        some = texts[i : i + BATCH]
        encoded = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        for text, ids in zip(some, encoded, strict=True):
            if tokens >= limit:
                return parts, size
            parts.append(np.array([*ids, separator], dtype=np.uint16))
            tokens += len(ids) + 1
            size += len(text.encode())
    return parts, size


def read_sources(values: list[str], seed: int) -> dict[str, tuple[list[str], float]]:
    """FILE or FILE=TOKENS -> {file's name: (its documents in a random order, tokens wanted)}."""
    sources = {}
    for value in values:
        path, _, tokens = value.partition("=")
        texts = list(documents(Path(path)))
        random.Random(seed).shuffle(texts)
        sources[Path(path).name] = (texts, float(tokens or "inf"))
    return sources


def write_ids(
    tokenizer: PreTrainedTokenizerBase,
    sources: dict[str, tuple[list[str], float]],
    args: argparse.Namespace,
) -> dict:
    """Encodes, mixes by document, writes the token files; returns the record for data.json."""
    separator = tokenizer.sep_token_id or tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    heldout: list[np.ndarray] = []
    heldout_bytes, taken_of = 0, {}
    for name, (texts, wanted) in sources.items():
        share = args.heldout_tokens / len(sources)
        held, held_bytes = encode(tokenizer, texts, separator, share)
        taken, taken_bytes = encode(tokenizer, texts[len(held) :], separator, wanted)
        tokens = sum(map(len, taken))
        taken_of[name] = {"tokens": tokens, "bytes": taken_bytes}
        heldout_bytes += held_bytes
        parts += taken
        heldout += held
        print(f"{name}: {tokens:,} tokens, {taken_bytes / tokens:.2f} bytes each", file=sys.stderr)
    random.Random(args.seed).shuffle(parts)
    suffix = ".npy.xz" if args.xz else ".npy"
    for shard in range(args.shards):
        ids = np.concatenate(parts[shard :: args.shards])
        save_ids(args.output_dir / f"train.{shard}{suffix}", ids)
    save_ids(args.output_dir / "heldout.npy", np.concatenate(heldout))
    return {
        "sources": taken_of,
        "heldout_tokens": sum(map(len, heldout)),
        "heldout_bytes": heldout_bytes,
        "seed": args.seed,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Text corpora to token ids.")
    parser.add_argument("kind", choices=["causal", "masked"])
    parser.add_argument("--source", action="append", required=True, metavar="FILE[=TOKENS]",
                        help="zstd text, how many tokens to take of it; repeatable")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=6144)
    parser.add_argument("--lowercase", action="store_true", help="an uncased causal model")
    parser.add_argument("--context", type=int, default=256, help="the tokenizer's longest text")
    parser.add_argument("--tokenizer_characters", type=float, default=3e7)
    parser.add_argument("--heldout_tokens", type=float, default=2e5)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--xz", action="store_true", help="compressed token files, for transport")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sources = read_sources(args.source, args.seed)
    if args.kind == "causal":
        texts = equal_shares([texts for texts, _ in sources.values()], args.tokenizer_characters)
        tokenizer = train_tokenizer(
            texts, vocab_size=args.vocab_size, lowercase=args.lowercase, context=args.context
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    record = write_ids(tokenizer, sources, args)
    (args.output_dir / "data.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
