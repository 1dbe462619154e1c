"""A YAML file of options, as `--config` and `--grid` take them."""

from pathlib import Path
from typing import Any

from mezo.errors import InputError


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
