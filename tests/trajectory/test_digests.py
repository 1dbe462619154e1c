"""A log notes what the weights are, at checkpoints and at the end; a replay compares."""

import json
import re

import pytest
import torch
from checkpoints import base, loaded, tune
from models import Regression, weights
from trainers import Watch, trainer_at

from mezo import MeZO, trajectory
from mezo.errors import InputError
from mezo.trajectory.fingerprints import Comparison
from mezo.trajectory.format import encode
from mezo.trajectory.header import DIGESTS

FORMS = pytest.mark.parametrize("form", ["in_place", "scratch", "low_rank"])


def by_data(p):
    p.data.mul_(0.9)


def by_numpy(p):
    p.detach().numpy()[:] *= 0.9


def in_one_element(p):
    p.data.view(-1)[-2] += 1e-3


def run(path, between=None, form="in_place", dtype=torch.float32, early=(), **options):
    """Six steps; `between` writes to a weight before the fourth. Returns the trained model."""
    model = Regression(dtype)
    optimizer = MeZO(
        model.named_parameters(), lr=1e-2, seed=1, perturbation=form, interval=2, **options
    )
    with trajectory.record(optimizer, path, model=model) as writer:
        for step in range(6):
            if step == 3 and between is not None:
                between(model.last)
            if step in early:
                writer.digest()
            optimizer.step(model)
    return model


def digested(path):
    return [s.start for s in trajectory.read(path).segments if DIGESTS in s.header]


@FORMS
@pytest.mark.parametrize("write", [by_data, by_numpy, in_one_element])
def test_a_replay_names_the_tensor_and_the_steps_of_a_write_that_no_record_explains(
    form, write, tmp_path
):
    """The run trained on from what was written; its log alone gives other weights."""
    log = tmp_path / "run.mezo"
    model = run(log, write, form, early=(2, 4))
    told = "something besides the optimizer wrote to last between steps 2 and 4 of the run"
    with pytest.raises(InputError, match=told):
        trajectory.replay(log, Regression(torch.float32))
    half = trajectory.replay(log, Regression(torch.float32), until=2)
    plain = trajectory.replay(log, Regression(torch.float32), verify=False)
    assert torch.equal(weights(half), weights(run_until(2, form, tmp_path)))
    assert not torch.equal(weights(plain), weights(model))


def run_until(steps, form, folder):
    run(folder / "other.mezo", form=form, early=(2,))
    return trajectory.replay(folder / "other.mezo", Regression(torch.float32), until=steps)


@pytest.mark.parametrize(
    ("form", "dtype", "options"),
    [
        ("in_place", torch.float32, {}),
        ("in_place", torch.float64, {"num_samples": 2}),
        ("in_place", torch.bfloat16, {"rounding": "nearest"}),
        ("scratch", torch.float32, {"rule": "momentum", "weight_decay": 0.1}),
        ("scratch", torch.bfloat16, {"rounding": "stochastic"}),
        ("scratch", torch.bfloat16, {"rounding": "compensated"}),
        ("scratch", torch.float16, {"rounding": "master"}),
        ("low_rank", torch.float32, {"rule": "momentum"}),
        ("low_rank", torch.bfloat16, {"weight_decay": 0.1}),
    ],
)
def test_an_undisturbed_run_replays_and_every_digest_is_compared(
    form, dtype, options, tmp_path, monkeypatch
):
    """The digests split a replay's passes over a tensor; its bits stay."""
    looked = []
    look = Comparison.look
    monkeypatch.setattr(
        Comparison, "look", lambda self, *at: looked.append(at[:2]) or look(self, *at)
    )
    model = run(tmp_path / "run.mezo", None, form, dtype, (2, 4), **options)
    again = trajectory.replay(tmp_path / "run.mezo", Regression(dtype))
    assert torch.equal(weights(again), weights(model))
    assert looked == [(name, at) for name, _ in model.named_parameters() for at in (2, 4, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_updates_that_are_not_written_are_digested_as_if_they_were(dtype, tmp_path):
    """Within an interval the matrices lag behind; looking at them must not write the updates."""
    path, model = tmp_path / "run.mezo", Regression(dtype)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, perturbation="low_rank", interval=4)
    plain = run_low_rank(tmp_path / "plain.mezo", Regression(dtype))
    for resume in (False, True):
        with trajectory.record(optimizer, path, model=model, resume=resume) as writer:
            optimizer.step(model)
            before = weights(model).clone()
            writer.digest()
            assert torch.equal(weights(model), before)
            optimizer.step(model)
            optimizer.step(model)
    assert digested(path) == [1, 3, 4, 6]
    optimizer.write()
    assert torch.equal(weights(trajectory.replay(path, Regression(dtype))), weights(model))
    assert torch.equal(weights(plain), weights(model))


def run_low_rank(path, model):
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, perturbation="low_rank", interval=4)
    with trajectory.record(optimizer, path, model=model):
        for _ in range(6):
            optimizer.step(model)
    optimizer.write()
    return model


