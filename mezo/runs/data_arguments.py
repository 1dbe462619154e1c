"""The options that name the data of a run: dataclasses for transformers' HfArgumentParser.

Nothing heavy is imported, so that `--help` is quick.
"""

from dataclasses import dataclass
from typing import Literal

from mezo.models.arguments import option, options


@dataclass
class DataArguments:
    """The examples, and the prompt that presents them to the model."""

    task: str = option("opinions", "Name of the task; `mezo tasks` lists them.")
    data_dir: str | None = option(
        None, "Folder with the published files, or with train, dev and test files."
    )
    train_file: str | None = option(None, "Training examples: JSONL, CSV, TSV or parquet.")
    dev_file: str | None = option(
        None, "Dev examples; by default they are split off the training examples."
    )
    test_file: str | None = option(None, "Test examples; by default the dev examples are used.")
    prompt: str | None = option(None, "Template of a custom task, such as '{text} It was'.")
    candidates: list[str] = options(
        "One candidate per label, such as ' terrible' ' great'; spaces count."
    )
    labels: list[str] = options("Values of the label column, in the candidates' order.")
    label_column: str = option("label", "Column that holds the label.")
    k: int | None = option(None, "Few-shot training: use k training and k dev examples per label.")
    num_train: int | None = option(None, "Largest number of training examples (paper: 1000).")
    num_dev: int | None = option(None, "Largest number of dev examples (paper: 500).")
    num_test: int | None = option(None, "Largest number of test examples (with --k: 1000).")
    split_seed: int = option(42, "Seed for selecting examples.")
    max_length: int | None = option(
        None, "Longest example in tokens; default: the model's own limit."
    )
    truncate: bool = option(False, "Cut longer examples instead of refusing them.")
    demonstrations: int = option(0, "eval: number of examples shown before each question.")
    demonstrations_per_example: bool = option(
        False, "eval: draw new demonstrations for each question, as in the paper."
    )
    calibrate: bool = option(False, "Subtract the scores of an empty example (Zhao et al., 2021).")
    calibration: Literal["content_free", "sfc"] = option(
        "content_free",
        "What --calibrate subtracts: the scores of an empty example (content_free) or the scores "
        "after the task's sfc_prompt (sfc).",
    )
    as_published: bool = option(
        False, "Follow the published code where this package differs from it (docs/paper.md)."
    )


@dataclass
class TextArguments:
    """The rows for `mezo sft` and `mezo dpo`: files or a data set of the hub, in TRL's formats."""

    train_file: str | None = option(None, "Training rows: JSONL, CSV or parquet.")
    dev_file: str | None = option(None, "Rows to evaluate on; default: none.")
    dataset_name: str | None = option(
        None, "Data set to use instead of files: its name on the hub, or a folder."
    )
    dataset_config: str | None = option(None, "Configuration of the data set, if it has several.")
    dataset_train_split: str = option("train", "Split of the data set to train on.")
    dataset_test_split: str | None = option(
        None, "Split of the data set to evaluate on; default: none."
    )


@dataclass
class RewardArguments:
    """The rewards, and the prompts to train on."""

    reward: list[str] = options(
        "Reward: file.py:function, module:function, or a command in quotes."
    )
    reward_timeout: float = option(10.0, "Seconds that a command may take for one sample.")
    train_file: str = option(
        "", "Training prompts: JSONL, CSV, TSV or parquet with a column 'prompt'."
    )
    dev_file: str | None = option(
        None, "Prompts for evaluation; by default they are split off the training prompts."
    )
    prompt: str | None = option(
        None, "Template over the file's columns, instead of a column 'prompt'."
    )
    held_out_file: str | None = option(
        None, "Texts, in a column 'text', whose loss shows at evaluations what is forgotten."
    )
    num_train: int | None = option(None, "Largest number of training prompts.")
    num_dev: int = option(64, "Largest number of prompts for evaluation.")
    split_seed: int = option(42, "Seed for selecting prompts.")
