"""Tune on your own text with TRL's trainers and MeZO: the functions of `mezo sft` and `mezo dpo`.

    MeZOSFTTrainer(model, MeZOSFTConfig("out"), train_dataset=rows, processing_class=tokenizer)

Data formats, chat templates, packing and losses are those of TRL. A row has "text", or "prompt" and
"completion" (only the completion counts for the loss), or "messages"; for DPO and reward models it
has "prompt", "chosen" and "rejected".
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from mezo.compatibility import delete_adapter
from mezo.errors import InputError
from mezo.foreign import check_dataset_reach, check_file, check_name, foreign, reason_of
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.runs.data_arguments import TextArguments
from mezo.runs.lifecycle import carry_out
from mezo.runs.methods import passes_of_a_step
from mezo.runs.plan import Plan, Tell, resolve
from mezo.tasks.reading import READERS, read
from mezo.trainers.placement import load
from mezo.trainers.trl import MeZODPOConfig, MeZODPOTrainer, MeZOSFTConfig, MeZOSFTTrainer

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMNS = {  # the columns that a row may have, by TRL's names
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "dpo": (("chosen", "rejected"),),
}


@dataclass
class _CommandLine:
    """Defaults of `mezo sft` and `mezo dpo`: those of `mezo train`, with a rate by model size."""

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate; by default chosen by the model's size and by what is trained."
        },
    )
    mezo_eps: float | None = field(
        default=None,
        metadata={
            "help": "Size of the perturbation; default 1e-3, for adapters 1e-2, for a prefix 1e-1."
        },
    )
    max_steps: int = 20_000  # Table 16
    per_device_train_batch_size: int = 16  # Table 16
    save_strategy: str = "steps"
    save_steps: float = 500
    eval_steps: float = 500
    logging_steps: float = 50  # its default, 500, leaves a slow run silent for an hour
    save_total_limit: int | None = 1
    report_to: str = "none"


@dataclass
class SFTArguments(_CommandLine, MeZOSFTConfig):  # type: ignore[misc]
    """Training options of `mezo sft`."""

    output_dir: str = "runs/sft"  # type: ignore[assignment]


@dataclass
class DPOArguments(_CommandLine, MeZODPOConfig):  # type: ignore[misc]
    """Training options of `mezo dpo`."""

    output_dir: str = "runs/dpo"  # type: ignore[assignment]


TRAINERS: dict[str, Any] = {"sft": MeZOSFTTrainer, "dpo": MeZODPOTrainer}
ARGUMENTS: dict[str, Any] = {"sft": SFTArguments, "dpo": DPOArguments}


def train(
    kind: str,
    model_args: ModelArguments,
    data_args: TextArguments,
    args: Any,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Tune a model on rows of text or preferences, and return the result, which is also written.

    The log can be replayed without TRL and without data.

    Args:
        kind: "sft" or "dpo".
        model_args: The model, and which of its weights are trained.
        data_args: The rows.
        args: SFTArguments or DPOArguments, or another config of the same TRL trainer.
        tell: Called with a line about values that were chosen because they were not given.

    Raises InputError for rows in none of TRL's formats, and for whatever TRL refuses.
    """
    if kind == "dpo" and models.is_adapter(model_args.model_name_or_path):
        raise InputError(
            "dpo on a saved adapter keeps a copy of it as the reference, which a replay would not "
            "have: merge it into its model first (merge_and_unload)"
        )
    if model_args.freeze_layers:
        raise InputError(f"freeze_layers is for mezo train, not for mezo {kind}")
    rows, held_out = load_rows(kind, data_args)
    if held_out is not None and args.eval_strategy == "no":
        args.eval_strategy = type(args.eval_strategy)("steps")
    plan = resolve(model_args, data_args, args, tell)
    return carry_out(TextKind(kind, rows, held_out), plan)


@dataclass(frozen=True)
class TextKind:
    """The parts of a run that are specific to text (lifecycle.Kind)."""

    kind: str  # "sft" or "dpo"
    rows: Dataset
    held_out: Dataset | None

    def settled(self, plan: Plan, model: Any, tokenizer: Any) -> Plan:
        return plan

    def trainer(self, plan: Plan, model: Any, tokenizer: Any) -> Any:
        if not model.can_generate():
            name = type(model).__name__
            raise InputError(f"{self.kind} is for causal language models, {name} is none")
        reference = None  # with None, TRL loads one if it needs it
        beside = self.kind == "dpo" and not hasattr(model, "peft_config")
        if plan.args.offload and beside and not plan.args.precompute_ref_log_probs:
            reference = load(plan.begins, plan.args)[0]
        data = (self.rows, self.held_out)
        return _trainer(self.kind, model, tokenizer, data, plan.args, reference)

    def before(self, plan: Plan, trainer: Any) -> dict[str, Any]:
        return {"method": f"mezo-{self.kind}"}

    def after(self, plan: Plan, trainer: Any, found: dict[str, Any]) -> dict[str, Any]:
        history = trainer.state.log_history
        evals = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        passes = passes_of_a_step(plan.args) * trainer.state.global_step
        return {"eval_loss": evals[-1] if evals else None, "forward_passes": passes}


