"""A killed run goes on from its log, and ends with the bits of the uninterrupted run."""

import copy
import math
import os
import random
import shutil
import signal
import time
from contextlib import nullcontext

import pytest
import torch
from models import Regression, llama, weights
from models import weights as trained_weights
from trainers import Watch, grads, trainer_at
from transformers import TrainerCallback

from mezo import MeZO, trajectory
from mezo.errors import InputError

KILLS = int(os.environ.get("KILLS", "50"))
FORMS = [
    (torch.float32, {}),
    (torch.float32, {"perturbation": "scratch", "num_samples": 2}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"rounding": "compensated", "weight_decay": 0.1}),
    (torch.float16, {"rounding": "master"}),
    (torch.bfloat16, {"perturbation": "low_rank", "rank": 2, "interval": 4, "weight_decay": 0.1}),
]


def optimizer_of(model, **options):
    return MeZO(model.named_parameters(), **({"lr": 1e-3, "seed": 6} | options))


def go_on(model, optimizer, path, steps):
    """To step number `steps`, logged; one loss in the middle is not finite."""
    with trajectory.record(optimizer, path, resume=True):
        for step in range(optimizer.param_groups[0]["step"], steps):
            optimizer.step(model if step != 7 else lambda: math.nan)


@pytest.mark.parametrize(("dtype", "options"), FORMS)
@pytest.mark.parametrize("saved", [0, 5, 11])
def test_a_run_goes_on_from_its_base_or_a_checkpoint_and_its_log(tmp_path, dtype, options, saved):
    """Whatever was saved last, weights and buffers are those of the log's end."""
    whole = Regression(dtype)
    go_on(whole, optimizer_of(whole, **options), tmp_path / "whole.mezo", 16)

    path, lost = tmp_path / "run.mezo", Regression(dtype)
    optimizer = optimizer_of(lost, **options)
    go_on(lost, optimizer, path, saved)
    checkpoint = copy.deepcopy((lost.state_dict(), optimizer.state_dict()))
    go_on(lost, optimizer, path, 11)
    with open(path, "ab") as log:
        log.write(b"torn")

    again = Regression(dtype)
    optimizer = optimizer_of(again, **options)
    if saved:
        again.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
    assert trajectory.catch_up(path, optimizer) == 11 - saved
    assert torch.equal(weights(again), weights(lost))
    go_on(again, optimizer, path, 16)
    assert torch.equal(weights(again), weights(whole))
    base = Regression(dtype)
    trajectory.replay(path, base)
    assert torch.equal(weights(base), weights(whole))


def test_catching_up_stops_where_it_is_told(tmp_path):
    model, half = Regression(torch.float32), Regression(torch.float32)
    go_on(model, optimizer_of(model), tmp_path / "run.mezo", 6)
    go_on(half, optimizer_of(half), tmp_path / "half.mezo", 4)
    again = Regression(torch.float32)
    optimizer = optimizer_of(again)
    assert trajectory.catch_up(tmp_path / "run.mezo", optimizer, until=4) == 4
    assert torch.equal(weights(again), weights(half))
    assert trajectory.catch_up(tmp_path / "run.mezo", optimizer, until=3) == 0


def test_an_interrupted_step_is_made_again(tmp_path):
    """Ctrl-C is logged as a refused step; the uninterrupted run has made it."""
    whole, lost = Regression(torch.float32), Regression(torch.float32)
    go_on(whole, optimizer_of(whole), tmp_path / "whole.mezo", 6)
    path, optimizer = tmp_path / "run.mezo", optimizer_of(lost)
    go_on(lost, optimizer, path, 4)
    with trajectory.record(optimizer, path, resume=True), pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    again = Regression(torch.float32)
    optimizer = optimizer_of(again)
    assert trajectory.catch_up(path, optimizer) == 4
    go_on(again, optimizer, path, 6)
    assert torch.equal(weights(again), weights(whole))


def test_another_run_is_not_caught_up_with(tmp_path):
    path, model = tmp_path / "run.mezo", Regression(torch.float32)
    go_on(model, optimizer_of(model), path, 3)
    for options, message in (
        ({"seed": 7}, "its seed is 6, not 7"),
        ({"distribution": "rademacher"}, "distribution is gaussian, not rademacher"),
        ({"perturbation": "scratch"}, "its perturbation is in_place, not scratch"),
        ({"clip_quantile": 0.5}, "can only resume from a checkpoint"),
    ):
        base = Regression(torch.float32)
        with pytest.raises(InputError, match=message):
            trajectory.catch_up(path, optimizer_of(base, **options))
        assert torch.equal(weights(base), weights(Regression(torch.float32)))
    base = Regression(torch.float32)
    base.bias.requires_grad_(False)
    with pytest.raises(InputError, match="its tensors, or their parameter groups, differ"):
        trajectory.catch_up(path, optimizer_of(base))
    base.bias.requires_grad_(True).data[0] += 1
    with pytest.raises(InputError, match="began with other values of bias"):
        trajectory.catch_up(path, optimizer_of(base))


