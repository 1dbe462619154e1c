"""MeZOPolicyTrainer with an engine: the numbers of a plain run, and weights that come back."""

import copy
import logging

import pytest
import torch
from battery import same, values
from models import tiny_model
from tiny_tokenizers import byte_bpe
from trainers import settings

from mezo import MeZOPolicyConfig, MeZOPolicyTrainer, trajectory
from mezo.engines import TransformersEngine
from mezo.errors import InputError

WORDS = ["the film", "It was", "no wit", "a boring movie", "terrible", "charming", "long", "a"]
ROWS = [{"prompt": WORDS[i % 8]} for i in range(32)]


def long(completions, **kwargs):
    return [float(len(text)) for text in completions]


def made(path, engine=None, held_out=(), **changes):
    tokenizer = byte_bpe()
    model = tiny_model("llama", len(tokenizer)).float()
    options = {"max_completion_length": 6, "mezo_eps": 1e-2, "learning_rate": 1e-2}
    args = settings(path, MeZOPolicyConfig, **(options | changes))
    engine = engine(copy.deepcopy(model), tokenizer) if callable(engine) else engine
    rows = (ROWS, ROWS[:6], tokenizer)
    return MeZOPolicyTrainer(model, long, args, *rows, engine=engine, held_out=held_out)


def test_an_engine_takes_the_steps_of_a_plain_run(tmp_path):
    """The same log, the same evaluation; the trainer's model gets the engine's weights."""
    plain, remote = made(tmp_path / "plain"), made(tmp_path / "remote", TransformersEngine)
    for trainer in (plain, remote):
        trainer.train()
    logs = [trajectory.read(tmp_path / name / "run.mezo").steps for name in ("plain", "remote")]
    first, second = ([step.record for step in log] for log in logs)
    assert first == second
    assert same(values(plain.model), values(remote.model))
    names = ("eval_reward", "eval_completions/mean_length")
    evaluations = [trainer.evaluate() for trainer in (plain, remote)]
    assert [evaluations[0][n] for n in names] == [evaluations[1][n] for n in names]
    base = tiny_model("llama", len(byte_bpe())).float()
    trajectory.replay(tmp_path / "remote" / "run.mezo", base)
    assert same(values(base), values(remote.model))


