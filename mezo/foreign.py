"""Call other packages' parsers on files that anybody may have written.

A parser documents one exception and raises many: deeply nested JSON raises RecursionError, a number
of 5,000 digits ValueError, a damaged gzip stream zlib.error, and a tokenizer's file may cause a
panic in Rust. Here each of them becomes an InputError of one line that names the file.

The hub is foreign too: `hub_silence` asks once whether it answers, because its clients ask six
times for every file before they give up.
"""

import errno
import importlib
import importlib.util
import json
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mezo.errors import InputError

MAX_OPTIONS = 2**20  # most bytes in a YAML file, and most values after its aliases are expanded


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turn any exception of a parser within the context into an InputError beginning with `what`.

    Put only the call of the other package inside, so that errors in our own code keep their
    traceback. An InputError passes unchanged.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {reason_of(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, in tokenizers and safetensors
            raise
        raise InputError(f"{what}: its parser failed: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """Return an exception's reason as one printable line of at most 300 characters."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    text = f"no {text}" if isinstance(error, KeyError) else text
    return "".join(c if c.isprintable() else "?" for c in text)[:300]


def check_file(path: str | Path) -> Path:
    """Return the path of a regular file. Raises InputError for everything else.

    Opening a named pipe would wait for a writer, and reading a device might never end.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"{path}: {reason_of(error)}") from None
    kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    if not stat.S_ISREG(mode):
        kind = next((kind for kind, is_of in kinds.items() if is_of(mode)), "a device")
        raise InputError(f"{path} is {kind}, not a file")
    return path


def parse_json(text: str | bytes, what: str) -> Any:
    """Return the value of a JSON text. Raises InputError, beginning with `what`, if it is not JSON.

    Half of a surrogate pair ("\\ud800") is also refused: it is not a character, and no tokenizer
    accepts it.
    """
    with foreign(f"{what} is not JSON"):
        value = json.loads(text)
        mark = b"\\ud" if isinstance(text, bytes) else "\\ud"
        if mark in text.lower():  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: str | Path) -> Any:
    """Return the JSON value in a file. Raises InputError if the file is not JSON."""
    path = check_file(path)
    with foreign(f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8-sig")
    return parse_json(text, str(path))


def read_options(path: str | Path, told: str, expected: str) -> dict[Any, Any]:
    """Return the mapping in a YAML file of options, as for `--config` and `--grid`.

    Args:
        path: The file.
        told: The file's name in an InputError.
        expected: A description of what the file should hold.

    Raises InputError if it is not a file, not YAML or not a mapping, or if its aliases expand to
    more than a million values (aliases of aliases can grow without bound).
    """
    import yaml

    path = check_file(path)
    with foreign(told):
        if path.stat().st_size > MAX_OPTIONS:
            raise InputError(f"{told} is longer than {MAX_OPTIONS:,} bytes")
        text = path.read_text(encoding="utf-8")
    with foreign(f"{told} is not YAML"):
        found = yaml.safe_load(text)
        _expanded(found, {}, ())
    if not isinstance(found, dict):
        raise InputError(f"{told}: expected {expected}")
    return found


def _expanded(value: Any, sizes: dict[int, int], outer: tuple[int, ...]) -> int:
    """Return the number of values in a YAML value, counting those behind an alias each time.

    Raises ValueError for more than a million values, for a value inside itself, and for half of a
    surrogate pair.
    """
    if isinstance(value, str):
        value.encode()
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) in outer:
        raise ValueError("an alias stands for a value that contains it")
    if id(value) not in sizes:
        inner = [*value, *value.values()] if isinstance(value, dict) else list(value)
        within = (*outer, id(value))
        sizes[id(value)] = 1 + sum(_expanded(part, sizes, within) for part in inner)
        if sizes[id(value)] > MAX_OPTIONS:
            raise ValueError(f"its aliases stand for more than {MAX_OPTIONS:,} values")
    return sizes[id(value)]


def check_name(name: str | Path, what: str) -> None:
    """Raise InputError if no file can have this name: it is too long, or it has a NUL.

    `what` says in the error what the name is for. Python's own functions raise OSError for some of
    these names where they ask only whether a file exists.
    """
    try:
        os.stat(name)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            short = reprlib.repr(str(name))
            raise InputError(f"{what} {short}: no file can have this name") from None


def hub_silence() -> str | None:
    """Return that the hub does not answer, and why, or None if it does.

    One request is made, with the time limit of huggingface_hub's own (HF_HUB_ETAG_TIMEOUT, ten
    seconds) and without its retries; any answer counts. With HF_HUB_OFFLINE nothing is asked and
    None is returned: the hub's clients then turn to their caches at once.
    """
    from huggingface_hub import constants, errors, get_session

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (errors.HTTPError, OSError) as error:
        return f"no answer from {constants.ENDPOINT} ({reason_of(error)})"
    return None


def check_dataset_reach(name: str) -> None:
    """Raise InputError for a data set that is not in the cache while the hub does not answer."""
    from datasets import config

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())  # nyu-mll/glue, nyu-mll___glue

    cache = Path(config.HF_DATASETS_CACHE)
    if cache.is_dir() and any(plain(path.name) == plain(name) for path in cache.iterdir()):
        return
    if silence := hub_silence():
        raise InputError(silence)


def imported(text: str, what: str) -> Any:
    """Import the object that `text` names as "module:Name" or "file.py:Name".

    `what` says in errors what the object is for. Use this only for a name that the user gave:
    nothing may be imported because a file says so. Raises InputError if there is no such module,
    file or name.
    """
    where, _, name = text.rpartition(":")
    path = Path(where) if where.endswith(".py") else Path(where.replace(".", "/") + ".py")
    if path.is_file():
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif where.endswith(".py"):
        raise InputError(f"{what} file not found: {where}")
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if where != missing and not where.startswith(f"{missing}."):
                raise
            raise InputError(f"{what} module {where}: no such module, no file {path}") from None
    if not hasattr(module, name):
        raise InputError(f"{what} {text}: {where} has no {name}")
    return getattr(module, name)
