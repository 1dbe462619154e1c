"""The options of the command line that transformers' TrainingArguments does not have.

Two dataclasses for HfArgumentParser, named as in transformers' and TRL's scripts. No heavy import,
so that `--help` is quick.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mezo.errors import InputError


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _options(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model, and which of its weights are trained."""

    model_name_or_path: str = field(
        default="minilm",
        metadata={
            "help": "Hub name, folder, or an embedded model: minilm (encoder), causal-lm.",
            "aliases": ["--model"],
        },
    )
    model_revision: str = _option("main", "Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Type of the weights; auto is the checkpoint's own."
    )
    trust_remote_code: bool = _option(False, "Run code that comes with the model. Off: refused.")
    use_peft: bool = _option(False, "Train an adapter, by default LoRA, instead of all weights.")
    peft_type: str = _option("lora", "lora, prefix, prompt, or another of peft: ia3, vera, ...")
    num_virtual_tokens: int = _option(5, "Of prefix and prompt (Table 15: 5).")
    peft_options: str | None = _option(None, "JSON, more of its options: '{\"use_dora\": true}'.")
    lora_r: int = _option(8, "LoRA's rank (Table 15: 8).")
    lora_alpha: int = _option(16, "LoRA's scale is lora_alpha / lora_r (Table 15: 16).")
    lora_target_modules: list[str] = _options("Modules that get it; for LoRA all linear ones.")
    load_in_8bit: bool = _option(False, "Quantise the frozen weights, by bitsandbytes.")
    load_in_4bit: bool = _option(False, "The same, 4 bits (NF4).")
    trainable: str | None = _option(
        None, "train: head, or only weights whose name this expression finds."
    )
    freeze_layers: int = _option(0, "train: freeze so many lower layers, run them once a text.")


@dataclass
class DataArguments:
    """Which examples, and the words that put them to the model."""

    task: str = _option("opinions", "mezo tasks lists them; custom with the files below.")
    data_dir: str | None = _option(None, "Folder: as published, or train, dev and test files.")
    train_file: str | None = _option(None, "JSONL, CSV, TSV or parquet.")
    dev_file: str | None = _option(None, "Default: split off the training examples.")
    test_file: str | None = _option(None, "Default: the dev examples.")
    prompt: str | None = _option(None, "Template of a custom task: '{text} It was'.")
    candidates: list[str] = _options("One a label: ' terrible' ' great'. Spaces count.")
    labels: list[str] = _options("Values of the label column, in the candidates' order.")
    label_column: str = _option("label", "Column that holds the label.")
    k: int | None = _option(None, "Few-shot: k training and k dev examples a label.")
    num_train: int | None = _option(None, "At most so many training examples (paper: 1000).")
    num_dev: int | None = _option(None, "At most so many dev examples (paper: 500).")
    num_test: int | None = _option(None, "At most so many test examples (with --k: 1000).")
    split_seed: int = _option(42, "Of the choice of examples.")
    max_length: int | None = _option(None, "Limit in tokens; default: the model's own.")
    truncate: bool = _option(False, "Cut longer examples instead of refusing them.")
    demonstrations: int = _option(0, "eval: examples shown before each question.")
    calibrate: bool = _option(False, "Subtract the scores of an empty example (Zhao et al., 2021).")
    calibration: Literal["content_free", "sfc"] = _option(
        "content_free", "What --calibrate subtracts; sfc: the scores after the task's sfc_prompt."
    )


@dataclass
class TextArguments:
    """Which rows, for `mezo sft` and `mezo dpo`: a file, or a set of the hub, in TRL's formats."""

    train_file: str | None = _option(None, "JSONL, CSV or parquet.")
    dev_file: str | None = _option(None, "Rows to evaluate on; default: none.")
    dataset_name: str | None = _option(None, "A data set of the hub, or a folder, instead.")
    dataset_config: str | None = _option(None, "Its configuration, where it has several.")
    dataset_train_split: str = _option("train", "Its split to train on.")
    dataset_test_split: str | None = _option(None, "Its split to evaluate on; default: none.")


@dataclass
class RewardArguments:
    """What is rewarded, and on which prompts."""

    reward: list[str] = _options("file.py:function, module:function, or a command in quotes.")
    reward_timeout: float = _option(10.0, "Seconds that a command has for a sample.")
    train_file: str = _option("", "JSONL, CSV, TSV or parquet with a column 'prompt'.")
    dev_file: str | None = _option(None, "Default: split off the training prompts.")
    prompt: str | None = _option(None, "Template over the columns, in place of one 'prompt'.")
    num_train: int | None = _option(None, "At most so many training prompts.")
    num_dev: int = _option(64, "At most so many prompts for evaluation.")
    split_seed: int = _option(42, "Of the choice of prompts.")


def read_options(path: str | Path, told: str, expected: str) -> dict[Any, Any]:
    """A YAML file that has what is `expected`; `told` names it in an InputError, if it is none."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{told}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{told} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{told}: expected {expected}")
    return found
