"""MeZOPolicyTrainer: reward functions under the Trainer, and from the command line.

Run by torchrun, this file is the worker of the distributed test.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import folders
import pytest
import torch
from datasets import Dataset
from models import tiny_model, weights
from peft import LoraConfig
from processes import SEARCHED
from tiny_tokenizers import byte_bpe
from torch import distributed as dist
from trainers import settings

from mezo import MeZOPolicyConfig, MeZOPolicyTrainer, trajectory
from mezo.errors import InputError
from mezo.models.modes import unwrap
from mezo.rewards import RewardFunctions

WORDS = ["the film", "It was", "no wit", "a boring movie", "terrible", "charming", "long", "a"]
ROWS = [{"prompt": WORDS[i % 8], "bonus": i} for i in range(32)]


def judge(completions, bonus, **kwargs):
    kwargs["log_metric"]("spaces", sum(text.count(" ") for text in completions))
    return [len(text) + 0.0 * extra for text, extra in zip(completions, bonus, strict=True)]


def made(path, reward_funcs=judge, model=None, rows=None, **changes):
    tokenizer = byte_bpe()
    model = tiny_model("llama", len(tokenizer)).float() if model is None else model
    options = {"max_completion_length": 6, "mezo_eps": 1e-2, "learning_rate": 1e-2}
    more = {key: changes.pop(key) for key in ("peft_config",) if key in changes}
    args = settings(path, MeZOPolicyConfig, **(options | changes))
    rows = ROWS if rows is None else rows
    return MeZOPolicyTrainer(model, reward_funcs, args, rows, rows[:6], tokenizer, **more)


def test_a_run_learns_logs_and_is_rebuilt_to_the_bit(tmp_path):
    """Longer text is rewarded; the replay has neither data nor rewards."""
    trainer = made(tmp_path, max_steps=6, log_completions=True, per_device_train_batch_size=8)
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(weights(trainer.model), before)
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 6
    names = {"loss", "projected_grad", "ties", "spaces", "rewards/judge/mean"}
    assert names | {"completions/mean_length", "completions/clipped_ratio"} <= logs[0].keys()
    assert all(abs(entry["reward"] + entry["loss"]) < 1e-3 for entry in logs[1:])  # of both halves
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert {"prompt", "completion", "reward", "judge", "step"} <= json.loads(lines[0]).keys()
    tokenizer = byte_bpe()
    base = tiny_model("llama", len(tokenizer)).float()
    trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(base), weights(trainer.model))
    config = trajectory.read(tmp_path / "run.mezo").header["config"]
    assert config["reward_funcs"] == ["judge"]
    assert config["generation"]["max_new_tokens"] == 6


def test_accumulated_micro_batches_are_one_update(tmp_path):
    """2 x 4 prompts, with their own noise each; the same run twice is the same to the bit."""
    seen, runs = [], []
    for name in "ab":
        trainer = made(tmp_path / name, gradient_accumulation_steps=2, max_steps=2)
        sample = trainer.sample

        def noting(rows, draw, model=None, sample=sample):
            seen.append((draw, [row["bonus"] for row in rows]))
            return sample(rows, draw, model)

        trainer.sample = noting
        trainer.train()
        runs.append(weights(trainer.model))
    assert torch.equal(*runs)
    assert len(trajectory.read(tmp_path / "a" / "run.mezo").steps) == 2
    first, rest = [0, 1, 2, 3], [4, 5, 6, 7]
    assert seen[:4] == [(0, first), (1, rest)] * 2  # theta + eps z, theta - eps z
    assert {draw for draw, _ in seen} == {0, 1, 2, 3}


def test_a_run_that_resumes_is_the_uninterrupted_run(tmp_path):
    whole = made(tmp_path / "whole", max_steps=4)
    whole.train()
    cut = made(tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=2)
    cut.args.max_steps = 2
    cut.train()
    again = made(tmp_path / "cut", max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again.model), weights(whole.model))


def test_evaluation_samples_the_same_each_time_and_gives_the_reward(tmp_path):
    trainer = made(tmp_path, per_device_eval_batch_size=4)
    found = trainer.evaluate()
    assert found["eval_reward"] == trainer.evaluate()["eval_reward"]
    assert found["eval_reward"] == pytest.approx(-found["eval_loss"])
    assert found["eval_rewards/judge/mean"] == found["eval_reward"]
    assert 0 <= found["eval_completions/clipped_ratio"] <= 1


def test_several_functions_have_weights_and_may_leave_samples_out(tmp_path):
    def even(bonus, **kwargs):
        return [None if b % 2 else 1.0 for b in bonus]

    trainer = made(tmp_path, [judge, even], reward_weights=[0.0, 2.0], max_steps=1)
    found = trainer.evaluate()
    assert found["eval_rewards/even/mean"] == 1.0
    assert found["eval_reward"] == 1.0  # half have 2, half 0
    trainer.train()
    assert trainer.ties.ties == trainer.ties.estimates == 1  # it does not depend on the text


def test_rewards_that_tie_are_warned_of_once(tmp_path, caplog):
    """By the optimizer, which sees any two losses that are equal; it names what helps a reward."""
    trainer = made(tmp_path, lambda prompts, **kw: [1.0 for _ in prompts], max_steps=21)
    trainer.train()
    assert trainer.ties.ties == 21
    told = [record.message for record in caplog.records if record.name == "mezo"]
    told = [line for line in told if "tied" in line or "the same number" in line]
    assert len(told) == 1
    assert "both losses were the same number" in told[0]
    assert "more prompts a step, or a reward with more values" in told[0]


def test_conversations_data_sets_and_adapters_go_in_as_in_trl(tmp_path):
    tokenizer = byte_bpe()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = tiny_model("llama", len(tokenizer)).float()
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in WORDS]
    seen = []

    def talk(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(c[0]["content"])) for c in completions]

    args = settings(tmp_path, MeZOPolicyConfig, max_completion_length=4, max_steps=1)
    trainer = MeZOPolicyTrainer(
        model,
        talk,
        args,
        Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    trainer.train()
    prompt, completion = seen[0]
    assert prompt == rows[0]["prompt"]
    assert completion[0]["role"] == "assistant"
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    assert unwrap(trainer.model) is not trainer.model


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(InputError, match="remove_unused_columns=True"):
        made(tmp_path, remove_unused_columns=True)
    with pytest.raises(InputError, match="temperature must not be negative"):
        made(tmp_path, temperature=-1.0)
    with pytest.raises(InputError, match="reward_weights are in the RewardFunctions"):
        made(tmp_path, RewardFunctions(judge), reward_weights=[1.0])
    with pytest.raises(InputError, match="no column 'prompt', it has text"):
        made(tmp_path, rows=[{"text": "a"}] * 8).train()
    with pytest.raises(InputError, match="no column 'bonus'"):
        made(tmp_path, rows=[*ROWS[:1], {"prompt": "a"}] * 8).train()
    with pytest.raises(InputError, match="processing_class is missing"):
        MeZOPolicyTrainer(tiny_model("llama"), judge, settings(tmp_path, MeZOPolicyConfig))


# --- the command line --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards")
    folders.model_folder(path / "model")
    (path / "rules.py").write_text(
        "def short(completions, **kw): return [-len(c) for c in completions]"
    )
    (path / "score.py").write_text("import sys\nfor line in sys.stdin: print(len(line))")
    rows = [{"text": word, "bonus": 1} for word in WORDS]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(capsys, folder, out, *more, **changes):
    options = {"model": folder / "model", "train_file": folder / "prompts.jsonl"}
    options |= {"output_dir": out, "max_steps": 2, "per_device_train_batch_size": 4}
    options |= {"max_completion_length": 4, "learning_rate": 1e-3, "prompt": "{text} It was"}
    words = [f"--{name}={value}" for name, value in (options | changes).items()]
    return folders.mezo(capsys, "train", *words, "--use_cpu", *more)


def test_the_command_trains_and_its_run_is_rebuilt(tmp_path, capsys, folder):
    judge = f"{sys.executable} {folder / 'score.py'}"
    names = ["--reward", f"{folder / 'rules.py'}:short", judge, "--json"]
    code, out, err = train(capsys, folder, tmp_path / "run", *names)
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == 2
    assert result["estimates"] == 2
    assert {"reward", "rewards/short/mean"} <= result["after"].keys()
    assert result["samples"][0].keys() == {"prompt", "before", "after"}
    assert "next: mezo replay" in err
    code, _, err = folders.mezo(
        capsys,
        *("replay", "--model", folder / "model", "--log", tmp_path / "run" / "run.mezo"),
        *("--output_dir", tmp_path / "again"),
    )
    assert code == 0, err
    assert folders.same_weights(tmp_path / "run", tmp_path / "again")


def test_mistakes_are_one_line(tmp_path, capsys, folder):
    short = ["--reward", f"{folder / 'rules.py'}:short"]
    cases = [
        (["--reward", "rules.py:none"], {}, "reward file not found: rules.py"),
        (["--reward"], {}, "argument --reward: expected at least one"),
        (short, {"train_file": ""}, "--train_file is missing"),
        (short, {"prompt": "{words}"}, "row 1 has no column 'words', it has text, bonus"),
        (short, {"method": "adam"}, "a reward has no gradient"),
        (short, {"num_dev": 0}, "num_dev must be at least 1, got 0"),
        (short, {"temprature": 0}, "did you mean --temperature?"),
        (short, {"max_completion_length": 0}, "max_new_tokens must be at least 1, got 0"),
    ]
    for more, changes, words in cases:
        code, out, err = train(capsys, folder, tmp_path / "run", *more, **changes)
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1


def test_help_names_the_options(capsys):
    code, out, _ = folders.mezo(capsys, "train", "--reward", "x", "--help")
    assert code == 0
    assert "--reward_timeout" in out
    assert "--max_completion_length" in out


# --- two processes -----------------------------------------------------------------------------


def worker(path):
    trainer = made(path, ddp_backend="gloo", max_steps=3, log_completions=True)
    trainer.train()
    found = trainer.evaluate()
    digest = hashlib.sha256(weights(trainer.model).numpy().tobytes()).hexdigest()
    logs = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    seen = {"weights": digest, "rewards": logs, "eval": found["eval_reward"]}
    (path / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_same_steps(tmp_path):
    """Each generates for its own prompts; both end with the same bits, and the log replays."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": SEARCHED}
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    tokenizer = byte_bpe()
    base = tiny_model("llama", len(tokenizer)).float()
    trajectory.replay(tmp_path / "run.mezo", base)
    assert hashlib.sha256(weights(base).numpy().tobytes()).hexdigest() == one["weights"]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
