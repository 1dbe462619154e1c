"""The host Trainer's own ways are honoured or refused by name."""

import dataclasses

import pytest
import torch
from models import llama
from trainers import sentences, settings
from transformers import Trainer

from mezo import MeZOConfig, MeZOMixin
from mezo.errors import InputError


def make(kind, path, **changed):
    return kind(llama(), settings(path, **changed), train_dataset=sentences())


class Layerwise(Trainer):
    def create_optimizer(self, model=None):
        named = list(self.model.named_parameters())
        groups = [{"params": [p for n, p in named if ("layers.0" in n) == low]} for low in (1, 0)]
        groups[0]["lr"] = 0.0
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer


class Own(Trainer):
    def training_step(self, *args, **kwargs):
        raise AssertionError("never called")


class Generating(Trainer):
    def _prepare_inputs(self, inputs):
        raise AssertionError("never called")


def test_groups_of_a_subclass_keep_their_rates(tmp_path):
    """A layer with rate 0 was trained with the common rate, without a word."""
    kind = type("Mine", (MeZOMixin, Layerwise), {})
    trainer = make(kind, tmp_path, max_steps=1)
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.optimizer.param_groups] == [0.0, 1e-3]


@pytest.mark.parametrize(
    ("host", "what"),
    [(Own, "Own has a training_step of its own"), (Generating, "MeZOPolicyTrainer trains on")],
)
def test_a_host_that_makes_steps_of_its_own_is_refused(tmp_path, host, what):
    """What it does there would be left out in silence."""
    kind = type("Mine", (MeZOMixin, host), {})
    with pytest.raises(InputError, match=what):
        make(kind, tmp_path)


def test_another_optimizer_is_refused_by_name(tmp_path):
    kind = type("Mine", (MeZOMixin, Trainer), {})
    with pytest.raises(InputError, match="optim adafactor cannot be combined with MeZO"):
        make(kind, tmp_path, optim="adafactor")


def test_a_config_beside_mezo_s_keeps_its_own_defaults(tmp_path):
    """A dataclass takes the first base's fields over the second's, inherited ones too."""
    trl = pytest.importorskip("trl")
    kind = dataclasses.dataclass(type("X", (MeZOConfig, trl.SFTConfig), {}))
    plain, mine = trl.SFTConfig("x", use_cpu=True), kind("x", use_cpu=True)
    assert mine.logging_steps == plain.logging_steps
    assert mine.remove_unused_columns == plain.remove_unused_columns
    assert (mine.learning_rate, mine.lr_scheduler_type) == (1e-6, "constant")
