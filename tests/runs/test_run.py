"""What the command line does, as functions."""

import json

import pytest
import torch
from folders import reviews, same_weights
from task_runs import data, moved, replayed, settings, trained
from trainers import trained as trained_alone

from mezo import objectives, trajectory
from mezo.errors import InputError
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.runs import task as run
from mezo.runs import task_trainer
from mezo.runs.data import load_splits, task_of
from mezo.runs.result import checkpoint_of
from mezo.trainers import placement
from mezo.trainers.checkpoints import STATE, last_checkpoint


def test_the_result_is_json_and_says_how_it_came_about(place, tmp_path):
    result = trained(place, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert (result["steps"], result["kept_step"], result["method"]) == (4, 4, "mezo")
    assert result["config"]["learning_rate"] == 1e-3
    assert result["environment"]["torch"] == torch.__version__
    assert result["peak_memory_above_model"] >= 0
    assert trajectory.read(tmp_path / "run.mezo").header["config"] == result["config"]


def test_no_secret_in_the_log(place, tmp_path):
    """A run log is made to be shared."""
    trained(place, tmp_path, hub_token="hf_secret", max_steps=1)
    for name in ("run.mezo", "result.json"):
        assert b"hf_secret" not in (tmp_path / name).read_bytes()


def test_the_weights_kept_are_those_of_the_best_step(place, tmp_path, monkeypatch):
    """And `kept_step` is how many steps of the log rebuild them."""
    accuracies = iter([0.9, 0.2])
    monkeypatch.setattr(task_trainer, "_metrics", lambda *_: {"accuracy": next(accuracies)})
    result = trained(place, tmp_path / "a", load_best_model_at_end=True)
    assert (result["kept_step"], result["steps"], result["dev"]) == (2, 4, 0.9)
    log = tmp_path / "a" / "run.mezo"
    assert same_weights(replayed(place, tmp_path / "b", log, until=2), tmp_path / "a")
    assert not same_weights(replayed(place, tmp_path / "c", log), tmp_path / "a")


def test_lora_is_replayed_from_the_base_model(place, tmp_path):
    """The adapter's random start is part of the run: it comes from the seed in the log."""
    torch.manual_seed(1)
    lora = {"use_peft": True, "lora_r": 3, "lora_target_modules": ["q_proj", "v_proj"]}
    result = trained(place, tmp_path / "a", lora)
    assert result["method"] == "mezo-lora"
    torch.manual_seed(2)
    before = torch.get_rng_state()
    replayed(place, tmp_path / "b", tmp_path / "a" / "run.mezo")
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(tmp_path / "b", tmp_path / "a")
    base, saved = ModelArguments(str(place / "tiny")), ModelArguments(str(tmp_path / "a"))
    test = data(place, test_file=data(place).dev_file)
    by_log = run.evaluate(base, test, log=str(tmp_path / "a" / "run.mezo"))
    by_folder = run.evaluate(saved, test)
    assert by_log["loss"] == by_folder["loss"] == result["test"]["loss"]
    assert result["test"]["loss"] != result["zero_shot"]["loss"]


def test_an_interrupted_lora_run_goes_on_to_the_same_weights(place, tmp_path, monkeypatch):
    """Its checkpoints hold the adapter alone."""
    lora = {"use_peft": True}
    trained(place, tmp_path / "whole", lora)
    loss, calls = objectives.Causal.pair_loss, []

    def interrupted(self, model, batch, both):
        calls.append(1)
        if len(calls) == 3:  # the first step compares one pass with two
            raise KeyboardInterrupt
        return loss(self, model, batch, both)

    monkeypatch.setattr(objectives.Causal, "pair_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(place, tmp_path / "cut", lora)
    monkeypatch.undo()
    trained(place, tmp_path / "cut", lora, resume_from_checkpoint="true")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"per_device_train_batch_size": 99, "dataloader_drop_last": True}, "no step was made"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
    ],
)
def test_a_run_that_cannot_make_a_step_is_refused(options, told, place, tmp_path):
    """It saved the untrained model as the result, or ended in a ZeroDivisionError."""
    with pytest.raises(InputError, match=told):
        trained(place, tmp_path, **options)


def test_trainable_moves_what_matches_and_nothing_else(place, tmp_path):
    result = trained(place, tmp_path / "a", {"trainable": r"\.bias$"})
    names = moved(place, tmp_path / "a")
    assert names
    assert all(name.endswith(".bias") for name in names)
    assert result["config"]["trainable"] == r"\.bias$"
    log = tmp_path / "a" / "run.mezo"
    assert {entry["name"] for entry in trajectory.read(log).header["tensors"]} >= names
    assert same_weights(replayed(place, tmp_path / "b", log), tmp_path / "a")


