"""Train on rewards: what `mezo train --reward` does, as a function.

    result = reward_run.train(ModelArguments("Qwen/Qwen2.5-0.5B-Instruct"),
                              RewardArguments(["rules.py:short"], train_file="prompts.jsonl"),
                              RewardTrainArguments("runs/short"))

lifecycle.py says what the output folder then holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezo import rewards, tasks
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.runs.arguments import RewardTrainArguments
from mezo.runs.data_arguments import RewardArguments
from mezo.runs.lifecycle import carry_out
from mezo.runs.plan import Plan, Tell, resolve
from mezo.tasks.reading import READERS, read
from mezo.tasks.task import fields_of, fill
from mezo.trainers import engines
from mezo.trainers.policy import MeZOPolicyTrainer

_SHOWN = 3  # samples of text in the result
_SHOWN_DRAW = 2**32 - 1


def train(
    model_args: ModelArguments,
    data: RewardArguments,
    args: RewardTrainArguments,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Train on the rewards that `data` names, and return the result, which is also written.

    Raises InputError for options, rewards or prompts that do not fit.
    """
    if not data.reward:
        raise InputError("--reward names no function and no command")
    if args.method != "mezo":
        raise InputError(f"--method {args.method}: a reward has no gradient, only mezo trains it")
    engines.check(args.engine, args.engine_options, offload=args.offload)
    if args.engine != "transformers":
        engines.check_choices(args)
    held_out = texts(data.held_out_file) if data.held_out_file else []
    if args.stop_forgotten is not None and not held_out:
        raise InputError("--stop_forgotten needs texts: --held_out_file")
    plan = resolve(model_args, data, args, tell)
    functions = [rewards.resolve(text, data.reward_timeout) for text in data.reward]
    return carry_out(RewardKind(data.reward, functions, *prompts(data), held_out), plan)


@dataclass(frozen=True)
class RewardKind:
    """The parts of a run that are specific to rewards (lifecycle.Kind)."""

    names: list[str]
    functions: list[Any]
    train_rows: list[dict]
    dev_rows: list[dict]
    held_out: list[str] = field(default_factory=list)

    def settled(self, plan: Plan, model: Any, tokenizer: Any) -> Plan:
        return plan

    def trainer(self, plan: Plan, model: Any, tokenizer: Any) -> Any:
        if not model.can_generate():
            raise InputError(f"model {plan.model.model_name_or_path} generates no text")
        plan.args.dataloader_pin_memory = False  # batches hold only text
        data = (self.train_rows, self.dev_rows, tokenizer)
        return MeZOPolicyTrainer(model, self.functions, plan.args, *data, held_out=self.held_out)

    def before(self, plan: Plan, trainer: Any) -> dict[str, Any]:
        named = {"reward": self.names, "before": _named(trainer.evaluate())}
        shown = zip(self.dev_rows, _texts(trainer, self.dev_rows), strict=False)  # the first ones
        return named | {"samples": [{"prompt": row["prompt"], "before": x} for row, x in shown]}

    def after(self, plan: Plan, trainer: Any, found: dict[str, Any]) -> dict[str, Any]:
        after, written = _named(trainer.evaluate()), _texts(trainer, self.dev_rows)
        shown = zip(found["samples"], written, strict=True)
        samples = [sample | {"after": text} for sample, text in shown]
        ties = {"ties": trainer.ties.ties, "estimates": trainer.ties.estimates}
        trainer.close_engine()
        return {"after": after, "samples": samples} | ties


def prompts(data: RewardArguments) -> tuple[list[dict], list[dict]]:
    """Return the rows to train on and the rows to evaluate on, each with a `prompt`.

    Raises InputError if the file is missing, a row has no prompt, or there are too few.
    """
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


def texts(file: str) -> list[str]:
    """Return the column `text` of a file. Raises InputError if a row lacks it."""
    found = []
    for place, row in read(Path(file), READERS):
        if not isinstance(row.get("text"), str):
            raise InputError(f"{file} {place} has no column 'text', it has {', '.join(row)}")
        found.append(row["text"])
    if not found:
        raise InputError(f"{file} is empty")
    return found


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
    kept = ("reward", "completions/", "unscored", "held_out_loss")
    found = {name.removeprefix("eval_"): x for name, x in metrics.items()}
    return {name: x for name, x in found.items() if name.startswith(kept)}
