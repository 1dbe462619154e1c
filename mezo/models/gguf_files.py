"""GGUF files, llama.cpp's format, as base models: made into a folder of safetensors once.

    folder = gguf_folder(Path("llama-3.2-1b.Q4_K_M.gguf"))     # a folder in the user's cache

transformers and the package `gguf` read the file; the weights become plain numbers, so that all
that goes with any other model (training all weights, offload, replay by tensor) goes with it. The
folder's name is the SHA-256 of the file: it depends on the file's contents alone. Nothing is
downloaded, and nothing that a file holds is run.
"""

import hashlib
import logging
import os
import re
import shutil
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mezo.errors import InputError
from mezo.models.gguf_header import GGUFHeader, GGUFTensor, read_header

_VERSION = "v1"  # of the conversion: another one makes another folder of the same file
_KEY = re.compile(rf"([0-9a-f]{{64}})-{_VERSION}")
_PACKAGE = "pip install 'mezo-lm[gguf]'"
_FREQUENCIES = "rope_freqs.weight"  # divisors of the rotary frequencies: no weight of the model
# Byte-level tokenizers that take each digit for itself before GPT-2's expression splits the rest
# (llama.cpp's llama-vocab.cpp). transformers 5.24 reads them as GPT-2's.
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_AS_GPT2 = ("default", "gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion", "exaone4")
_FAILURES = (  # what the readers raise for a file that is unknown to them, or wrong
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, ImportError),
    AttributeError,
)


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a model's name means; None where it means something else.

    A name means one that ends in .gguf, or is a folder with one such file and no config.json.
    Raises InputError where there is no such file, it is not a regular one, or there are several.
    """
    path = Path(name).expanduser()
    ends = path.suffix.lower() == ".gguf"
    if path.is_dir():
        found = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(found) > 1:
            raise InputError(f"model {name} has {len(found)} GGUF files: name one, {found[0]} say")
        if not found and ends:
            raise InputError(f"model {name} is a folder without a GGUF file")
        return found[0] if found else None
    if not ends:
        return None
    if not path.exists():
        raise InputError(f"model {name}: no such file; hf download REPOSITORY FILE --local-dir .")
    return path


def gguf_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; it is read again only after a change.

    Raises InputError for anything that is not a regular file, or cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a regular file, as a GGUF file must be")
    try:
        now = path.stat()
        return _sha256(str(path.resolve()), now.st_ino, now.st_size, now.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


@lru_cache(maxsize=16)
def _sha256(path: str, *state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return the folder that holds the converted models, in huggingface_hub's cache.

    It is `$HF_ASSETS_CACHE/mezo-lm/gguf/models`; HF_ASSETS_CACHE is by default
    `~/.cache/huggingface/assets`. Raises InputError where it cannot be made.
    """
    from huggingface_hub import cached_assets_path

    try:
        return Path(cached_assets_path("mezo-lm", namespace="gguf", subfolder="models"))
    except (OSError, ValueError) as error:
        raise InputError(f"{error}; the environment variable HF_ASSETS_CACHE moves it") from None


def gguf_folder(path: Path) -> Path:
    """Return the folder of safetensors that is made of a GGUF file, and make it if there is none.

    Quantised blocks become float32; a file of plain numbers keeps its type. The folder appears
    whole or not at all, also where several processes ask for it. Raises InputError, before
    anything is written, for a file that cannot be used.
    """
    key = f"{gguf_sha256(path)}-{_VERSION}"
    folder = cache_folder() / key
    if (folder / "config.json").is_file():
        return folder
    header = read_header(path)
    _check_tensors(header)
    config = _config_of(header)
    from huggingface_hub.utils import WeakFileLock

    try:
        with WeakFileLock(folder.with_name(f"{key}.lock")):
            if not (folder / "config.json").is_file():
                _convert(header, config, folder)
    except OSError as error:
        where = error.filename or folder
        raise InputError(
            f"{where}: {error.strerror or error}; HF_ASSETS_CACHE moves the cache"
        ) from None
    return folder


