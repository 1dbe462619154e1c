"""MeZO: fine-tune language models with forward passes alone (Malladi et al., arXiv:2305.17333)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezo import trajectory
    from mezo.mezo import Estimate, MeZO, spsa
    from mezo.objectives.generation import Generation
    from mezo.runs.rebuild import MeZOAdapter
    from mezo.trainers.policy import MeZOPolicyConfig, MeZOPolicyTrainer
    from mezo.trainers.trainer import MeZOConfig, MeZOMixin, MeZOTrainer

__version__ = "0.1.0"
__all__ = ["Estimate", "MeZO", "MeZOAdapter", "MeZOConfig", "MeZOMixin", "MeZOTrainer", "spsa"]
__all__ += ["Generation", "MeZOPolicyConfig", "MeZOPolicyTrainer", "trajectory"]

_HOME = {  # imported when first asked for: torch takes a second, transformers' Trainer ten
    "Estimate": "mezo.mezo",
    "MeZO": "mezo.mezo",
    "spsa": "mezo.mezo",
    "Generation": "mezo.objectives.generation",
    "MeZOAdapter": "mezo.runs.rebuild",
    "MeZOConfig": "mezo.trainers.trainer",
    "MeZOMixin": "mezo.trainers.trainer",
    "MeZOTrainer": "mezo.trainers.trainer",
    "MeZOSFTTrainer": "mezo.runs.text",
    "MeZOSFTConfig": "mezo.runs.text",
    "MeZODPOTrainer": "mezo.runs.text",
    "MeZODPOConfig": "mezo.runs.text",
    "MeZORewardTrainer": "mezo.runs.text",
    "MeZORewardConfig": "mezo.runs.text",
    "MeZOPolicyConfig": "mezo.trainers.policy",
    "MeZOPolicyTrainer": "mezo.trainers.policy",
}


def __getattr__(name: str):
    if name == "trajectory":
        return import_module("mezo.trajectory")
    if name not in _HOME:
        raise AttributeError(f"module 'mezo' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
