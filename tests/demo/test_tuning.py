"""Tuning in a plain loop: MeZO and its baseline differ in the step, and in nothing else."""

import math

import pytest
import torch
from models import tiny_model
from tiny_tokenizers import byte_bpe

from mezo import trajectory
from mezo.demo import tune as tuning
from mezo.demo.tune import Recipe, batches, tune
from mezo.errors import InputError
from mezo.models.trainable import select
from mezo.objectives import form_for
from mezo.tasks import Example, custom_task

TASK = custom_task("{text} It was", [" terrible", " great"])
TEXTS = ("a charming journey .", "no wit , only labored gags", "dull", "the film of the year")
EXAMPLES = [Example({"text": TEXTS[i % 4] + " never" * (i % 5)}, i % 2) for i in range(20)]


def made():
    tokenizer = byte_bpe()
    model = tiny_model("opt", len(tokenizer)).float()
    return model, form_for(model, tokenizer, TASK)


def tuned(method="mezo", steps=4, seed=1, log=None, evaluations=2, on_step=None, **changes):
    """The model after a run, and what the run says."""
    model, form = made()
    recipe = Recipe(method, steps, **({"lr": 1e-3, "batch_size": 4} | changes))
    options = {"seed": seed, "held_out": EXAMPLES[:6], "evaluations": evaluations}
    return model, tune(model, form, EXAMPLES, recipe, **options, log=log, on_step=on_step)


def equal(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_batches_are_shuffled_epochs_of_like_length():
    """Every example once an epoch; the same for a seed; less padding than by chance."""
    features = [{"length": i, "id": i} for i in range(400)]

    def epoch(seed):
        stream = batches(features, 10, seed)
        return [[f["id"] for f in next(stream)] for _ in range(40)]

    first = epoch(1)
    assert sorted(i for batch in first for i in batch) == list(range(400))
    assert first == epoch(1) != epoch(2)
    padding = sum(max(batch) - i for batch in first for i in batch)
    generator = torch.Generator().manual_seed(0)
    chance = torch.randperm(400, generator=generator).view(40, 10).tolist()
    assert padding < sum(max(batch) - i for batch in chance for i in batch) / 2


def test_a_batch_larger_than_the_data_is_all_of_it():
    stream = batches([{"length": 1}, {"length": 2}], 8, 0)
    assert [len(next(stream)) for _ in range(3)] == [2, 2, 2]


def test_mezo_and_adam_see_the_same_batches(monkeypatch):
    """Else a comparison of the two would be one of luck."""
    seen, own = [], tuning.to_device

    def watched(batch, model):
        seen[-1].append(batch["input_ids"])
        return own(batch, model)

    monkeypatch.setattr(tuning, "to_device", watched)
    for method in ("mezo", "adam"):
        seen.append([])
        tuned(method)
    assert len(seen[0]) == len(seen[1]) == 4
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


@pytest.mark.parametrize("method", ["mezo", "adam"])
def test_a_run_is_its_seed_s(method):
    """Bitwise, whatever torch's own generator holds; another seed is another run."""
    torch.manual_seed(1)
    one, _ = tuned(method)
    torch.manual_seed(2)
    assert equal(one, tuned(method)[0])
    assert not equal(one, tuned(method, seed=2)[0])


@pytest.mark.parametrize("method", ["mezo", "adam"])
def test_evaluation_does_not_change_the_run(method):
    one, often = tuned(method, evaluations=4)
    other, seldom = tuned(method, evaluations=1)
    assert equal(one, other)
    assert often.losses == seldom.losses
    assert [point.step for point in often.points] == [0, 1, 2, 3, 4]
    assert [point.step for point in seldom.points] == [0, 4]
    assert often.points[-1].loss == seldom.points[-1].loss


@pytest.mark.parametrize("samples", [1, 2])
def test_the_log_replays_to_the_tuned_weights(tmp_path, samples):
    """Bitwise, with a learning rate that moves at every step."""
    model, found = tuned(log=tmp_path / "run.mezo", options={"num_samples": samples})
    base, _ = made()
    assert not equal(base, model)
    assert equal(trajectory.replay(tmp_path / "run.mezo", base), model)
    log = trajectory.read(tmp_path / "run.mezo")
    assert [step.lrs[0] for step in log.steps] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    losses = [step.record.loss for step in log.steps]
    assert losses == pytest.approx(found.losses, rel=2**-23)  # the log's are float32


def test_adam_leaves_no_log(tmp_path):
    tuned("adam", log=tmp_path / "run.mezo")
    assert not (tmp_path / "run.mezo").exists()


def test_forward_passes_are_counted():
    """Two a direction; a backward pass counts as two forward passes."""
    assert tuned(options={"num_samples": 3})[1].points[-1].forward_passes == 2 * 3 * 4
    assert tuned("adam")[1].points[-1].forward_passes == 3 * 4


def test_on_step_is_told_of_every_step():
    told = []
    _, found = tuned(on_step=lambda step, loss: told.append((step, loss)))
    assert told == list(enumerate(found.losses, 1))
    assert all(math.isfinite(loss) for _, loss in told)


def test_the_log_is_closed_by_an_exception(tmp_path):
    """What was done stays readable, and another run may write."""

    def fail(step, loss):
        if step == 2:
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        tuned(log=tmp_path / "run.mezo", on_step=fail)
    assert len(trajectory.read(tmp_path / "run.mezo").steps) == 2
    tuned(log=tmp_path / "run.mezo")
    assert len(trajectory.read(tmp_path / "run.mezo").steps) == 4


def test_select_trains_what_matches():
    model, _ = made()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert select(model, "") == sum(sizes.values())
    number = select(model, r"layers\.1.*bias")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in sizes if "layers.1" in name and "bias" in name}
    assert number == sum(sizes[name] for name in trained)


@pytest.mark.parametrize(
    ("expression", "message"),
    [("zzz", "trainable 'zzz' matches no parameter"), ("(", r"trainable '\(' is not a regular")],
)
def test_select_refuses_what_trains_nothing(expression, message):
    """And leaves the model as it was."""
    model, _ = made()
    with pytest.raises(InputError, match=message):
        select(model, expression)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["mezo", "adam"])
def test_what_is_not_trainable_stays(method):
    base, _ = made()
    model, _ = tuned(method, trainable="layer_norm")
    pairs = zip(base.named_parameters(), model.parameters(), strict=True)
    moved = {name for (name, p), q in pairs if not torch.equal(p, q)}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "sgd"}, "method must be mezo or adam, got 'sgd'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"evaluations": 0}, "evaluations must be at least 1, got 0"),
        ({"options": {"eps": -1.0}}, "eps must be positive, got -1.0"),
    ],
)
def test_mistakes_are_one_sentence(changes, message):
    with pytest.raises(InputError, match=message):
        tuned(**changes)


def test_no_examples_is_an_input_error():
    model, form = made()
    with pytest.raises(InputError, match="no training examples"):
        tune(model, form, [], Recipe("mezo", 1, 1e-3), seed=0, held_out=EXAMPLES)


@pytest.mark.parametrize("method", ["mezo", "adam"])
def test_the_loss_goes_down(method):
    """A direction of descent is found: the sign of the update is right."""
    _, found = tuned(method, steps=40, lr=3e-3, evaluations=1, batch_size=20)
    assert found.points[-1].loss < found.points[0].loss - 0.05
