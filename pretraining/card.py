"""A trained model's folder: weights in half precision, tokenizer, data and figures in README.md."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretraining.corpus import licence_of


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str
) -> None:
    """Writes the folder; `model` itself keeps its precision."""
    # parameters, not state_dict: each tied matrix once
    halves = {name: p.detach().to(torch.float16) for name, p in model.named_parameters()}
    model.save_pretrained(folder, state_dict=halves)
    model.config.save_pretrained(folder)  # names float32: half on disk, loaded as what it trained
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def read_data(folder: Path) -> dict:
    """What prepare.py wrote of the token files beside it."""
    return json.loads((folder / "data.json").read_text())


def text(
    *, title: str, pipeline: str, licence: str, about: str, data: dict, figures: dict[str, str]
) -> str:
    """The model card: what it is, what it was trained on, the figures as a table."""
    front = [
        "---",
        "language: en",
        f"license: {licence}",
        "library_name: transformers",
        f"pipeline_tag: {pipeline}",
        "---",
    ]
    sources = [
        f"- `{name}`: {source['tokens']:,} tokens, {source['bytes']:,} bytes; {licence_of(name)}"
        for name, source in data["sources"].items()
        if source["tokens"]
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures.items())]
    return "\n".join([
        *front, "", f"# {title}", "", about, "", "## Training text", "", *sources, "",
        "19 of the 2,693 sentences of SST-2's dev and test sets share an 8-gram with the reviews.",
        "", "## Recipe and figures", "", *table, "",
    ])  # fmt: skip