def folder_sha256(name: str) -> str | None:
    """Return the SHA-256 of the GGUF file that a folder of the cache was made of, else None."""
    key = _KEY.fullmatch(Path(name).name)
    return None if key is None else key.group(1)


def relocated(name: str) -> str:
    """Return the folder in this machine's cache for the folder that another machine's cache had.

    An adapter's config names the folder of its base. Any other name is returned as it is. Raises
    InputError where the GGUF file has not been converted here.
    """
    key = _KEY.fullmatch(Path(name).name)
    if key is None or Path(name).is_dir():
        return name
    here = cache_folder() / key.group()
    if not here.is_dir():
        raise InputError(
            f"the adapter's base model is the GGUF file with SHA-256 {key.group(1)}: evaluate that "
            "file once (mezo eval --model FILE.gguf ...), then the adapter finds it"
        )
    return str(here)


def _check_tensors(header: GGUFHeader) -> None:
    """Raise InputError for block types that cannot be read, and for a file that is cut off."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    except ImportError:
        raise InputError(f"{header.path}: GGUF files need the package gguf: {_PACKAGE}") from None
    import numpy as np

    known: dict[int, tuple[int, int]] = {}
    for tensor in header.tensors:
        if tensor.kind not in known:
            try:
                kind = GGMLQuantizationType(tensor.kind)
                known[tensor.kind] = GGML_QUANT_SIZES[kind]
                dequantize(np.zeros((1, known[tensor.kind][1]), np.uint8), kind)
            except (ValueError, KeyError, NotImplementedError):
                raise InputError(_unknown(header, tensor, GGMLQuantizationType)) from None
        block, size = known[tensor.kind]
        end = tensor.start + tensor.numel // block * size
        if end > header.size:
            raise InputError(
                f"{header.path} is cut off: {tensor.name} ends at byte {end}, the file has "
                f"{header.size}"
            )


def _unknown(header: GGUFHeader, tensor: GGUFTensor, kinds: Any) -> str:
    known = {kind.value: kind.name for kind in kinds}
    return (
        f"{header.path}: {tensor.name} has the block type {known.get(tensor.kind, tensor.kind)}, "
        "which the package gguf cannot turn into numbers: take a file of another quantisation"
    )


def _config_of(header: GGUFHeader) -> Any:
    """Return transformers' config for the file. Raises InputError for an unknown architecture."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    _refuse_kernels(header)
    path, scaling = header.path, header.values.get(f"{header.architecture}.rope.scaling.type")
    if scaling not in (None, "none") and _FREQUENCIES not in {t.name for t in header.tensors}:
        raise InputError(
            f"{path}: its rotary positions are scaled ({scaling!r:.40}), which transformers' "
            "reader leaves out: take the model's safetensors"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
    except _FAILURES as error:
        raise InputError(f"{path}: {_words(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"{path} has the architecture {header.architecture}: only causal language models can "
            "be read from GGUF files"
        )
    config.__dict__.pop("_model_name_or_path", None)  # what the file calls itself: it is no path
    _scale_positions(config, header)
    return config


def _refuse_kernels(header: GGUFHeader) -> None:
    """Raise InputError where transformers would fetch code from the hub to read the file.

    It does so for its newest architectures wherever the package kernels is installed.
    """
    try:
        from transformers.integrations.gguf import is_gguf_arch_supported as newest
    except ImportError:  # before 5.24
        return
    if find_spec("kernels") is not None and newest(header.architecture):
        raise InputError(
            f"{header.path}: transformers would download kernels to read {header.architecture}: "
            "uninstall the package kernels, or take the model's safetensors"
        )


def _scale_positions(config: Any, header: GGUFHeader) -> None:
    """Take up the divisors of the rotary frequencies, which transformers' reader leaves out.

    Llama 3.1 and later have them. transformers' "longrope" divides by what it is given; the factor
    on attention that it otherwise adds is set to one.
    """
    tensor = next((t for t in header.tensors if t.name == _FREQUENCIES), None)
    if tensor is None:
        return
    if tensor.kind != 0:
        raise InputError(f"{header.path}: {tensor.name} has the block type {tensor.kind}, not F32")
    import numpy as np

    divisors = np.fromfile(header.path, "<f4", tensor.numel, offset=tensor.start).tolist()
    length = config.max_position_embeddings
    rope = {"rope_theta": config.rope_parameters["rope_theta"], "rope_type": "longrope"}
    rope |= {"short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
    rope |= {"original_max_position_embeddings": length, "factor": 1.0}
    config.rope_parameters = rope


def _convert(header: GGUFHeader, config: Any, folder: Path) -> None:
    """Write the folder. The caller holds the lock of its name."""
    logging.getLogger("mezo").warning(
        "%s: reading it for the first time, into %s", header.path, folder
    )
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    try:
        (work / "made").mkdir(parents=True)
        link = work / "model.gguf"  # alone in a folder: no file beside it changes what is read
        try:
            link.symlink_to(header.path.resolve())
        except OSError:  # Windows, without the right to make one
            shutil.copyfile(header.path, link)
        try:
            model, tokenizer = _model_of(header, config, work), _tokenizer_of(header, work)
        except InputError:
            raise
        except _FAILURES as error:
            raise InputError(f"{header.path}: {_words(error)}") from error
        model.save_pretrained(work / "made")
        tokenizer.save_pretrained(work / "made")
        os.rename(work / "made", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _model_of(header: GGUFHeader, config: Any, folder: Path) -> Any:
    """Return the model with plain weights, read by transformers and put into a fresh one."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    if hasattr(transformers, "GgufConfig"):  # else newer architectures stay in their blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    read, told = auto.from_pretrained(
        folder, config=config, dtype=_dtype_of(header), output_loading_info=True, **options
    )
    for what, meaning in (("missing", "lacks"), ("mismatched", "has another shape of")):
        if names := sorted(map(str, told[f"{what}_keys"])):
            raise InputError(f"{header.path} {meaning} {names[0]}, which the model needs")
    own = sum(tensor.numel for tensor in header.tensors if tensor.name != _FREQUENCIES)
    taken = sum({t.data_ptr(): t.numel() for t in read.state_dict().values()}.values())
    if own != taken:
        raise InputError(
            f"{header.path} holds {own} weights, and transformers' {type(read).__name__} takes up "
            f"{taken} of them: it would be another model; take its safetensors"
        )
    with torch.device("meta"):  # one that is not called quantised, and can be saved
        fresh = type(read)(config)
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.tie_weights()
    return fresh


def _dtype_of(header: GGUFHeader) -> torch.dtype:
    """Return the type of a file of plain numbers (its norms may have a wider one), else float32."""
    kinds = {tensor.kind for tensor in header.tensors}
    plain = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
    half = kinds - {0}
    return plain[half.pop()] if kinds <= plain.keys() and len(half) == 1 else torch.float32


def _tokenizer_of(header: GGUFHeader, folder: Path) -> Any:
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
        folder, gguf_file="model.gguf", local_files_only=True
    )
    length = header.values.get(f"{header.architecture}.context_length")
    if type(length) is int and length > 0:
        tokenizer.model_max_length = length
    if header.values.get("tokenizer.ggml.model") == "gpt2":
        _split_digits(tokenizer, header)
    return tokenizer


def _split_digits(tokenizer: Any, header: GGUFHeader) -> None:
    """Put right, or warn of, an expression that transformers' reader does not know."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return  # it has an expression of its own
    kind = header.values.get("tokenizer.ggml.pre", "default")
    if kind in _DIGITS:
        parts = [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    elif kind not in _AS_GPT2:
        logging.getLogger("mezo").warning(
            "%s: its tokenizer splits text by %r, which is not known here: GPT-2's way is taken, "
            "and some texts may get other tokens than the model was trained on",
            header.path,
            kind,
        )


def _words(error: BaseException) -> str:
    """Return what an exception of another package says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) else text[:300]