def _trainer(kind: str, model, tokenizer, data: tuple, args: Any, reference: Any):
    adapter = {}
    if hasattr(model, "peft_config"):
        adapter = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    options = {"train_dataset": data[0], "eval_dataset": data[1], "processing_class": tokenizer}
    options |= {} if reference is None else {"ref_model": reference}
    with warnings.catch_warnings():  # about names that transformers and peft have replaced
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "Adapter name 'ref'")
        try:
            trainer = TRAINERS[kind](model, args=args, **options)
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            raise InputError(f"{kind}: {error}") from error
    if isinstance(trainer.train_dataset, Dataset) and len(trainer.train_dataset) == 0:
        raise InputError(
            f"{kind}: max_length {args.max_length} cuts off all that would be trained, in every "
            "row: raise it"
        )
    if adapter and "ref" in model.peft_config:  # TRL's copy of a new adapter, for the reference:
        delete_adapter(model, "ref")  # the base model is as good, and is what a replay has
        model.set_adapter("default")
    for name, p in model.named_parameters():
        if name in adapter:  # TRL casts it to bfloat16 on a 4-bit base, where a step would be lost
            p.data = adapter[name]
    return trainer


def load_rows(kind: str, args: TextArguments) -> tuple[Dataset, Dataset | None]:
    """Return the training rows and the rows to evaluate on (or None), from files or the hub."""
    if (args.train_file is None) == (args.dataset_name is None):
        raise InputError("give --train_file or --dataset_name, one of them")
    if args.dataset_name is not None:
        held_out = args.dataset_test_split and _from_hub(args, args.dataset_test_split)
        rows = _from_hub(args, args.dataset_train_split)
    else:
        rows = _from_file(args.train_file)
        held_out = None if args.dev_file is None else _from_file(args.dev_file)
    for name, found in (("training data", rows), ("evaluation data", held_out)):
        if found is not None:
            _check(kind, name, found)
    return rows, held_out


def _from_file(name: str | None) -> Dataset:
    path = Path(str(name))
    if path.suffix not in FORMATS:
        raise InputError(f"{path} is not one of {', '.join(FORMATS)}")
    check_name(path, "file")
    if not path.exists():
        raise InputError(f"file not found: {path}")
    if check_file(path).stat().st_size == 0:
        raise InputError(f"{path} is empty")
    kind = FORMATS[path.suffix]
    if kind == "csv":  # datasets would read 1 as a number and NA as missing
        rows = [{name: row[name] or None for name in row} for _, row in read(path, READERS)]
        with foreign(f"{path} cannot be read as {kind}"):
            return Dataset.from_list(rows)
    if kind == "json":  # arrow takes any bytes for text, and crashes on a first row of null
        for _ in read(path, READERS):
            pass
    with foreign(f"{path} cannot be read as {kind}"):
        try:
            return load_dataset(kind, data_files=str(path), split="train")
        except DatasetsError as error:
            raise error.__cause__ or error from None


def _from_hub(args: TextArguments, split: str) -> Dataset:
    try:
        check_dataset_reach(str(args.dataset_name))
        return load_dataset(args.dataset_name, args.dataset_config, split=split)
    except Exception as error:
        words = reason_of(error)
        raise InputError(f"dataset {args.dataset_name}, split {split}: {words}") from None


def _check(kind: str, name: str, rows: Dataset) -> None:
    """Raise InputError unless the columns are one of TRL's formats and every row has them."""
    had, formats = set(rows.column_names), COLUMNS[kind]
    needed = next((columns for columns in formats if had.issuperset(columns)), None)
    if needed is None:
        known = ", or ".join(" and ".join(columns) for columns in formats)
        raise InputError(
            f"{name}: {kind} wants the columns {known}; there are {', '.join(sorted(had))}"
        )
    if len(rows) == 0:
        raise InputError(f"{name}: there are no rows")
    for column in needed:
        for number, value in enumerate(rows[column], start=1):
            if value is None or value == []:
                raise InputError(f"{name}: row {number} has no {column}")
            if not _is_text_or_messages(column, value):
                wanted = "a list of messages" if column == "messages" else "text"
                raise InputError(
                    f"{name}: row {number}, column {column}, is {value!r:.60}, not {wanted}"
                    + ("; a CSV file cannot hold messages" if wanted != "text" else "")
                )


def _is_text_or_messages(column: str, value: Any) -> bool:
    """Return whether TRL accepts a value: a text, or a conversation of messages with text."""
    if isinstance(value, str):
        return column != "messages"
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in value
    )
