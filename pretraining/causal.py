"""A small OPT from scratch: python -m pretraining.causal --data_dir ids --minutes 75 ...

Muon for the matrices inside the layers, AdamW for embeddings, norms and biases; windows packed
across documents, each opened with </s>: what a prompt opens with when the model is used.
On a GPU: bf16 autocast and torch.compile. On a CPU: fp32.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, GenerationConfig, OPTConfig, OPTForCausalLM

from pretraining import card, sst2
from pretraining.corpus import consecutive_windows, load_ids, windows
from pretraining.muon import Muon
from pretraining.schedule import DEVICE, Trained, add_arguments, fit, mean_loss


def build(args: argparse.Namespace, tokenizer) -> OPTForCausalLM:
    torch.manual_seed(args.seed)
    config = OPTConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,  # whole tiles for the GPU's matrix units
        hidden_size=args.hidden_size,
        word_embed_proj_dim=args.hidden_size,
        ffn_dim=4 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        max_position_embeddings=args.context,
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = OPTForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        top_p=0.95,
    )
    return model


def make_optimizers(model: OPTForCausalLM, args: argparse.Namespace) -> list:
    """Muon's updates have the RMS of AdamW's (arXiv:2502.16982), so both rates are of one scale."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
    muon = Muon(matrices, lr=args.muon_lr, weight_decay=0.1)
    adamw = torch.optim.AdamW(rest, lr=args.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


class WindowLoss(torch.nn.Module):
    """ids (batch, context - 1) -> mean loss of every one of them, </s> put before the first."""

    def __init__(self, model: OPTForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.opening: int = model.config.bos_token_id

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        opening = torch.full_like(ids[:, :1], self.opening)
        inputs = torch.cat([opening, ids[:, :-1]], dim=1)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        logits = self.model(inputs, position_ids=positions, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())


def train(model: OPTForCausalLM, tokenizer, args: argparse.Namespace) -> None:
    window_loss = WindowLoss(model.to(DEVICE))
    if args.compile:
        window_loss.compile()

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda"):
            return window_loss(ids.to(DEVICE, non_blocking=True))

    def save(folder: Path, trained: Trained | None) -> None:
        ids = load_ids([args.data_dir / "heldout.npy"])
        loss = mean_loss(loss_of, consecutive_windows(ids, args.context, args.batch_size))
        text = describe(model, tokenizer, args, loss, trained)
        print(text, file=sys.stderr, flush=True)
        card.save(folder, model, tokenizer, text)

    ids = load_ids(sorted(args.data_dir.glob("train.*")))
    trained = fit(
        loss_of,
        windows(ids, args.context, args.batch_size, args.seed),
        make_optimizers(model, args),
        minutes=args.minutes,
        snapshot_minutes=args.snapshot_minutes,
        on_snapshot=lambda n: save(args.snapshot_dir / f"snapshot-{n}", None),
    )
    save(args.output_dir, trained)


def describe(model, tokenizer, args, loss: float, trained: Trained | None) -> str:
    """The model card; a snapshot's (trained is None) says that it is one."""
    data = card.read_data(args.data_dir)
    bits = loss / math.log(2) * data["heldout_tokens"] / data["heldout_bytes"]
    figures = {
        "parameters": f"{model.num_parameters():,}",
        "layers, width, heads": f"{args.num_layers}, {args.hidden_size}, {args.num_heads}",
        "vocabulary, context": f"{len(tokenizer):,}, {args.context}",
        "held-out loss": f"{loss:.3f} nats per token, {bits:.3f} bits per byte",
    }
    if args.sst2_dev:
        accuracy = sst2.causal_accuracy(model, tokenizer, args.sst2_dev)
        figures["SST-2 dev, zero-shot"] = f"{accuracy:.1%} (`{{sentence}} It was great / terrible`)"
    figures["training"] = str(trained or "not finished: a snapshot")
    figures["batch"] = f"{args.batch_size} windows of {args.context} tokens"
    figures["optimizer"] = (
        f"Muon, lr {args.muon_lr}, weight decay 0.1 (matrices); AdamW, lr {args.adamw_lr} (rest); "
        "3 % warmup, then linear to zero"
    )
    return card.text(
        title="A small causal language model",
        pipeline="text-generation",
        licence="other",
        about=(
            "An `OPTForCausalLM` trained from scratch with `pretraining/causal.py`, for trying "
            "MeZO without a download. It knows little of the world; do not use it for facts."
        ),
        data=data,
        figures=figures,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small OPT from scratch.")
    add_arguments(parser)
    parser.add_argument("--hidden_size", type=int, default=192)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--num_heads", type=int, default=3)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16, help="windows in a step")
    parser.add_argument("--muon_lr", type=float, default=1e-2)
    parser.add_argument("--adamw_lr", type=float, default=1e-2)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(args.data_dir / "tokenizer")
    train(build(args, tokenizer), tokenizer, args)


if __name__ == "__main__":
    main()
