"""Resume is the run it resumes: changed options, damaged checkpoints, logs that are gone."""

import logging
import os
import shutil

import pytest
import torch
from models import llama, weights
from trainers import grads, sentences, settings
from transformers import TrainerCallback

from mezo import MeZOConfig, MeZOTrainer, trajectory
from mezo.errors import InputError
from mezo.trainers import changes, checkpoints

LR = 1e-3


class Stop(TrainerCallback):
    """Interrupts a run after a step, as Ctrl-C does; `act` is called before."""

    def __init__(self, at, act=None, error=KeyboardInterrupt):
        self.at, self.act, self.error = at, act, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            if self.act is not None:
                self.act()
            if self.error is not None:
                raise self.error


def make(path, *callbacks, kind=MeZOTrainer, **changed):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "logging_steps": 2}
    args = settings(path, **(options | changed))
    data = {"train_dataset": sentences(), "eval_dataset": sentences()[:8]}
    return kind(llama(), args, callbacks=list(callbacks), **data)


def run(path, *callbacks, resume=None, **changed):
    trainer = make(path, *callbacks, **changed)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def stopped(path, at, **changed):
    with pytest.raises(KeyboardInterrupt):
        run(path, Stop(at), **changed)


def rates(path):
    return [step.lrs[0] for step in trajectory.read(path / "run.mezo").steps]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("at", [3, 5])
def test_a_rate_that_is_changed_is_taken_with_and_without_a_checkpoint(
    tmp_path, at, schedule, caplog
):
    """From a checkpoint it was ignored in silence; both are told, and the log has both rates."""
    stopped(tmp_path, at, lr_scheduler_type=schedule)
    options = {"learning_rate": LR / 2, "weight_decay": 0.1, "mezo_eps": 1e-2}
    options |= {"lr_scheduler_type": schedule}
    with caplog.at_level(logging.WARNING, "mezo"):
        trainer = run(tmp_path, resume=True, **options)
    assert "learning_rate is 0.0005 from here on" in caplog.text
    share = [1.0] * 8 if schedule == "constant" else [1 - step / 8 for step in range(8)]
    expected = [LR * x for x in share[:at]] + [LR / 2 * x for x in share[at:]]
    assert rates(tmp_path) == pytest.approx(expected, rel=1e-12)
    steps = trajectory.read(tmp_path / "run.mezo").steps
    assert [step.eps for step in steps] == [1e-3] * at + [1e-2] * (8 - at)
    assert max(steps[at].weight_decays) == 0.1
    rebuilt = trajectory.replay(tmp_path / "run.mezo", llama())
    assert torch.equal(weights(rebuilt), weights(trainer.model))


@pytest.mark.parametrize("at", [3, 5])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 7),
        ("per_device_train_batch_size", 2),
        ("rule", "sign"),
        ("distribution", "rademacher"),
        ("lr_scheduler_type", "linear"),
    ],
)
def test_an_option_of_another_run_is_refused_by_name(tmp_path, at, name, value):
    """With a checkpoint and without; nothing of the run is touched."""
    stopped(tmp_path, at)
    before = (tmp_path / "run.mezo").read_bytes()
    with pytest.raises(InputError, match=rf"has {name} .*, not {value}"):
        run(tmp_path, resume=True, **{name: value})
    assert (tmp_path / "run.mezo").read_bytes() == before


def test_how_often_it_saves_logs_and_evaluates_may_change(tmp_path):
    """A checkpoint's state holds the old numbers, which the Trainer would go by."""
    stopped(tmp_path, 5)
    changed = {"logging_steps": 3, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 7}
    trainer = run(tmp_path, resume=True, max_steps=10, **changed)
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6, 9]
    assert next(entry["step"] for entry in history if "eval_loss" in entry) == 7
    assert (tmp_path / "checkpoint-6").is_dir()
    assert len(grads(tmp_path)) == 10


def test_the_table_of_changes_names_options_that_exist():
    """A name that was misspelt would let nothing through, or everything."""
    known = changes.defaults_of(MeZOConfig)
    assert [name for name in changes.HONOURED if name not in known] in ([], ["warmup_ratio"])
    assert not any(map(changes.is_free, changes.HONOURED))
    assert not any(map(changes.is_free, ("seed", "data_seed", "rule", "mezo_eps", "bf16")))


@pytest.mark.parametrize("at", [5, 7])
@pytest.mark.parametrize("schedule", ["constant", "reduce_lr_on_plateau"])
def test_the_history_of_a_resumed_run_is_whole(tmp_path, at, schedule):
    """Steps that were replayed are in it; plateau schedules raised TypeError on the way."""
    options = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 4}
    options |= {"metric_for_best_model": "eval_loss"} if schedule != "constant" else {}
    whole = run(tmp_path / "whole", **options)
    stopped(tmp_path / "cut", at, **options)
    again = run(tmp_path / "cut", resume=True, **options)
    expected, found = (
        [entry for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, again)
    )
    assert [entry["step"] for entry in found] == [2, 4, 6, 8]
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=1e-6)  # the sum of 2 in float32, in another order
    assert torch.equal(weights(again.model), weights(whole.model))