def test_evaluations_read_the_engines_weights_while_the_model_waits(tmp_path):
    """Nothing is copied for an evaluation; for a checkpoint everything is."""
    seen = []

    class Counts(TransformersEngine):
        def weights(self):
            seen.append(1)
            return super().weights()

    trainer = made(tmp_path, Counts, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert len(seen) == 2  # compared at the start, and fetched at the end


def test_a_run_with_an_engine_goes_on(tmp_path):
    """The engine begins with the base model and is given the weights that the log stands for."""
    whole = made(tmp_path / "whole", TransformersEngine)
    whole.train()
    made(tmp_path / "parts", TransformersEngine, max_steps=2).train()
    trainer = made(tmp_path / "parts", TransformersEngine)
    trainer.train(resume_from_checkpoint=True)
    assert same(values(whole.model), values(trainer.model))


def test_the_best_weights_are_given_to_the_engine(tmp_path):
    """They are loaded into the trainer's model: evaluations would read others."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "reward"}
    trainer = made(tmp_path, TransformersEngine, learning_rate=0.3, **options)
    trainer.train()
    assert trainer.state.best_global_step < 4
    held = dict(trainer._held.engine.weights())
    assert same(held, values(trainer.model))
    assert trainer.evaluate()["eval_reward"] == trainer.state.best_metric


def test_a_closed_engine_leaves_a_plain_trainer(tmp_path):
    trainer = made(tmp_path, TransformersEngine)
    trainer.train()
    before = trainer.evaluate()["eval_reward"]
    trainer.close_engine()
    assert trainer.evaluate()["eval_reward"] == before


def test_rewards_are_scaled_prompt_by_prompt(tmp_path):
    """The log holds differences of GRPO's advantages: an offset of a prompt's reward is nothing."""

    def offset(completions, prompts, **kwargs):
        return [len(c) + 100.0 * len(p) for c, p in zip(completions, prompts, strict=True)]

    trainers = []
    for name, judge in (("a", long), ("b", offset)):
        trainer = made(tmp_path / name, num_samples=3, scale_rewards="group", learning_rate=1e-3)
        trainer.reward_funcs = type(trainer.reward_funcs)(judge)
        trainer.train()
        trainers.append(trainer)
    first, second = (
        [g for s in trajectory.read(tmp_path / n / "run.mezo").steps for g in
         s.record.projected_grads] for n in "ab"
    )  # fmt: skip
    assert first == pytest.approx(second, abs=1e-9)
    assert all(abs(g) <= 5**0.5 for g in first)
    assert any(g != 0 for g in first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_rewards": "group"}, "num_samples of at least 2"),
        ({"scale_rewards": "batch"}, "scale_rewards must be none or group, got 'batch'"),
        ({"scale_rewards": "group", "num_samples": 2, "shaping": "ranks"}, "needs no shaping"),
        ({"engine": "sglang"}, "engine must be one of transformers, vllm, got 'sglang'"),
        ({"engine": "vllm", "engine_options": "[1]"}, "engine_options is a JSON object"),
        ({"engine": "vllm", "engine_options": '{"model": "x"}'}, "engine_options name no model"),
        ({"engine_options": "{}"}, "engine_options are for an engine other than"),
    ],
)
def test_options_that_cannot_work_are_one_line(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        made(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rule": "experiments.rules.anchored:Anchored"}, "Anchored does not work with an engine"),
        ({"rule": "adam"}, "rule adam does not work with an engine"),
        ({"perturbation": "low_rank"}, "low_rank is not made by engines"),
        ({"perturbation": "scratch", "keep": 0.5}, "masks.*not made by engines"),
    ],
)
def test_what_no_engine_does_is_refused_before_one_starts(tmp_path, changes, words):
    """vLLM takes a minute to start, and an evaluation of minutes comes before the first step."""
    with pytest.raises(InputError, match=words):
        made(tmp_path, TransformersEngine, **changes)
    with pytest.raises(InputError, match=words):
        made(tmp_path, engine="vllm", **changes)


def test_scalar_adam_runs_in_an_engine(tmp_path):
    """It moves weights by z alone, and its log replays to the engine's weights."""
    trainer = made(tmp_path, TransformersEngine, rule="scalar_adam", learning_rate=1e-3)
    trainer.train()
    base = tiny_model("llama", len(byte_bpe())).float()
    trajectory.replay(tmp_path / "run.mezo", base)
    assert same(values(base), values(trainer.model))


def test_the_log_has_the_health_of_the_run(tmp_path):
    trainer = made(tmp_path, held_out=["It was a charming film", "no wit"], eval_strategy="steps",
                   eval_steps=2)  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    names = {"ties", "weights_changed", "completions/repetition", "completions/mean_length"}
    assert all(names <= log.keys() for log in logs if "loss" in log)
    losses = [log["eval_held_out_loss"] for log in logs if "eval_held_out_loss" in log]
    assert len(losses) == 2
    assert losses[0] != losses[1]


def test_a_run_that_forgets_stops(tmp_path, caplog):
    """lr 0.5 ruins the model; the loss on texts that it does not train says so."""
    options = {"learning_rate": 0.5, "max_steps": 40, "eval_strategy": "steps", "eval_steps": 1}
    trainer = made(tmp_path, held_out=["It was a charming film"], stop_forgotten=0.5, **options)
    with caplog.at_level(logging.WARNING, "mezo"):
        trainer.train()
    assert trainer.state.global_step < 40
    assert any("held-out loss has risen" in message for message in caplog.messages)
    assert torch.isfinite(torch.cat([p.flatten() for p in trainer.model.parameters()])).all()
