"""What the Trainer face does in and around a forward pass, and what it refuses."""

import math

import pytest
import torch
from models import Toy, llama, weights
from trainers import LR, UNIT, Watch, grads, points, sentences, settings, trained, trainer_at
from transformers import TrainingArguments

from mezo import MeZO, MeZOTrainer, trajectory
from mezo.compatibility import checkpointing_option
from mezo.errors import InputError
from mezo.trainers import refusals

# ---- the forward passes


def test_autocast_gives_the_estimate_of_separate_forwards(tmp_path):
    """Trap 1: autocast's cache would show the second pass the weights of the first."""
    batch = {key: torch.stack([row[key] for row in sentences(4)]) for key in sentences(1)[0]}
    host, losses, model = trainer_at(tmp_path / "host"), [], llama().eval()
    _, count = host.get_batch_samples(iter([batch]), 1, torch.device("cpu"))

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**batch, num_items_in_batch=count).loss)
        return losses[-1]

    MeZO(model.named_parameters(), lr=LR, eps=0.1, seed=42).estimate(closure)
    del losses[:2]  # of the first step's look
    trained(tmp_path, max_steps=1, bf16=True, mezo_eps=0.1)
    assert grads(tmp_path)[0][0] == float(losses[0].double() - losses[1].double()) / 0.2
    assert losses[0] != losses[1]


@pytest.mark.parametrize("trl", [False, True])
def test_dropout_is_off_and_training_is_on_for_the_root_of_trl_alone(tmp_path, monkeypatch, trl):
    """Traps 4, 5: both passes are in eval mode; TRL's trainers read the root's flag."""
    seen = []
    monkeypatch.setattr("mezo.trainers.trainer._is_trl", lambda kind: trl)

    class Seeing(MeZOTrainer):
        def compute_loss(self, model, *args, **kwargs):
            seen.append([module.training for module in model.modules()])
            return super().compute_loss(model, *args, **kwargs)

    dropped = trained(tmp_path / "a", model=llama(dropout=0.5), kind=Seeing)
    assert torch.equal(dropped, trained(tmp_path / "b"))
    assert seen
    assert all(flags[0] == trl and not any(flags[1:]) for flags in seen)


def test_the_root_of_a_plain_module_is_in_eval_mode_too(tmp_path):
    """Trap 5, the other side: a module of the user's own may drop out in its own forward."""

    class Dropping(Toy):
        def forward(self, x, labels):
            return super().forward(torch.nn.functional.dropout(x, 0.5, self.training), labels)

    ends = [
        trained(tmp_path / kind.__name__, model=kind(), data=points()) for kind in (Toy, Dropping)
    ]
    assert torch.equal(*ends)


def test_a_model_whose_backward_raises_trains(tmp_path):
    """No gradient is asked for, anywhere in the Trainer's loop."""
    start = weights(Toy())
    end = trained(tmp_path, model=Toy(broken_backward=True), data=points(), max_steps=16)
    assert torch.equal(end, trained(tmp_path, model=Toy(), data=points(), max_steps=16))
    assert not torch.equal(start, end)