def child(path, steps, written):
    """The process that is killed: from the base and the log, to the end, then the weights."""
    torch.set_num_threads(1)
    model = Regression(torch.bfloat16)
    optimizer = optimizer_of(model)
    if path.exists():
        trajectory.catch_up(path, optimizer)
    go_on(model, optimizer, path, steps)
    torch.save(weights(model), written)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_kills_at_random_moments_lose_nothing(tmp_path):
    """KILLS processes begin with the base model and the log alone, and end without warning."""
    path, written, generator = tmp_path / "run.mezo", tmp_path / "weights.pt", random.Random(3)
    steps, kills, seen = 10**6, 0, 0
    while True:
        if kills == KILLS:
            steps = len(trajectory.read(path).steps) + 20  # now let it end
        process = os.fork()
        if process == 0:
            try:
                child(path, steps, written)
            finally:
                os._exit(0)
        if kills == KILLS:
            assert os.waitpid(process, 0)[1] == 0
            break
        before = path.stat().st_size if path.exists() else 0
        while kills % 2 == 0 and (not path.exists() or path.stat().st_size <= before + 100):
            time.sleep(0.001)  # however slow the machine is, half of them make some steps
        time.sleep(generator.uniform(0.0, 0.04))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills += 1
        count = len(trajectory.read(path).steps) if path.exists() else 0
        assert count >= seen - 1  # what was logged stays; a refused step at the end is made again
        seen = count
    assert seen > KILLS
    whole = Regression(torch.bfloat16)
    go_on(whole, optimizer_of(whole), tmp_path / "whole.mezo", steps)
    assert torch.equal(torch.load(written, weights_only=True), weights(whole))


# ---- under the Trainer


def trainer_run(path, steps=11, model=None, resume=None, stop=None, **options):
    """Train to `steps`; `stop` ends the process's part of it there, as a kill would."""
    callbacks = []
    if stop is not None:

        def ends(model):
            if callbacks[1].trainer.state.global_step == stop:
                raise KeyboardInterrupt

        callbacks = [Watch("on_step_end", ends), TrainerCallback()]
    options = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "linear"} | options
    options |= {"callbacks": callbacks, "max_steps": steps}
    trainer = trainer_at(path, model=model or llama(), **options)
    if stop is not None:
        callbacks[1].trainer = trainer
    with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
        trainer.train(resume_from_checkpoint=resume)
    return trainer


class Passes:
    """Counts the forward passes of a model."""

    def __init__(self, model):
        self.model, self.count = model, 0
        model.register_forward_pre_hook(lambda *given: setattr(self, "count", self.count + 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rounding": "compensated", "dtype": torch.bfloat16},
        {"num_samples": 2, "gradient_accumulation_steps": 2},
        {"train_sampling_strategy": "random", "num_train_epochs": 3},
        {"perturbation": "low_rank", "interval": 3, "dtype": torch.bfloat16},
    ],
)
@pytest.mark.parametrize(("stop", "kept", "made"), [(7, 4, 4), (3, 0, 8), (10, 8, 1), (8, 4, 4)])
def test_a_trainers_run_goes_on_where_its_log_ends(tmp_path, options, stop, kept, made):
    """Checkpoints every 4 steps. The step of a save or evaluation is made again, with its save."""
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    whole = trainer_run(tmp_path / "whole", model=llama().to(dtype), **options)
    path = tmp_path / "run"
    trainer_run(path, model=llama().to(dtype), stop=stop, **options)
    shutil.rmtree(path / "checkpoint-8", ignore_errors=True) if kept < 8 else None
    model = llama().to(dtype)
    passes = Passes(model)
    again = trainer_run(path, model=model, resume=True, **options)
    assert torch.equal(trained_weights(again.model), trained_weights(whole.model))
    a_look = 2 * options.get("gradient_accumulation_steps", 1)  # of the first step that is made
    assert passes.count == made * a_look * options.get("num_samples", 1) + a_look
    assert grads(path) == grads(tmp_path / "whole")
    assert again.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr()
    assert again.state.global_step == 11
    assert (path / "checkpoint-8").is_dir()


@pytest.mark.parametrize("save_steps", [4, 100])
def test_a_run_that_has_ended_is_not_trained_on(tmp_path, save_steps):
    """The Trainer makes one step more; a log without a checkpoint makes the last one again."""
    options = {"save_steps": save_steps, "max_steps": 8}
    whole = trainer_run(tmp_path / "run", steps=8, **options)
    shutil.rmtree(tmp_path / "run" / "checkpoint-8") if save_steps == 100 else None
    model = llama()
    passes = Passes(model)
    again = trainer_run(tmp_path / "run", steps=8, model=model, resume=True, **options)
    assert torch.equal(trained_weights(again.model), trained_weights(whole.model))
    assert passes.count == (0 if save_steps == 4 else 2 + 2)
    assert (again.state.global_step, len(grads(tmp_path / "run"))) == (8, 8)


def test_nothing_to_go_on_from_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"run has neither a checkpoint nor a run.mezo"):
        trainer_run(tmp_path / "run", resume=True)


def test_a_named_checkpoint_is_taken_as_it_is(tmp_path):
    """Who names a checkpoint wants to go back to it."""
    trainer_run(tmp_path / "run", stop=7)
    model = llama()
    passes = Passes(model)
    trainer_run(tmp_path / "run", model=model, resume=str(tmp_path / "run" / "checkpoint-4"))
    assert passes.count == 7 * 2 + 2
