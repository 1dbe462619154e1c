"""The options that name a model and say which of its weights are trained.

A dataclass for HfArgumentParser. Nothing heavy is imported, so that `--help` is quick.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def options(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text})


@dataclass
class ModelArguments:
    """Which model, and which of its weights are trained."""

    model_name_or_path: str = field(
        default="causal-lm",
        metadata={
            "help": "Hub name, folder, GGUF file; or causal-lm (19.1 M), smollm2, minilm (encoder)",
            "aliases": ["--model"],
        },
    )
    model_revision: str = option("main", "Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Type of the weights; auto is the checkpoint's own."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model. Off: refused.")
    use_peft: bool = option(False, "Train an adapter, by default LoRA, instead of all weights.")
    peft_type: str = option("lora", "lora, prefix, prompt, or another of peft: ia3, vera, ...")
    num_virtual_tokens: int = option(5, "Of prefix and prompt (Table 15: 5).")
    peft_options: str | None = option(None, "JSON, more of its options: '{\"use_dora\": true}'.")
    lora_r: int = option(8, "LoRA's rank (Table 15: 8).")
    lora_alpha: int = option(16, "LoRA's scale is lora_alpha / lora_r (Table 15: 16).")
    lora_target_modules: list[str] = options(
        "Modules that get it; query_value: those of the paper. Default for LoRA: all linear ones."
    )
    load_in_8bit: bool = option(False, "Quantise the frozen weights, by bitsandbytes.")
    load_in_4bit: bool = option(False, "The same, 4 bits (NF4).")
    trainable: str | None = option(
        None,
        "train: head, biases, norms, biases_and_norms, or only weights whose name this expression "
        "finds.",
    )
    freeze_layers: int = option(0, "train: freeze so many lower layers, run them once a text.")
