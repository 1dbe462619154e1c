"""Rules, estimators and schedules under the Trainer: as in the plain loop, resumed and replayed."""

import pytest
import torch
from models import Toy, llama, weights
from torch.optim.lr_scheduler import LambdaLR
from trainers import grads, points, settings, trainer_at

from mezo import MeZO, layer_norms, trajectory
from mezo.errors import InputError
from mezo.schedules import Schedule, linear
from mezo.trainers.config import rule_of, scale_rates_

CASES = {
    "momentum": {"rule": "momentum", "momentum": 0.8},
    "momentum, history": {"rule": "momentum", "window": "3"},
    "adam": {"rule": "adam", "adam_beta2": 0.9},
    "sign": {"rule": "sign"},
    "scalar_adam": {"rule": "scalar_adam"},
    "one_sided": {"estimator": "one_sided", "num_samples": 2, "shaping": "z_scores"},
    "one_point": {"estimator": "one_point"},
    "modified": {"modified": "expectation"},
    "modified, gradients": {"modified": "variance", "modified_norms": "gradients"},
    "masked": {"keep": 0.5},
    "schedules": {"num_samples": 1, "num_samples_end": 3, "mezo_eps_end": 1e-4},
    "scaled rate": {"num_samples_end": 3, "scale_lr_with_samples": True, "warmup_steps": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_saved_resumed_and_replayed(name, tmp_path):
    """From a checkpoint and, where the log suffices, its tail: the same weights, to the bit."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2} | CASES[name]
    whole = trainer_at(tmp_path / "a", **options)
    whole.train()
    base = trajectory.replay(tmp_path / "a" / "run.mezo", llama())
    assert torch.equal(weights(base), weights(whole.model))
    assert not torch.equal(weights(base), weights(llama()))
    before = grads(tmp_path / "a")
    (tmp_path / "a" / "checkpoint-6" / "trainer_state.json").unlink()
    again = trainer_at(tmp_path / "a", model=llama(seed=5), **options)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model))
    assert grads(tmp_path / "a") == before


def test_one_side_reads_the_clean_loss_once(tmp_path):
    """n + 1 forward passes a micro-batch, and the loss logged is that at theta."""
    calls = []

    class Counting(Toy):
        def forward(self, x, labels):
            calls.append(1)
            return super().forward(x, labels)

    options = {"estimator": "one_sided", "num_samples": 3, "gradient_accumulation_steps": 2}
    trainer = trainer_at(tmp_path, model=Counting(), data=points(), max_steps=2, **options)
    trainer.train()
    assert len(calls) == 2 * 2 * (3 + 1) + 2 * 2  # and the first step's look
    assert trajectory.read(tmp_path / "run.mezo").header["estimator"] == "one_sided"


def test_directions_have_batches_of_their_own(tmp_path):
    """Algorithm 2: estimate i is along z_i on micro-batches i, i + n, ... alone."""
    options = {"num_samples": 2, "gradient_accumulation_steps": 4, "fresh_batches": True}
    data = points()
    trainer = trainer_at(tmp_path, model=Toy(), data=data, max_steps=1, **options)
    trainer.train()
    model = Toy()
    optimizer = MeZO(model.named_parameters(), seed=42)
    for probe in range(2):
        rows = [data[4 * k + j] for k in (probe, probe + 2) for j in range(4)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in ("x", "labels")}
        found = optimizer.estimate(lambda batch=batch: model(**batch)["loss"], probe)
        assert grads(tmp_path)[0][probe] == pytest.approx(found.projected_grad, rel=1e-9)


def test_schedules_are_stairs_of_the_step(tmp_path):
    stairs = linear(1, 5, 100, stairs=5)
    assert [stairs(t) for t in (0, 19, 20, 40, 79, 80, 99, 100, 500)] == [1, 1, 2, 3, 4, 5, 5, 5, 5]
    assert linear(1, 5, 1)(0) == 1
    model = Toy()
    optimizer = MeZO(model.named_parameters(), seed=1)
    schedule = Schedule(optimizer, eps=lambda t: 0.1 / (t + 1), num_samples=lambda t: 1 + t)
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        for _ in range(3):
            schedule.step()
            optimizer.step(lambda: model(**{k: v[None] for k, v in points(1)[0].items()})["loss"])
    steps = trajectory.read(tmp_path / "run.mezo").steps
    assert [len(s.record.projected_grads) for s in steps] == [1, 2, 3]
    assert [s.eps for s in steps] == [0.1, 0.05, 0.1 / 3]
    base = trajectory.replay(tmp_path / "run.mezo", Toy())
    assert torch.equal(weights(base), weights(model))
    with pytest.raises(InputError, match="the schedule of eps gives -1"):
        Schedule(optimizer, eps=lambda t: -1).step()
    for given in ({"steps": 0}, {"steps": 5, "stairs": 1}):
        with pytest.raises(InputError, match="steps must be at least 1 and stairs at least 2"):
            linear(1, 2, **given)


def test_the_rate_grows_with_the_number_of_directions(tmp_path):
    """Table 6: lr n, on top of the schedule of the rate; the next step begins from its lr again."""
    options = {"max_steps": 20, "num_samples_end": 3, "scale_lr_with_samples": True}
    options |= {"lr_scheduler_type": "linear", "learning_rate": 1e-3}
    trainer_at(tmp_path, **options).train()
    for number, step in enumerate(trajectory.read(tmp_path / "run.mezo").steps):
        n = len(step.record.projected_grads)
        assert n == round(1 + 2 * number / 19)
        assert step.lrs == pytest.approx([n * 1e-3 * (20 - number) / 20] * len(step.lrs), rel=1e-6)
    optimizer = MeZO(Toy().named_parameters(), lr=1e-3, num_samples=3)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    for _ in range(2):  # a step that is made again, as after a refused update, has its rate
        scale_rates_(optimizer, schedule)
        assert optimizer.param_groups[0]["lr"] == 3 * 1e-3
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    with pytest.raises(
        InputError, match="scale_lr_with_samples cannot be combined with a ReduceLROnPl"
    ):
        trainer_at(tmp_path / "b", **(options | plateau)).train()


def test_norms_of_gradients_are_of_a_batch_from_all_over_the_data(tmp_path):
    """Four of 64 examples, 16 apart, as `gradient_norms` measures them; kept in the log."""
    options = {"modified": "expectation", "modified_norms": "gradients", "seed": 7}
    trainer = trainer_at(tmp_path, model=Toy(), data=points(), **options)
    trainer.train()
    model, rows = Toy(), points()[::16]
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("x", "labels")}
    loss = lambda: model(**batch)["loss"]  # noqa: E731
    expected = layer_norms.gradient_norms(model.named_parameters(), loss, eps=1e-3, seed=7)
    header = trajectory.read(tmp_path / "run.mezo").header
    found = {entry["name"]: entry.get("scale", 1.0) for entry in header["tensors"]}
    assert found == pytest.approx(expected, rel=1e-9)


def test_what_the_arguments_cannot_mean_is_refused(tmp_path):
    for given, message in (
        (
            {"rule": "momentum", "window": "many"},
            "window must be a number of steps or all, got 'many'",
        ),
        ({"rule": "sgd", "window": "3"}, "window is for the rules momentum and adam, not sgd"),
        ({"rule": "lion"}, "rule must be one of"),
        ({"modified": "mean"}, "modified must be variance or expectation, got 'mean'"),
        (
            {"modified": "variance", "modified_norms": "weights"},
            "modified_norms must be parameters or gradients, got 'weights'",
        ),
        ({"modified_norms": "gradients"}, "gradients is for modified, which is not set"),
        ({"keep": 0.5, "perturbation": "in_place"}, "perturb in scratch"),
        ({"estimator": "spsa"}, "estimator must be two_point"),
    ):
        with pytest.raises(InputError, match=message):
            trainer_at(tmp_path, **given).train()
    found = rule_of(settings(tmp_path, rule="adam", window="all", adam_beta1=0.5))
    assert found.betas == (0.5, 0.999)
    assert found.window == "all"