def test_any_scalar_is_an_objective(tmp_path):
    """compute_loss may return what has no derivative: here, minus the accuracy."""

    class Accuracy(MeZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            return -model(**inputs).logits.argmax(-1).eq(labels).float().mean()

    trained(tmp_path, kind=Accuracy, mezo_eps=0.3)
    assert any(g for (g,) in grads(tmp_path))


def test_frozen_parameters_stay(tmp_path):
    model = llama()
    model.model.requires_grad_(False)
    frozen, head = weights(model.model), weights(model.lm_head)
    trained(tmp_path, model=model)
    assert torch.equal(weights(model.model), frozen)
    assert not torch.equal(weights(model.lm_head), head)


# ---- what goes wrong


def test_an_exception_in_compute_loss_restores_the_weights(tmp_path):
    """Trap 11: out of memory or Ctrl-C in a pass must not leave theta + eps z; log closed."""
    passes = []

    class Failing(MeZOTrainer):
        def compute_loss(self, *args, **kwargs):
            passes.append(1)
            if len(passes) in (1, 4):
                raise RuntimeError("out of memory")
            return super().compute_loss(*args, **kwargs)

    trainer = trainer_at(tmp_path, kind=Failing, learning_rate=0.0)
    start = weights(trainer.model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.train()
        moved = (weights(trainer.model) - start).abs().max()
        assert moved <= 6 * UNIT * start.abs().max()  # 3 roundings a walk
    trainer.train()
    replayed = trajectory.replay(tmp_path / "run.mezo", llama())
    assert torch.equal(weights(replayed), weights(trainer.model))


def test_a_loss_that_is_not_finite_refuses_the_update(tmp_path):
    """Trap 18: the Trainer's filter hides NaN from the log only; the schedule goes on."""

    class Poisoned(MeZOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 1 else loss

    end = trained(tmp_path, kind=Poisoned)
    assert [math.isfinite(g) for (g,) in grads(tmp_path)] == [True, False, True, True]
    assert end.isfinite().all()


def test_callbacks_before_the_update_see_the_restored_weights(tmp_path):
    """Trap 12: enable_jit_checkpoint saves the model between training_step and step()."""
    seen = []
    look = Watch("on_pre_optimizer_step", lambda model: seen.append(weights(model)))
    start = weights(llama())
    trained(tmp_path, callbacks=[look], max_steps=1)
    moved = (seen[0] - start).abs().max()
    assert moved <= 3 * UNIT * start.abs().max()


def test_auto_find_batch_size_begins_again_with_whole_weights(tmp_path):
    """The first batch size does not fit: its step is in the log as refused, the rest replays."""

    class Small(MeZOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = trainer_at(tmp_path, kind=Small, auto_find_batch_size=True)
    trainer.train()
    assert math.isnan(grads(tmp_path)[0][0])
    assert math.isfinite(grads(tmp_path)[-1][0])
    replayed = trajectory.replay(tmp_path / "run.mezo", llama())
    assert torch.equal(weights(replayed), weights(trainer.model))


@pytest.mark.parametrize(
    ("where", "name", "value", "sentence"),
    [
        ("args", "fp16", True, "fp16=True cannot be combined with MeZO: it scales gradients"),
        ("args", "fsdp", "full_shard", "fsdp cannot be combined with MeZO"),
        ("args", "_n_gpu", 2, "use torchrun --nproc_per_node=2"),
        ("args", "parallelism_config", object(), "parallelism_config cannot be combined"),
        ("args", "neftune_noise_alpha", 5.0, "its noise is added in train mode"),
        ("trainer", "is_fsdp_enabled", True, "fsdp cannot be combined with MeZO"),
        ("trainer", "is_deepspeed_enabled", True, "deepspeed cannot be combined with MeZO"),
        ("trainer", "optimizer_cls_and_kwargs", (torch.optim.SGD, {}), "the optimizer is MeZO"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, where, name, value, sentence):
    """Traps 2, 3, 14, 27: each would fail late, or silently train something else."""
    trainer = trainer_at(tmp_path)
    setattr({"args": trainer.args, "trainer": trainer}[where], name, value)
    with pytest.raises(InputError, match=sentence):
        refusals.check(trainer)


def test_fp16_is_refused_at_the_door(tmp_path):
    """Trap 2: its GradScaler fails an assertion at the first step."""
    with pytest.raises(InputError, match="use bf16=True"):
        trainer_at(tmp_path, fp16=True)


def test_another_optimizer_is_refused(tmp_path):
    model = llama()
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(InputError, match="must be a MeZO"):
        MeZOTrainer(model, settings(tmp_path), optimizers=(adam, None))
    own = MeZO(model.named_parameters(), lr=LR, eps=1e-2, seed=1)
    trainer = MeZOTrainer(
        model, settings(tmp_path), train_dataset=sentences(), optimizers=(own, None)
    )
    trainer.train()
    assert own.param_groups[0]["step"] == 4


def test_settings_without_effect_are_named(tmp_path, caplog):
    """Trap 19, and the learning rate of an Adam script that nobody has changed."""
    options = {
        "kind": TrainingArguments,
        checkpointing_option(TrainingArguments): True,
        "learning_rate": 5e-5,
        "max_grad_norm": 0.5,
    }
    MeZOTrainer(llama(), settings(tmp_path, **options))
    assert "_checkpointing has no effect" in caplog.text
    assert "max_grad_norm has no effect: there is no gradient" in caplog.text
    assert "learning_rate 5e-05 is the default for Adam" in caplog.text
