"""Zero-shot accuracy on SST-2, with the prompts of arXiv:2305.17333, Appendix E.2.

A row of dev.tsv: "it 's a charming and often affecting journey . <tab> 1"
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORDS = ("terrible", "great")  # in the order of the labels 0 and 1


def read(path: Path) -> tuple[list[str], torch.Tensor]:
    """Sentences and labels of a GLUE file."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [row[0].strip() for row in rows], torch.tensor([int(row[1]) for row in rows])


@torch.no_grad()
def causal_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, batch_size: int = 32
) -> float:
    """Prompt "{sentence} It was", candidate " great": the larger mean log-prob. per token."""
    sentences, labels = read(path)
    candidates = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in WORDS]
    scores = []
    for i in range(0, len(sentences), batch_size):
        prompts = tokenizer([f"{s} It was" for s in sentences[i : i + batch_size]])["input_ids"]
        columns = []
        for candidate in candidates:
            rows = [{"input_ids": prompt + candidate} for prompt in prompts]
            batch = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(model.device)
            logits = model(**batch).logits.float().log_softmax(-1)
            columns.append([
                sum(logits[r, len(p) - 1 + k, token].item() for k, token in enumerate(candidate))
                / len(candidate)
                for r, p in enumerate(prompts)
            ])  # fmt: skip
        scores.append(torch.tensor(columns).T)
    return (torch.cat(scores).argmax(1) == labels).float().mean().item()


@torch.no_grad()
def masked_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, batch_size: int = 32
) -> float:
    """Prompt "{sentence} It was [MASK].": the word with the larger logit at the mask."""
    sentences, labels = read(path)
    words = torch.tensor(tokenizer.convert_tokens_to_ids(list(WORDS)), device=model.device)
    predictions = []
    for i in range(0, len(sentences), batch_size):
        texts = [f"{s} It was {tokenizer.mask_token}." for s in sentences[i : i + batch_size]]
        batch = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        at_mask = model(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id]
        predictions.append(at_mask[:, words].argmax(1).cpu())
    return (torch.cat(predictions) == labels).float().mean().item()