def test_a_write_between_low_rank_steps_is_named_though_no_sum_was_written(tmp_path):
    """A run that ends within its first interval had no digest at all."""
    model, log = Regression(torch.float32), tmp_path / "run.mezo"
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, perturbation="low_rank")
    with trajectory.record(optimizer, log, model=model):
        optimizer.step(model)
        with torch.no_grad():
            next(p for p in model.parameters() if p.dim() == 2).data.view(-1)[-2] += 1e-3
        optimizer.step(model)
    with pytest.raises(InputError, match=r"wrote to .* between steps 0 and 2 of the run"):
        trajectory.replay(log, Regression(torch.float32))


def test_a_replay_says_where_its_log_has_no_digests(tmp_path, caplog):
    """A killed run has none at its end, and nothing shows what else wrote to its weights."""
    log, model = tmp_path / "run.mezo", Regression(torch.float32)
    optimizer = MeZO(model.named_parameters(), seed=1)
    writer = trajectory.record(optimizer, log, model=model)
    optimizer.step(model)
    writer.close()
    with caplog.at_level("INFO", "mezo"):
        trajectory.replay(log, Regression(torch.float32))
    assert "the log has no digests of the weights of any step" in caplog.text
    with trajectory.record(optimizer, log, resume=True):
        optimizer.step(model)
    caplog.clear()
    with caplog.at_level("INFO", "mezo"):
        trajectory.replay(log, Regression(torch.float32))
    assert not caplog.text


def test_a_resumed_log_keeps_the_digest_and_refuses_other_weights(tmp_path):
    """A checkpoint of another run, or one that was changed, would go on under the wrong log."""
    path, model = tmp_path / "run.mezo", Regression(torch.float32)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1)
    for resume in (False, True):
        with trajectory.record(optimizer, path, model=model, resume=resume):
            optimizer.step(model)
    assert digested(path) == [1, 2]
    model.last.data[0] += 1
    with pytest.raises(InputError, match="last is not what it was when the run had made 2 steps"):
        trajectory.record(optimizer, path, resume=True)
    model.last.data[0] -= 1


def test_both_forms_of_a_log_and_merged_logs_keep_their_digests(tmp_path):
    run(tmp_path / "run.mezo", early=(2, 4))
    trajectory.compact(tmp_path / "run.mezo", tmp_path / "compact.mezo")
    trajectory.merge([tmp_path / "compact.mezo"], tmp_path / "long.mezo")
    assert digested(tmp_path / "compact.mezo") == [2, 4, 6]
    assert (tmp_path / "long.mezo").read_bytes() == (tmp_path / "run.mezo").read_bytes()


