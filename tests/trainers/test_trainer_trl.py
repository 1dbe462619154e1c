"""The same mixin over TRL's trainers: zeroth-order SFT, DPO and reward modelling for two lines."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from models import llama, weights
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from trainers import grads
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from mezo import MeZOConfig, MeZOMixin, trajectory

trl = pytest.importorskip("trl")

from mezo.trainers import trl as mezo_trl  # noqa: E402  # it needs TRL

# peft 0.21 and TRL 1.16 still read a name that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

WORDS = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(61))]


class SFT(MeZOMixin, trl.SFTTrainer):
    pass


class DPO(MeZOMixin, trl.DPOTrainer):
    pass


@dataclass
class SFTSettings(MeZOConfig, trl.SFTConfig):
    pass


@dataclass
class DPOSettings(MeZOConfig, trl.DPOConfig):
    pass


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


def rows(**columns):
    """32 rows of text; a column's words are shifted from row to row, and all begin with a space."""
    return Dataset.from_list(
        [
            {
                name: "".join(f" w{(word + i) % 61}" for word in words)
                for name, words in columns.items()
            }
            for i in range(32)
        ]
    )


def trainer_at(path, kind, config, data, model=None, lora=None, more=None, **changes):
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    options |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_steps": 1}
    options |= {"save_strategy": "no", "max_length": 32} | changes
    adapter = LoraConfig(target_modules="all-linear", r=2, task_type=lora) if lora else None
    return kind(
        model or llama(),
        args=config(str(path), **options),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=adapter,
        **(more or {}),
    )


def completions():
    return rows(prompt=[1, 2, 3], completion=[4, 5])


def preferences():
    return rows(prompt=[1, 2], chosen=[3, 4], rejected=[5, 6, 7])


def adapter_of(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def test_the_mezo_defaults_win_over_those_of_trl(tmp_path):
    """Trap 19: TRL's own are bf16, gradient checkpointing and Adam's learning rate."""
    settings = SFTSettings(str(tmp_path), use_cpu=True)
    assert (settings.learning_rate, settings.bf16) == (1e-6, False)
    assert not settings.gradient_checkpointing
    assert settings.lr_scheduler_type == "constant"


def test_sft_trains_and_replays(tmp_path):
    """Completion-only loss by TRL; the log rebuilds the weights without TRL and without data."""
    trainer = trainer_at(tmp_path, SFT, SFTSettings, completions())
    trainer.train()
    replayed = trajectory.replay(tmp_path / "run.mezo", llama())
    assert torch.equal(weights(replayed), weights(trainer.model))
    assert not torch.equal(weights(llama()), weights(trainer.model))


def test_trl_logs_its_metrics_as_training(tmp_path):
    """Trap 5: with the root in eval mode, TRL would file them under "eval" and log nothing."""
    trainer = trainer_at(tmp_path, SFT, SFTSettings, completions())
    trainer.train()
    entry = trainer.state.log_history[0]
    assert {"loss", "mean_token_accuracy", "num_tokens", "projected_grad"} <= entry.keys()
    assert not any(key.startswith("eval_") for key in entry)


def test_sft_with_lora_resumes_with_the_same_bits(tmp_path):
    """The adapter is trained, the base is intact, checkpoints hold the adapter alone."""
    options = {"lora": "CAUSAL_LM", "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = trainer_at(tmp_path / "whole", SFT, SFTSettings, completions(), **options)
    whole.train()
    half = options | {"max_steps": 3}
    trainer_at(tmp_path / "parts", SFT, SFTSettings, completions(), **half).train()
    again = trainer_at(tmp_path / "parts", SFT, SFTSettings, completions(), **options)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(adapter_of(again.model), adapter_of(whole.model))
    assert grads(tmp_path / "parts") == grads(tmp_path / "whole")
    frozen = dict(whole.model.get_base_model().named_parameters())
    for name, p in llama().named_parameters():
        kept = frozen.get(name, frozen.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(p, kept)


def test_sft_accumulation_is_one_walk(tmp_path):
    """2 x 4 is 8: one cycle an update, losses weighted by tokens (1e-3: 64 roundings over eps)."""
    ends = {}
    for name, (size, steps) in {"one": (8, 1), "two": (4, 2)}.items():
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        options = {"max_steps": 1, "train_sampling_strategy": "sequential"} | batch
        trainer_at(tmp_path / name, SFT, SFTSettings, completions(), **options).train()
        ends[name] = trajectory.read(tmp_path / name / "run.mezo").steps[0].record
    tolerance = 64 * 2.0**-24 * ends["one"].loss / 1e-3
    difference = ends["one"].projected_grads[0] - ends["two"].projected_grads[0]
    assert abs(difference) <= tolerance
    assert ends["two"].cycles == (1,)


@pytest.mark.parametrize("lora", ["CAUSAL_LM", None])
def test_dpo_trains(tmp_path, lora):
    """The reference model is the base without its adapter, or another; neither is perturbed."""
    more = None if lora else {"ref_model": llama()}
    trainer = trainer_at(tmp_path, DPO, DPOSettings, preferences(), lora=lora, more=more)
    trainer.train()
    assert all(math.isfinite(g) and g for (g,) in grads(tmp_path))
    first = trainer.state.log_history[0]
    assert "rewards/margins" in first
    # the reference is theta itself at first: the loss is log 2 up to O(eps^2)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)


def chats():
    """The same preferences as messages."""
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    made = [
        {
            "prompt": [user | {"content": row["prompt"]}],
            "chosen": [assistant | {"content": row["chosen"]}],
            "rejected": [assistant | {"content": row["rejected"]}],
        }
        for row in preferences()
    ]
    return Dataset.from_list(made)


@pytest.mark.parametrize("lora", ["SEQ_CLS", None])
@pytest.mark.parametrize("data", [preferences, chats])
def test_reward_modelling_trains_and_replays(tmp_path, data, lora):
    """Of a model with one score; the score's layer is trained beside an adapter."""
    config = llama().config
    config.num_labels, config.pad_token_id = 1, 0
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        model = LlamaForSequenceClassification(config)
    kinds = (mezo_trl.MeZORewardTrainer, mezo_trl.MeZORewardConfig)
    trainer = trainer_at(tmp_path, *kinds, data(), model=model, lora=lora)
    base = copy.deepcopy(trainer.model)
    trainer.train()
    assert all(math.isfinite(g) and g for (g,) in grads(tmp_path))
    assert "margin" in trainer.state.log_history[0]
    assert any("score" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    before = weights(base)
    trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(base), weights(trainer.model))
    assert not torch.equal(weights(base), before)
