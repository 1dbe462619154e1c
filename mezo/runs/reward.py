"""What `mezo train --reward` does, as a function.

    result = reward_run.train(ModelArguments("Qwen/Qwen2.5-0.5B-Instruct"),
                              RewardArguments(["rules.py:short"], train_file="prompts.jsonl"),
                              RewardTrainArguments("runs/short"))

Leaves in output_dir what `run.train` does: run.mezo, result.json, checkpoints, the tuned model.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mezo import rewards, tasks
from mezo.arguments import RewardArguments
from mezo.errors import InputError
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.runs import methods
from mezo.runs import task as task_run
from mezo.runs.arguments import RewardTrainArguments
from mezo.runs.result import checkpoint_of, environment, make_folder, write_result
from mezo.tasks.reading import READERS, read
from mezo.tasks.task import fields_of, fill
from mezo.trainers import placement
from mezo.trainers.policy import MeZOPolicyTrainer

_SHOWN = 3  # samples of text in the result
_SHOWN_DRAW = 2**32 - 1


def train(
    model_args: ModelArguments, data: RewardArguments, args: RewardTrainArguments
) -> dict[str, Any]:
    """Train on the rewards that `data` names; returns the result, which is also written."""
    began = time.perf_counter()
    if not data.reward:
        raise InputError("--reward names no function and no command")
    functions = [rewards.resolve(text, data.reward_timeout) for text in data.reward]
    train_rows, dev_rows = prompts(data)
    if args.method != "mezo":
        raise InputError(f"--method {args.method}: a reward has no gradient, only mezo trains it")
    task_run.check_arguments(args, model_args)
    checkpoint = checkpoint_of(args)
    make_folder(args.output_dir)
    begins = methods.started_with(model_args, args.output_dir, checkpoint)
    model, tokenizer = placement.load(begins, args)
    models.refuse_quantised(model)
    if not model.can_generate():
        raise InputError(f"model {model_args.model_name_or_path} generates no text")
    args.dataloader_pin_memory = False  # there is nothing but text
    with task_run.trained_part(model, model_args):
        trainer = MeZOPolicyTrainer(model, functions, args, train_rows, dev_rows, tokenizer)
        trainer.run_config = asdict(model_args) | asdict(data) | (trainer.run_config or {})
        with trainer.offloaded():
            before, texts = trainer.evaluate(), _texts(trainer, dev_rows)
            output = trainer.train(resume_from_checkpoint=checkpoint)
            after, written = trainer.evaluate(), _texts(trainer, dev_rows)
    rows = zip(dev_rows, texts, written, strict=False)
    if args.offload_write_every:
        trainer.save_model(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    result = {
        "reward": data.reward,
        "model": model_args.model_name_or_path,
        "before": _named(before),
        "after": _named(after),
        "samples": [{"prompt": r["prompt"], "before": b, "after": a} for r, b, a in rows],
        "ties": trainer.ties.ties,
        "estimates": trainer.ties.estimates,
        "steps": trainer.state.global_step,
        "train_loss": output.training_loss,
        "seconds": time.perf_counter() - began,
        "config": trainer.run_config,
        "environment": environment(),
    }
    return write_result(args.output_dir, result)


def prompts(data: RewardArguments) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows to evaluate, with a `prompt` each."""
    if not data.train_file:
        raise InputError("--train_file is missing: a file of prompts")
    for name in ("num_train", "num_dev"):
        if (value := getattr(data, name)) is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    train_rows = _rows(data, data.train_file)
    if data.dev_file:
        dev_rows = _mixed(_rows(data, data.dev_file), data.split_seed)[: data.num_dev]
    else:
        size = min(data.num_dev, len(train_rows) // 5)
        if size == 0:
            raise InputError(f"{len(train_rows)} prompts are too few to train and to evaluate")
        mixed = _mixed(train_rows, data.split_seed)
        train_rows, dev_rows = mixed[:-size], mixed[-size:]
    if data.num_train is not None:
        train_rows = train_rows[: data.num_train]
    return train_rows, dev_rows


def _mixed(rows: Sequence[Any], seed: int) -> list[Any]:
    return list(tasks.sample(rows, len(rows), seed))


def _rows(data: RewardArguments, file: str) -> list[dict]:
    rows = []
    for place, row in read(Path(file), READERS):
        wanted = ["prompt"] if data.prompt is None else fields_of(data.prompt)
        for name in wanted:
            if row.get(name) is None:
                found = ", ".join(row)
                raise InputError(f"{file} {place} has no column {name!r}, it has {found}")
        if data.prompt is not None:
            row = row | {"prompt": fill(data.prompt, {n: str(row[n]) for n in wanted})}
        if not isinstance(row["prompt"], str | list) or not row["prompt"]:
            raise InputError(f"{file} {place}: the prompt is neither a text nor a conversation")
        rows.append(row)
    if not rows:
        raise InputError(f"{file} is empty")
    return rows


def _texts(trainer: Any, rows: list[dict]) -> list[str]:
    shown = trainer.sample(rows[:_SHOWN], _SHOWN_DRAW)
    return [completion.text for completion in shown.completions]


def _named(metrics: dict[str, float]) -> dict[str, float]:
    kept = ("reward", "completions/", "unscored")
    found = {name.removeprefix("eval_"): x for name, x in metrics.items()}
    return {name: x for name, x in found.items() if name.startswith(kept)}