def test_a_merged_log_has_the_digests_of_the_logs_it_is_made_of(tmp_path):
    """The second log of a run in another place begins where the first ends, or before."""
    model = Regression(torch.float32)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1)
    for name in ("a", "b", "c"):
        file = tmp_path / f"{name}.mezo"
        with trajectory.record(optimizer, file, model=model, resume=name != "a") as writer:
            optimizer.step(model)
            writer.digest()
            optimizer.step(model)
    parts = [tmp_path / f"{name}.mezo" for name in "abc"]
    trajectory.merge(parts, tmp_path / "whole.mezo")
    assert digested(tmp_path / "whole.mezo") == [1, 2, 3, 4, 5, 6]
    again = trajectory.replay(tmp_path / "whole.mezo", Regression(torch.float32))
    assert torch.equal(weights(again), weights(model))


def test_a_replay_from_file_to_file_compares_too(tmp_path):
    """The tuned files get their names only if they are the run's."""
    model = base(tmp_path / "base", "llama", torch.float32)
    tuned = loaded(tmp_path / "base", type(model))
    tune(tuned, tmp_path / "run.mezo")
    log = tmp_path / "run.mezo"
    forged(log, tmp_path / "forged.mezo")
    with pytest.raises(InputError, match="something besides the optimizer wrote to"):
        trajectory.replay_checkpoint(tmp_path / "forged.mezo", tmp_path / "base", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    where = (tmp_path / "forged.mezo", tmp_path / "base", tmp_path / "out")
    assert trajectory.replay_checkpoint(*where, verify=False) == 3
    assert list((tmp_path / "out").glob("*.safetensors"))


def forged(log, path, digest=lambda x: "0" * len(x)):
    """The log with other digests at its end."""
    segments = trajectory.read(log).segments
    segments[-1].header[DIGESTS] = digest(segments[-1].header[DIGESTS])
    path.write_bytes(encode(segments))


@pytest.mark.parametrize("value", [lambda x: x[:-1], lambda x: 7, lambda x: "G" * len(x)])
def test_impossible_digests_are_damage(value, tmp_path):
    """A header comes from a file that anybody may have written."""
    run(tmp_path / "run.mezo")
    forged(tmp_path / "run.mezo", tmp_path / "forged.mezo", value)
    with pytest.raises(InputError, match="digests are not of 3 tensors"):
        trajectory.read(tmp_path / "forged.mezo")


def test_a_trainers_log_has_digests_at_checkpoints_and_at_its_end(tmp_path):
    """What a callback writes by .data is found, and where."""
    steps = []

    def write(model):
        steps.append(1)
        if len(steps) == 3:
            model.model.norm.weight.data[-1] *= 1.5

    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    trainer = trainer_at(tmp_path / "a", **options)
    trainer.train()
    assert digested(tmp_path / "a/run.mezo") == [2, 4, 5]
    again = trajectory.replay(tmp_path / "a/run.mezo", trainer_at(tmp_path / "c").model)
    assert torch.equal(weights(again), weights(trainer.model))
    trainer_at(tmp_path / "b", callbacks=[Watch("on_step_end", write)], **options).train()
    told = re.escape("wrote to model.norm.weight between steps 2 and 4 of the run")
    with pytest.raises(InputError, match=told):
        trajectory.replay(tmp_path / "b/run.mezo", trainer_at(tmp_path / "d").model)


def test_the_best_model_that_is_loaded_at_the_end_is_not_taken_for_the_runs(tmp_path, caplog):
    """The log's end is the run's last step, whichever weights the Trainer loads after it.

    A default `mezo train` ended with a warning that something else wrote to its weights."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "eval_steps": 2}
    options |= {"eval_strategy": "steps", "load_best_model_at_end": True, "greater_is_better": True}
    trainer = trainer_at(tmp_path / "a", metric_for_best_model="loss", **options)
    trainer.train()
    assert digested(tmp_path / "a/run.mezo") == [2, 4]
    assert "something besides the optimizer wrote" not in caplog.text
    trajectory.replay(tmp_path / "a/run.mezo", trainer_at(tmp_path / "c").model)


def test_a_digest_takes_four_characters_a_tensor(tmp_path):
    """A log is short: 16 bytes a step."""
    run(tmp_path / "run.mezo")
    header = trajectory.read(tmp_path / "run.mezo").segments[-1].header
    assert len(json.dumps(header[DIGESTS])) == 2 + 4 * 3
