"""The options that name the data of a run: dataclasses for transformers' HfArgumentParser.

Nothing heavy is imported, so that `--help` is quick.
"""

from dataclasses import dataclass
from typing import Literal

from mezo.models.arguments import option, options


@dataclass
class DataArguments:
    """Which examples, and the words that put them to the model."""

    task: str = option("opinions", "mezo tasks lists them; custom with the files below.")
    data_dir: str | None = option(None, "Folder: as published, or train, dev and test files.")
    train_file: str | None = option(None, "JSONL, CSV, TSV or parquet.")
    dev_file: str | None = option(None, "Default: split off the training examples.")
    test_file: str | None = option(None, "Default: the dev examples.")
    prompt: str | None = option(None, "Template of a custom task: '{text} It was'.")
    candidates: list[str] = options("One a label: ' terrible' ' great'. Spaces count.")
    labels: list[str] = options("Values of the label column, in the candidates' order.")
    label_column: str = option("label", "Column that holds the label.")
    k: int | None = option(None, "Few-shot: k training and k dev examples a label.")
    num_train: int | None = option(None, "At most so many training examples (paper: 1000).")
    num_dev: int | None = option(None, "At most so many dev examples (paper: 500).")
    num_test: int | None = option(None, "At most so many test examples (with --k: 1000).")
    split_seed: int = option(42, "Of the choice of examples.")
    max_length: int | None = option(None, "Limit in tokens; default: the model's own.")
    truncate: bool = option(False, "Cut longer examples instead of refusing them.")
    demonstrations: int = option(0, "eval: examples shown before each question.")
    demonstrations_per_example: bool = option(
        False, "eval: draw other demonstrations for each question, as in the paper."
    )
    calibrate: bool = option(False, "Subtract the scores of an empty example (Zhao et al., 2021).")
    calibration: Literal["content_free", "sfc"] = option(
        "content_free", "What --calibrate subtracts; sfc: the scores after the task's sfc_prompt."
    )
    as_published: bool = option(
        False, "Make the published code's choices where ours differ: docs/paper.md lists them."
    )


@dataclass
class TextArguments:
    """Which rows, for `mezo sft` and `mezo dpo`: a file, or a set of the hub, in TRL's formats."""

    train_file: str | None = option(None, "JSONL, CSV or parquet.")
    dev_file: str | None = option(None, "Rows to evaluate on; default: none.")
    dataset_name: str | None = option(None, "A data set of the hub, or a folder, instead.")
    dataset_config: str | None = option(None, "Its configuration, where it has several.")
    dataset_train_split: str = option("train", "Its split to train on.")
    dataset_test_split: str | None = option(None, "Its split to evaluate on; default: none.")


@dataclass
class RewardArguments:
    """What is rewarded, and on which prompts."""

    reward: list[str] = options("file.py:function, module:function, or a command in quotes.")
    reward_timeout: float = option(10.0, "Seconds that a command has for a sample.")
    train_file: str = option("", "JSONL, CSV, TSV or parquet with a column 'prompt'.")
    dev_file: str | None = option(None, "Default: split off the training prompts.")
    prompt: str | None = option(None, "Template over the columns, in place of one 'prompt'.")
    num_train: int | None = option(None, "At most so many training prompts.")
    num_dev: int = option(64, "At most so many prompts for evaluation.")
    split_seed: int = option(42, "Of the choice of prompts.")