def test_frozen_layers_are_not_trained_and_run_once(place, tmp_path, monkeypatch):
    """The same as freezing alone, up to rounding, in fewer runs of the lower layer."""
    calls, load = [], models.load

    def counting(*args, **options):
        model, tokenizer = load(*args, **options)
        layer = model.model.decoder.layers[0]
        layer.fc1.register_forward_pre_hook(lambda module, args: calls.append(1))
        return model, tokenizer

    monkeypatch.setattr(models, "load", counting)
    frozen = trained(place, tmp_path / "a", {"freeze_layers": 1})
    texts = 24  # one row each, as both candidates are single tokens
    assert len(calls) <= 1 + texts + 1  # freezing, the texts, the comparison
    names = moved(place, tmp_path / "a")
    assert names
    assert all(".layers.1." in name or ".decoder.final" in name for name in names)
    assert frozen["config"]["freeze_layers"] == 1
    log = tmp_path / "a" / "run.mezo"
    assert same_weights(replayed(place, tmp_path / "b", log), tmp_path / "a")
    plain = trained(place, tmp_path / "c", {"trainable": r"layers\.1\.|decoder\.final"})
    # losses of size 1 in float32 after two layers: some 2^-24 times their depth
    assert plain["test"]["loss"] == pytest.approx(frozen["test"]["loss"], abs=1e-5)
    assert moved(place, tmp_path / "c") == names


def test_adam_is_the_same_task_by_back_propagation(place, tmp_path):
    result = trained(place, tmp_path, method="adam")
    assert result["method"] == "adam"
    assert result["train_loss"] > 0
    assert not (tmp_path / "run.mezo").exists()
    assert moved(place, tmp_path)


def test_adam_trains_above_frozen_layers(place, tmp_path):
    """The cached states carry no gradient, and need none."""
    trained(place, tmp_path, {"freeze_layers": 1}, method="adam")
    names = moved(place, tmp_path)
    assert names
    assert all(".layers.1." in name or ".decoder.final" in name for name in names)


def test_a_trainer_of_one_s_own_logs_what_it_was_told(tmp_path):
    """Hundreds of defaults would hide the few that were changed."""
    trained_alone(tmp_path, max_steps=2)
    config = trajectory.read(tmp_path / "run.mezo").header["config"]
    assert config["max_steps"] == 2
    assert config["seed"] == 42
    assert "adam_beta1" not in config
    assert len(config) < 25


def test_resume_takes_the_last_whole_checkpoint(place, tmp_path):
    """A checkpoint is whole when its trainer_state.json is there, which is written last."""
    args = settings(tmp_path, resume_from_checkpoint="true")
    for step, whole in ((8, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / STATE).write_text(f'{{"global_step": {step}}}')
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert checkpoint_of(args) is True  # and on to the log's end
    assert checkpoint_of(args, has_log=False) == str(tmp_path / "checkpoint-10")
    assert checkpoint_of(settings(tmp_path)) is None
    chosen = settings(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert checkpoint_of(chosen) == str(tmp_path / "checkpoint-8")


def test_splits(place, tmp_path):
    """Without a dev file, dev is split off; with k, both are k a label; test is dev, or its own."""
    task = task_of(data(place))
    own = load_splits(task, data(place))
    assert own["dev"] == own["test"]
    split = load_splits(task, data(place, dev_file=None, num_dev=4))
    assert (len(split["train"]), len(split["dev"])) == (20, 4)
    assert not {e.origin for e in split["train"]} & {e.origin for e in split["dev"]}
    few = load_splits(task, data(place, k=3))
    assert [e.label for e in few["train"]].count(1) == [e.label for e in few["dev"]].count(1) == 3
    assert not {e.origin for e in few["train"]} & {e.origin for e in few["dev"]}
    capped = load_splits(task, data(place, num_train=5, num_dev=2, num_test=3))
    assert [len(capped[name]) for name in ("train", "dev", "test")] == [5, 2, 3]
    short = reviews(tmp_path / "short.jsonl", count=4)
    with pytest.raises(InputError, match="4 training examples are too few"):
        load_splits(task, data(place, train_file=str(short), dev_file=None))


def test_in_context_examples_are_shown(place):
    """They change the scores, and are counted."""
    file = data(place).dev_file
    model = ModelArguments(str(place / "tiny"))
    plain = run.evaluate(model, data(place, test_file=file))
    shown = run.evaluate(model, data(place, test_file=file, demonstrations=2))
    assert shown["demonstrations"] == 2
    assert shown["loss"] != plain["loss"]
    calibrated = run.evaluate(model, data(place, test_file=file, calibrate=True))
    assert calibrated["loss"] != plain["loss"]


def test_encoders_train_too(place, tmp_path):
    model = {"model_name_or_path": str(place / "encoder")}
    result = trained(place, tmp_path, model)
    assert result["test"]["loss"] != result["zero_shot"]["loss"]


def test_what_is_evaluated_is_on_the_accelerator(monkeypatch):
    """Evaluation without a Trainer would run on the CPU, where loading leaves a model."""
    monkeypatch.setattr(placement, "accelerator", lambda: torch.device("meta"))
    model = torch.nn.Linear(2, 2)
    with placement.inference(model, offload=False):
        assert model.weight.is_meta
    placed = torch.nn.Linear(2, 2)
    placed.hf_device_map = {"": "cpu"}  # by its loading
    placement.place(placed)
    assert not placed.weight.is_meta
    given = torch.nn.Linear(2, 2)
    placement.place(given, "cpu")
    assert not given.weight.is_meta
