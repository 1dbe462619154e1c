"""MeZO: fine-tune language models with forward passes alone (Malladi et al., arXiv:2305.17333)."""

from importlib import import_module
from typing import TYPE_CHECKING

from .mezo import Estimate, MeZO, spsa

if TYPE_CHECKING:
    from . import trajectory
    from .trainer import MeZOConfig, MeZOMixin, MeZOTrainer

__version__ = "0.1.0"
__all__ = ["Estimate", "MeZO", "MeZOConfig", "MeZOMixin", "MeZOTrainer", "spsa", "trajectory"]

_LAZY = {  # what needs transformers, or is seldom needed, is imported when first asked for
    "trajectory": "mezo.trajectory",
    "MeZOConfig": "mezo.trainer",
    "MeZOMixin": "mezo.trainer",
    "MeZOTrainer": "mezo.trainer",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'mezo' has no attribute {name!r}")
    module = import_module(_LAZY[name])
    return module if _LAZY[name] == f"mezo.{name}" else getattr(module, name)
