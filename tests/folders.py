"""A user's folder in miniature: models to load, files to train on, and the command line."""

import json
from pathlib import Path

import torch
from models import tiny_model
from safetensors.torch import load_file
from tiny_tokenizers import byte_bpe, unigram, word_piece

from mezo.cli import main as cli

TOKENIZERS = {"opt": byte_bpe, "llama": unigram, "encoder": word_piece}
OWN = ["--prompt", "{text} It was", "--candidates", " terrible", " great"]


def model_folder(path: Path, kind: str = "opt") -> Path:
    """A random model of two layers and its tokenizer, as save_pretrained leaves them."""
    tokenizer = TOKENIZERS[kind]()
    tiny_model(kind, len(tokenizer)).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def reviews(path: Path, count: int = 24) -> Path:
    """A JSONL file of texts of unlike length, labels 0 and 1 in turn."""
    texts = ("no wit , only labored gags", "a charming journey .", "dull", "the film of the year")
    rows = [{"text": " never" * (i % 3) + texts[i % 4], "label": i % 2} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def training(folder: Path, model: Path, **changes) -> list[str]:
    """Options of a short run on reviews(), with a rate at which every step changes weights."""
    options = {"model": model, "output_dir": folder / "a run", "max_steps": 4, "seed": 5}
    options |= {"train_file": folder / "reviews.jsonl", "dev_file": folder / "reviews.jsonl"}
    options |= {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "use_cpu": True}
    options |= {"eval_steps": 2, "save_steps": 2} | changes
    return [f"--{name}={value}" for name, value in options.items()] + OWN


def mezo(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run in this process."""
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    return code, *capsys.readouterr()


def same_weights(one: Path, other: Path) -> bool:
    """Bitwise, and there are some."""
    (name,) = {path.name for path in one.glob("*.safetensors")}
    left, right = load_file(one / name), load_file(other / name)
    return (
        bool(left)
        and left.keys() == right.keys()
        and all(torch.equal(left[key], right[key]) for key in left)
    )
