"""The host Trainer's own ways are honoured or refused by name."""

import copy
import dataclasses

import pytest
import torch
from models import llama, weights
from trainers import sentences, settings
from transformers import Trainer, TrainerCallback

from mezo import MeZOConfig, MeZOMixin, trajectory
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


def test_a_group_of_rate_0_is_frozen_and_told(tmp_path, caplog):
    """The walk in place would round it, and its perturbation is noise in every estimate."""
    kind = type("Mine", (MeZOMixin, Layerwise), {})
    trainer = make(kind, tmp_path, max_steps=3)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if "layers.0" not in name}
    assert "parameter group 0 has a learning rate of 0: its 9 tensors are frozen" in caplog.text
    again = trajectory.replay(tmp_path / "run.mezo", llama())
    assert torch.equal(weights(again), weights(trainer.model))


class Thawing(TrainerCallback):
    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.param_groups[0]["lr"] = 1e-3


def test_a_group_that_was_frozen_for_its_rate_and_gets_another_is_refused(tmp_path):
    """It would stay as it is, in silence."""
    kind = type("Mine", (MeZOMixin, Layerwise), {})
    trainer = make(kind, tmp_path, max_steps=3, lr_scheduler_type="constant")
    trainer.add_callback(Thawing())
    with pytest.raises(InputError, match=r"began with a learning rate of 0, .* now has 0\.0"):
        trainer.train()


def test_a_run_whose_every_rate_is_0_is_left_alone(tmp_path):
    """Nothing is held back from anything: this is somebody's measurement."""
    kind = type("Mine", (MeZOMixin, Layerwise), {})
    trainer = make(kind, tmp_path, max_steps=1, learning_rate=0.0)
    trainer.train()
    assert len(trajectory.read(tmp_path / "run.mezo").header["tensors"]) == 21


@pytest.mark.parametrize(
    ("host", "what"),
    [(Own, "Own has a training_step of its own"), (Generating, "MeZOPolicyTrainer trains on")],
)
def test_a_host_that_makes_steps_of_its_own_is_refused(tmp_path, host, what):
    """What it does there would be left out in silence."""
    kind = type("Mine", (MeZOMixin, host), {})
    with pytest.raises(InputError, match=what):
        make(kind, tmp_path)


class Later(Generating):
    """A generating trainer of a coming release: it loads a teacher before anything is checked."""

    def __init__(self, *args, **kwargs):
        raise AssertionError("never called")


GENERATE = ("GRPOTrainer", "RLOOTrainer", "DistillationTrainer")
STAND_INS = {name: type(name, (Later,), {}) for name in GENERATE}  # where trl has no such class


@pytest.mark.parametrize("name", GENERATE)
def test_trainers_of_trl_that_generate_are_refused_before_they_are_made(name):
    """Whatever arguments they ask for; the way out is named."""
    trl = pytest.importorskip("trl")
    for host in (getattr(trl, name, STAND_INS[name]), STAND_INS[name]):
        kind = type("Mine", (MeZOMixin, host), {})
        with pytest.raises(InputError, match=r"generates in _prepare_inputs.*: MeZOPolicyTrainer"):
            kind()


def test_another_optimizer_is_refused_by_name(tmp_path):
    kind = type("Mine", (MeZOMixin, Trainer), {})
    with pytest.raises(InputError, match="optim adafactor cannot be combined with MeZO"):
        make(kind, tmp_path, optim="adafactor")


@pytest.mark.parametrize("name", ["SFTConfig", "KTOConfig", "DistillationConfig"])
def test_a_config_beside_mezo_s_keeps_its_own_defaults(name):
    """A dataclass takes the first base's fields over the second's, inherited ones too."""
    trl = pytest.importorskip("trl")
    config = getattr(trl, name, trl.SFTConfig)  # an older release may lack one
    kind = dataclasses.dataclass(type("X", (MeZOConfig, config), {}))
    plain, mine = config("x", use_cpu=True), kind("x", use_cpu=True)
    for option in ("logging_steps", "remove_unused_columns", "train_sampling_strategy"):
        assert getattr(mine, option, None) == getattr(plain, option, None), option
    assert (mine.learning_rate, mine.lr_scheduler_type) == (1e-6, "constant")