def cut(file, share=0.5):
    os.truncate(file, int(file.stat().st_size * share))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "model.safetensors"),
        lambda folder: cut(folder / "optimizer.pt"),
        lambda folder: cut(folder / "trainer_state.json"),
        lambda folder: (folder / "scheduler.pt").write_bytes(b""),
        lambda folder: (folder / "trainer_state.json").unlink(),
    ],
    ids=["weights", "optimizer", "state", "scheduler", "no state"],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, before, caplog):
    """For the one before it, or the base model, and the log; the weights are the run's."""
    whole = run(tmp_path / "whole", max_steps=11)
    path = tmp_path / "cut"
    stopped(path, 10, max_steps=11)
    damage(path / "checkpoint-8")
    if not before:
        shutil.rmtree(path / "checkpoint-4")
    with caplog.at_level(logging.WARNING, "mezo"):
        again = run(path, resume=True, max_steps=11)
    assert "checkpoint-8 is passed over: " in caplog.text
    assert torch.equal(weights(again.model), weights(whole.model))
    assert grads(path) == grads(tmp_path / "whole")
    with pytest.raises(InputError, match=r"checkpoint-8: .*: take another one"):
        make(path, max_steps=12).train(resume_from_checkpoint=str(_damaged(path, damage)))


def _damaged(path, damage):
    shutil.copytree(path / "checkpoint-8", path / "named" / "checkpoint-8")
    damage(path / "named" / "checkpoint-8")
    return path / "named" / "checkpoint-8"


def test_a_full_disk_in_a_save_is_one_line_and_the_run_goes_on_afterwards(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    path = tmp_path / "cut"

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MeZOTrainer, "_save_rng_state", full)
    told = "checkpoint-4 cannot be saved: No space left on device; the run log has all 4 steps"
    with pytest.raises(InputError, match=told):
        run(path)
    monkeypatch.undo()
    assert checkpoints.last_checkpoint(path) is None
    again = run(path, resume=True)
    assert torch.equal(weights(again.model), weights(whole.model))


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda log: log.unlink(), "deleted or moved"),
        (lambda log: log.rename(log.with_name("elsewhere")), "deleted or moved"),
        (lambda log: os.truncate(log, 100), "cut off at byte 100 of"),
        (lambda log: _replace(log), "replaced by another file"),
    ],
)
def test_a_log_that_is_taken_away_in_the_run_is_noticed_at_the_next_step(tmp_path, act, what):
    """What is written to a file that was deleted is lost, and the run went on to its end."""
    trainer = make(tmp_path, Stop(2, lambda: act(tmp_path / "run.mezo"), error=None))
    with pytest.raises(InputError, match=f"the log was {what}.* those after step 2"):
        trainer.train()
    assert trainer.state.global_step == 2


def _replace(log):
    copy = log.with_name("copy")
    copy.write_bytes(log.read_bytes())
    os.replace(copy, log)


@pytest.mark.parametrize("size", [0, 5, 11, 40, 200])
def test_a_run_killed_while_its_log_begins_can_be_begun_and_resumed(tmp_path, size):
    """It could be neither: the log was there, and had no step to go on from."""
    whole = run(tmp_path)
    data = (tmp_path / "run.mezo").read_bytes()
    for resume in (None, True):
        path = tmp_path / str(resume)
        path.mkdir()
        (path / "run.mezo").write_bytes(data[:size])
        assert not trajectory.begun(path / "run.mezo")
        again = run(path, resume=resume)
        assert torch.equal(weights(again.model), weights(whole.model))
        assert grads(path) == grads(tmp_path)


@pytest.mark.parametrize(
    "options", [{"clip_quantile": 0.5}, {"estimator": "one_point"}, {"rule": "scalar_adam"}]
)
def test_a_run_that_no_log_resumes_begins_anew_before_its_first_checkpoint(
    tmp_path, options, caplog
):
    """The same steps again, from the base model; the log of the first attempt is kept."""
    whole = run(tmp_path / "whole", **options)
    path = tmp_path / "cut"
    stopped(path, 3, **options)
    with caplog.at_level(logging.WARNING, "mezo"):
        again = run(path, resume=True, **options)
    assert "begins anew, and repeats its 3 steps" in caplog.text
    assert torch.equal(weights(again.model), weights(whole.model))
    assert grads(path) == grads(tmp_path / "whole")
    assert len(trajectory.read(path / "run-1.mezo").steps) == 3


def test_no_log_is_overwritten_by_another_run_in_its_folder(tmp_path, caplog):
    """A second Trainer, or a notebook's cell that is run again."""
    run(tmp_path, max_steps=2)
    first = (tmp_path / "run.mezo").read_bytes()
    with caplog.at_level(logging.WARNING, "mezo"):
        run(tmp_path, max_steps=3, seed=7)
    assert "it is kept as run-1.mezo" in caplog.text
    assert (tmp_path / "run-1.mezo").read_bytes() == first
    assert len(grads(tmp_path)) == 3


def test_a_second_train_of_one_trainer_goes_on_in_its_log(tmp_path):
    trainer = run(tmp_path, max_steps=2)
    trainer.train()
    assert len(grads(tmp_path)) == 4
    rebuilt = trajectory.replay(tmp_path / "run.mezo", llama())
    assert torch.equal(weights(rebuilt), weights(trainer.model))


def test_each_trial_of_a_search_has_a_log_of_its_own(tmp_path):
    """As transformers gives each its own checkpoints."""

    class Trial:
        number = 3

    trainer = make(tmp_path)
    from transformers.trainer_utils import HPSearchBackend

    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer._trial = Trial()
    from mezo.trainers.run_log import log_of

    assert log_of(trainer) == tmp_path / "run-3" / "run.mezo"


def test_an_adapter_on_another_base_does_not_go_on(tmp_path):
    """What is frozen is not in a checkpoint's adapter; another base made another run in silence."""

    def half(seed):
        trainer = make(tmp_path)
        trainer.model = llama(seed)
        for name, p in trainer.model.named_parameters():
            p.requires_grad_("layers.0" in name)
        return trainer

    trainer = half(0)
    trainer.add_callback(Stop(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    other = half(0)
    with torch.no_grad():
        other.model.lm_head.weight.add_(1.0)
    with pytest.raises(InputError, match="weights that are not trained differ"):
        other.train(resume_from_checkpoint=True)
