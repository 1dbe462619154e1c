"""16-bit models under the Trainer."""

import copy

import pytest
import torch
from models import llama, weights
from peft import LoraConfig, get_peft_model
from trainers import trainer_at

from mezo import trajectory

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", [{}, {"rounding": "compensated", "num_samples": 2}])
def test_a_16_bit_model_trains_and_replays(tmp_path, dtype, options):
    model = llama().to(dtype)
    base = copy.deepcopy(model)
    trainer = trainer_at(tmp_path, model=model, max_steps=6, **options)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert optimizer.perturbation == "scratch"
    assert optimizer.param_groups[0]["rounding"] == options.get("rounding", "stochastic")
    assert not torch.equal(weights(model), weights(base))
    trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(model), weights(base))


@pytest.mark.parametrize("rounding", ["stochastic", "compensated", "master"])
def test_a_resumed_16_bit_run_is_the_uninterrupted_run(tmp_path, rounding):
    options = {"rounding": rounding, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    options |= {"clip_quantile": 0.9}
    whole = trainer_at(tmp_path / "a", model=llama().bfloat16(), **options)
    whole.train()
    again = trainer_at(tmp_path / "a", model=llama(seed=5).bfloat16(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(weights(whole.model), weights(again.model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_a_16_bit_adapter_has_float32_masters_and_the_base_is_untouched(tmp_path, adapter):
    """peft keeps adapters in float32 unless told otherwise: then they are walked in place."""
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(llama().bfloat16(), config, autocast_adapter_dtype=False)
    if adapter == torch.float32:
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = trainer_at(tmp_path, model=model)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    masters = [state["master"] for state in optimizer.state.values()]
    assert len(masters) == (len(optimizer.trained()) if adapter == torch.bfloat16 else 0)
    assert optimizer.perturbation == ("scratch" if adapter == torch.bfloat16 else "in_place")
    for (name, p, _), master in zip(optimizer.trained(), masters, strict=False):
        assert torch.equal(p, master.to(adapter)), name
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in base.items())


def test_an_option_that_cannot_be_is_refused_when_training_begins(tmp_path):
    with pytest.raises(ValueError, match="'compensated' keeps a buffer: perturb in scratch"):
        trainer_at(tmp_path, perturbation="in_place", rounding="compensated").train()


def test_losses_that_are_not_finite_stop_the_trainer(tmp_path):
    model = llama()
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="not finite in 2 steps in a row"):
        trainer_at(tmp_path, model=model, max_steps=9, max_refused=2).train()
    assert len(trajectory.read(tmp_path / "run.mezo").steps) == 2
