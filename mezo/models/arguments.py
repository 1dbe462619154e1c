"""The options that name a model and say which of its weights are trained.

It is a dataclass for HfArgumentParser. Nothing heavy is imported, so that `--help` is quick.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def options(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text})


@dataclass
class ModelArguments:
    """The model, and which of its weights are trained."""

    model_name_or_path: str = field(
        default="causal-lm",
        metadata={
            "help": "Hub name, folder or GGUF file; or an embedded model: causal-lm (19.1 M "
            "weights), smollm2, minilm (an encoder).",
            "aliases": ["--model"],
        },
    )
    model_revision: str = option("main", "Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Data type of the weights; auto keeps that of the checkpoint."
    )
    trust_remote_code: bool = option(
        False, "Run code that comes with the model; without it such a model is refused."
    )
    use_peft: bool = option(False, "Train an adapter, by default LoRA, instead of all weights.")
    peft_type: str = option(
        "lora", "Type of the adapter: lora, prefix, prompt, or another of peft (ia3, vera, ...)."
    )
    num_virtual_tokens: int = option(
        5, "Number of virtual tokens of a prefix or prompt (Table 15: 5)."
    )
    peft_options: str | None = option(
        None, "More options of the adapter, as JSON: '{\"use_dora\": true}'."
    )
    lora_r: int = option(8, "Rank of LoRA (Table 15: 8).")
    lora_alpha: int = option(16, "LoRA is scaled by lora_alpha / lora_r (Table 15: 16).")
    lora_target_modules: list[str] = options(
        "Modules that receive the adapter; query_value chooses those of the paper. Default for "
        "LoRA: all linear modules."
    )
    load_in_8bit: bool = option(False, "Quantise the frozen weights to 8 bits with bitsandbytes.")
    load_in_4bit: bool = option(
        False, "Quantise the frozen weights to 4 bits (NF4) with bitsandbytes."
    )
    trainable: str | None = option(
        None,
        "train: only the head, biases, norms or biases_and_norms, or only the weights whose names "
        "match this regular expression.",
    )
    freeze_layers: int = option(
        0, "train: freeze this many lower layers, and run them only once per text."
    )
