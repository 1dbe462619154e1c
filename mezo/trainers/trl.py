"""TRL's trainers with MeZO: supervised fine-tuning, direct preferences, reward models.

    MeZOSFTTrainer(model, MeZOSFTConfig("out"), train_dataset=rows, processing_class=tokenizer)

Data formats, chat templates, packing and losses are TRL's own.
"""

from dataclasses import dataclass

from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from mezo.trainers.config import MeZOConfig
from mezo.trainers.trainer import MeZOMixin


class MeZOSFTTrainer(MeZOMixin, SFTTrainer):
    """TRL's supervised fine-tuning by forward passes alone."""


class MeZODPOTrainer(MeZOMixin, DPOTrainer):
    """TRL's direct preference optimization by forward passes alone."""

    def _precompute_ref_logps(self, *args, **kwargs):
        with self._placement.reading():
            return super()._precompute_ref_logps(*args, **kwargs)


class MeZORewardTrainer(MeZOMixin, RewardTrainer):
    """TRL's reward modelling by forward passes alone."""


@dataclass
class MeZOSFTConfig(MeZOConfig, SFTConfig):
    """SFTConfig with MeZO's options, and its defaults where TRL's are Adam's."""


@dataclass
class MeZODPOConfig(MeZOConfig, DPOConfig):
    """DPOConfig with MeZO's options, and its defaults where TRL's are Adam's."""


@dataclass
class MeZORewardConfig(MeZOConfig, RewardConfig):
    """RewardConfig with MeZO's options, and its defaults where TRL's are Adam's."""
