"""Tuning on one's own text: TRL's trainers with MeZO, and `mezo sft` and `mezo dpo` over them.

    MeZOSFTTrainer(model, MeZOSFTConfig("out"), train_dataset=rows, processing_class=tokenizer)

Data formats, chat templates, packing and losses are TRL's own. A row is {"text"}, {"prompt",
"completion"} (the loss is the completion's alone) or {"messages"}; for DPO and reward models
{"prompt", "chosen", "rejected"}.
"""

import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from mezo.arguments import TextArguments
from mezo.errors import InputError
from mezo.foreign import check_file, foreign, reason_of
from mezo.memory.measured import PeakMemory
from mezo.models import adapters as tuners
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.trainable import select
from mezo.runs.methods import check_adapter, passes_of_a_step, started_with
from mezo.runs.result import checkpoint_of, environment, make_folder, write_result
from mezo.tasks.reading import READERS, read
from mezo.trainers.placement import load
from mezo.trainers.trainer import changed
from mezo.trainers.trl import MeZODPOConfig, MeZODPOTrainer, MeZOSFTConfig, MeZOSFTTrainer

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COLUMNS = {  # what a row may have, in TRL's names
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "dpo": (("chosen", "rejected"),),
}


@dataclass
class _CommandLine:
    """Defaults of `mezo sft` and `mezo dpo`: those of `mezo train`."""

    max_steps: int = 20_000  # Table 16
    per_device_train_batch_size: int = 16  # Table 16
    save_strategy: str = "steps"
    save_steps: float = 500
    eval_steps: float = 500
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


def train(kind: str, model_args: ModelArguments, data_args: TextArguments, args: Any) -> dict:
    """Tune a model on rows of text or of preferences; returns and writes the result.

    Args:
        kind: "sft" or "dpo".
        args: SFTArguments or DPOArguments, or another config of the same TRL trainer.

    Leaves in output_dir what `runs.task.train` does; its log needs neither TRL nor data.
    Raises InputError for a file that is none of the formats, in TRL's words where it is TRL's.
    """
    began = time.perf_counter()
    check_adapter(model_args)
    data, held_out = load_rows(kind, data_args)
    checkpoint = checkpoint_of(args)
    make_folder(args.output_dir)
    if kind == "dpo" and models.is_adapter(model_args.model_name_or_path):
        raise InputError(
            "dpo on a saved adapter keeps a copy of it as the reference, which a replay would not "
            "have: merge it into its model first (merge_and_unload)"
        )
    begins = started_with(model_args, args.output_dir, checkpoint)
    model, tokenizer = load(begins, args)
    models.refuse_quantised(model)
    if not model.can_generate():
        raise InputError(f"{kind} is for causal language models, {type(model).__name__} is none")
    if model_args.trainable is not None:
        select(model, model_args.trainable)
    if held_out is not None and args.eval_strategy == "no":
        args.eval_strategy = type(args.eval_strategy)("steps")
    args.dataloader_pin_memory &= torch.accelerator.is_available()  # else it warns
    reference = None  # None: TRL loads it, where it needs one
    if args.offload and kind == "dpo" and not hasattr(model, "peft_config"):
        reference = None if args.precompute_ref_log_probs else load(begins, args)[0]
    trainer = _trainer(kind, model, tokenizer, (data, held_out), args, reference)
    config = asdict(model_args) | asdict(data_args) | changed(args)
    trainer.run_config = config
    with PeakMemory() as peak:
        output = trainer.train(resume_from_checkpoint=checkpoint)
    if args.offload_write_every:
        trainer.save_model(args.output_dir)
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    result = {
        "model": model_args.model_name_or_path,
        "method": f"mezo-{kind}" + tuners.method_of(model_args),
        "train_loss": output.training_loss,
        "eval_loss": evals[-1] if evals else None,
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - began,
        "forward_passes": passes_of_a_step(args) * trainer.state.global_step,
        "stored_bytes": Path(args.output_dir, "run.mezo").stat().st_size,
        "peak_memory_above_model": peak.bytes,
        "config": config,
        "environment": environment(),
    }
    return write_result(args.output_dir, result)


def _trainer(kind: str, model, tokenizer, data: tuple, args: Any, reference: Any):
    adapter = {}
    if hasattr(model, "peft_config"):
        adapter = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    options = {"train_dataset": data[0], "eval_dataset": data[1], "processing_class": tokenizer}
    options |= {} if reference is None else {"ref_model": reference}
    with warnings.catch_warnings():  # of names that transformers and peft have given up
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "Adapter name 'ref'")
        try:
            trainer = TRAINERS[kind](model, args=args, **options)
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            raise InputError(f"{kind}: {error}") from error
    if adapter and "ref" in model.peft_config:  # TRL's copy of a new adapter, for the reference:
        model.delete_adapter("ref")  # the base model is as good, and is what a replay has
        model.set_adapter("default")
    for name, p in model.named_parameters():
        if name in adapter:  # TRL casts it to bfloat16 on a 4-bit base, where a step would be lost
            p.data = adapter[name]
    return trainer


def load_rows(kind: str, args: TextArguments) -> tuple[Dataset, Dataset | None]:
    """Training rows, and those to evaluate on if there are any, from files or a set of the hub."""
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
        raise InputError(f"{path} is none of {', '.join(FORMATS)}")
    if not path.exists():
        raise InputError(f"file not found: {path}")
    if check_file(path).stat().st_size == 0:
        raise InputError(f"{path} is empty")
    kind = FORMATS[path.suffix]
    if kind == "csv":  # datasets would take 1 for a number, and NA for a missing value
        rows = [
            {name: cell or None for name, cell in row.items()} for _, row in read(path, READERS)
        ]
        return Dataset.from_list(rows)
    with foreign(f"{path} cannot be read as {kind}"):
        try:
            return load_dataset(kind, data_files=str(path), split="train")
        except DatasetsError as error:
            raise error.__cause__ or error from None


def _from_hub(args: TextArguments, split: str) -> Dataset:
    try:
        return load_dataset(args.dataset_name, args.dataset_config, split=split)
    except Exception as error:
        words = reason_of(error)
        raise InputError(f"dataset {args.dataset_name}, split {split}: {words}") from None


def _check(kind: str, name: str, rows: Dataset) -> None:
    """The columns are one of TRL's formats, and every row has them."""
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
    """Whether a value is what TRL takes: text, or a conversation of messages with text in them."""
    if isinstance(value, str):
        return column != "messages"
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in value
    )
