"""MeZO: fine-tune language models with forward passes alone (Malladi et al., arXiv:2305.17333)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mezo.version import __version__ as __version__

if TYPE_CHECKING:
    from mezo import distributed as distributed
    from mezo import offload as offload
    from mezo import rewards as rewards
    from mezo import rules as rules
    from mezo import trajectory as trajectory
    from mezo.forms.graphs import Graphs as Graphs
    from mezo.mezo import Estimate as Estimate
    from mezo.mezo import MeZO as MeZO
    from mezo.mezo import spsa as spsa
    from mezo.objectives.generation import Generation as Generation
    from mezo.runs.rebuild import load as load
    from mezo.trainers.config import MeZOConfig as MeZOConfig
    from mezo.trainers.policy import MeZOPolicyConfig as MeZOPolicyConfig
    from mezo.trainers.policy import MeZOPolicyTrainer as MeZOPolicyTrainer
    from mezo.trainers.trainer import MeZOMixin as MeZOMixin
    from mezo.trainers.trainer import MeZOTrainer as MeZOTrainer
    from mezo.trainers.trl import MeZODPOConfig as MeZODPOConfig
    from mezo.trainers.trl import MeZODPOTrainer as MeZODPOTrainer
    from mezo.trainers.trl import MeZORewardConfig as MeZORewardConfig
    from mezo.trainers.trl import MeZORewardTrainer as MeZORewardTrainer
    from mezo.trainers.trl import MeZOSFTConfig as MeZOSFTConfig
    from mezo.trainers.trl import MeZOSFTTrainer as MeZOSFTTrainer

# Where each public name lives. It is imported when it is first asked for: torch takes a second,
# transformers' Trainer ten. A name is a module of mezo or an attribute of the module that is named.
# A test holds the imports above, which are for type checkers, to this table.
PUBLIC = {
    "Estimate": "mezo.mezo",
    "Generation": "mezo.objectives.generation",
    "Graphs": "mezo.forms.graphs",
    "MeZO": "mezo.mezo",
    "MeZOConfig": "mezo.trainers.config",
    "MeZODPOConfig": "mezo.trainers.trl",
    "MeZODPOTrainer": "mezo.trainers.trl",
    "MeZOMixin": "mezo.trainers.trainer",
    "MeZOPolicyConfig": "mezo.trainers.policy",
    "MeZOPolicyTrainer": "mezo.trainers.policy",
    "MeZORewardConfig": "mezo.trainers.trl",
    "MeZORewardTrainer": "mezo.trainers.trl",
    "MeZOSFTConfig": "mezo.trainers.trl",
    "MeZOSFTTrainer": "mezo.trainers.trl",
    "MeZOTrainer": "mezo.trainers.trainer",
    "distributed": "mezo.distributed",
    "load": "mezo.runs.rebuild",
    "offload": "mezo.offload",
    "rewards": "mezo.rewards",
    "rules": "mezo.rules",
    "spsa": "mezo.mezo",
    "trajectory": "mezo.trajectory",
}
OPTIONAL = {name: home for name, home in PUBLIC.items() if home == "mezo.trainers.trl"}  # need TRL
__all__ = [name for name in PUBLIC if name not in OPTIONAL]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'mezo' has no attribute {name!r}")
    module = import_module(PUBLIC[name])
    return module if module.__name__ == f"mezo.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*PUBLIC, *(name for name in globals() if name.startswith("__"))})
