"""MeZO under transformers' Trainer: the Trainer's loop, the plain loop's bits."""

import inspect
import math
import runpy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from models import Toy, llama, weights
from trainers import LR, UNIT, Watch, grads, points, sentences, settings, trained, trainer_at
from transformers import HfArgumentParser, Trainer, TrainingArguments

from mezo import MeZO, MeZOConfig, MeZOTrainer, trajectory

# ---- the Trainer that we build on


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "create_accelerator_and_postprocess": ["self"],
        "create_optimizer": ["self", "model"],
        "_wrap_model": ["self", "model", "training", "dataloader"],
        "training_step": ["self", "model", "inputs", "num_items_in_batch"],
        "_get_grad_norm": ["self", "model", "grad_norm"],
        "log": ["self", "logs", "start_time"],
        "floating_point_ops": ["self", "inputs"],
    }.items(),
)
def test_what_the_mixin_overrides_exists_with_this_signature(name, parameters):
    """Some of these are private: a release of transformers may rename them without a word."""
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters
    assert list(inspect.signature(getattr(MeZOTrainer, name)).parameters) == parameters


def test_what_the_mixin_calls_exists(tmp_path):
    """The same for what it reads of the host."""
    trainer = trainer_at(tmp_path)
    trainer.train()
    for name in ("model_accepts_loss_kwargs", "compute_loss_func"):
        assert name in dir(trainer)
    for name in ("current_gradient_accumulation_steps", "_prepare_inputs", "callback_handler"):
        assert name in dir(trainer)
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("_set_sync_gradients") < source.index("self.training_step(")


# ---- the same bits


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_plain_loop_gives_the_same_bits(tmp_path, accelerated):
    """Trap 10: one optimizer for all hosts; Accelerate's wrapper keeps its state and its step."""
    model = llama().eval()
    optimizer = MeZO(model.named_parameters(), lr=LR, seed=42)
    step = optimizer.step
    if accelerated:
        model, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
        step = wrapped.step
    host = trainer_at(tmp_path / "host")
    data = sentences()
    for start in range(0, 24, 4):
        rows = data[start : start + 4]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        # how labels are counted depends on the release of transformers
        _, count = host.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        step(lambda batch=batch, n=count: model(**batch, num_items_in_batch=n).loss)
    assert torch.equal(weights(model), trained(tmp_path, max_steps=6))


def test_resume_gives_the_bits_of_the_uninterrupted_run_and_its_log_replays(tmp_path):
    """Directions, data order and schedule continue; the log is cut back to the checkpoint."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"lr_scheduler_type": "linear", "train_sampling_strategy": "random"}
    straight = trained(whole, max_steps=12, **options)
    parted = options | {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}

    def stop(model):
        if trainer.state.global_step == 8:  # two steps past the checkpoint: the log is too long
            raise KeyboardInterrupt

    trainer = trainer_at(parts, callbacks=[Watch("on_step_begin", stop)], **parted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(grads(parts)) == 8
    again = trainer_at(parts, model=llama(seed=5), **parted)
    again.train(resume_from_checkpoint=str(parts / "checkpoint-6"))
    assert torch.equal(weights(again.model), straight)
    assert grads(parts) == grads(whole)
    for log in (whole, parts):
        assert torch.equal(weights(trajectory.replay(log / "run.mezo", llama())), straight)


def test_saving_changes_nothing(tmp_path):
    """Checkpoints are read-only for the run (and small: the optimizer is a few numbers)."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    assert torch.equal(trained(tmp_path / "a", **saving), trained(tmp_path / "b"))
    assert (tmp_path / "a/checkpoint-2/optimizer.pt").stat().st_size < 10_000


def test_weight_decay_groups_do_not_change_z(tmp_path):
    """Trap 16: a key that is the position in the groups would change with weight_decay."""
    runs = [tmp_path / "a", tmp_path / "b"]
    for path, weight_decay in zip(runs, [0.0, 0.5], strict=True):
        trained(path, max_steps=1, weight_decay=weight_decay)
    assert grads(runs[0]) == grads(runs[1])
    decays = [trajectory.read(path / "run.mezo").steps[0].weight_decays for path in runs]
    assert decays == [(0.0, 0.0), (0.5, 0.0)]


def test_a_second_train_continues(tmp_path):
    """train() twice on one trainer: the optimizer's step goes on, and so does the log."""
    trainer = trainer_at(tmp_path, max_steps=3)
    trainer.train()
    trainer.train()
    assert len(grads(tmp_path)) == 6
    replayed = trajectory.replay(tmp_path / "run.mezo", llama())
    assert torch.equal(weights(replayed), weights(trainer.model))


def test_a_run_resumed_elsewhere_begins_a_log_there(tmp_path):
    """Merged with the first one it is the log of the whole run."""
    trained(tmp_path / "a", max_steps=2, save_strategy="steps", save_steps=2)
    trainer = trainer_at(tmp_path / "b", max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert trajectory.read(tmp_path / "b/run.mezo").start == 2
    trajectory.merge([tmp_path / "a/run.mezo", tmp_path / "b/run.mezo"], tmp_path / "all.mezo")
    replayed = trajectory.replay(tmp_path / "all.mezo", llama())
    assert torch.equal(weights(replayed), weights(trainer.model))


# ---- accumulation and loss


def test_accumulation_is_one_walk_with_the_loss_of_the_whole_batch(tmp_path):
    """Traps 7, 8: 4 x 4 is 16, weighted by tokens, with two passes a micro-batch and one walk.

    Tolerance: a mean over at most 128 tokens, summed in another order, is off by 128 roundings.
    """
    runs = {"one": (16, 1), "four": (4, 4)}
    records = {}
    for name, (size, steps) in runs.items():
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trained(tmp_path / name, max_steps=1, mezo_eps=0.1, **batch)
        records[name] = trajectory.read(tmp_path / name / "run.mezo").steps[0].record
    bound = 128 * UNIT * records["one"].loss
    assert abs(records["one"].loss - records["four"].loss) <= bound
    difference = records["one"].projected_grads[0] - records["four"].projected_grads[0]
    assert abs(difference) <= 2 * bound / (2 * 0.1)
    assert records["four"].cycles == (1,)


def test_accumulation_of_plain_means_in_float64(tmp_path):
    """Models that take no number of items: the mean of the micro-batches' means, to 1e-12 / eps."""
    ends = [
        trained(tmp_path / str(n), model=Toy(), data=points(), max_steps=8, **batch)
        for n, batch in enumerate(
            [
                {"per_device_train_batch_size": 16},
                {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            ]
        )
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-9)
    assert not torch.equal(ends[0], weights(Toy()))


def test_the_last_window_of_an_epoch_may_be_short(tmp_path):
    """20 sentences by 4 x 2: windows of 2, 2 and 1 micro-batches, three updates an epoch."""
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    trained(tmp_path, data=sentences(20), **options)
    assert len(grads(tmp_path)) == 6


def test_both_passes_see_fresh_inputs(tmp_path):
    """Trap 6: label smoothing pops the labels from its inputs; the second pass needs them too."""
    trained(tmp_path, label_smoothing_factor=0.1)
    assert all(math.isfinite(g) for (g,) in grads(tmp_path))


def test_the_logged_loss_is_the_mean_of_both_passes(tmp_path):
    """Traps 9, 23: grad_norm is |projected_grad|, not the 0.0 of a clip over no gradients."""
    trainer = trainer_at(tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    records = [step.record for step in trajectory.read(tmp_path / "run.mezo").steps]
    for entry, record in zip(logs, records, strict=True):
        assert entry["projected_grad"] == record.projected_grads[0]
        assert entry["grad_norm"] == abs(entry["projected_grad"])
        assert entry["loss"] == pytest.approx(record.loss, rel=4 * UNIT)


def test_several_directions_a_step(tmp_path):
    """num_samples: two passes each, the mean of the estimates, the norm of their sum."""
    passes = []

    class Counting(MeZOTrainer):
        def compute_loss(self, *args, **kwargs):
            passes.append(1)
            return super().compute_loss(*args, **kwargs)

    trainer = trainer_at(tmp_path, kind=Counting, num_samples=3, distribution="rademacher")
    trainer.train()
    assert len(passes) == 4 * 3 * 2 + 2  # and the first step's look
    last, entry = grads(tmp_path)[-1], trainer.state.log_history[-2]
    assert entry["projected_grad"] == pytest.approx(sum(last) / 3)
    assert entry["grad_norm"] == pytest.approx(math.hypot(*last) / 3)
    replayed = trajectory.replay(tmp_path / "run.mezo", llama())
    assert torch.equal(weights(replayed), weights(trainer.model))


# ---- the rest of the Trainer works


def test_two_lines_change_a_trainer_script(tmp_path):
    """A plain TrainingArguments trains with MeZO's defaults: the same bits as MeZOConfig."""
    plain = MeZOTrainer(
        llama(), settings(tmp_path / "a", kind=TrainingArguments), train_dataset=sentences()
    )
    plain.args.lr_scheduler_type = "constant"
    plain.train()
    assert torch.equal(weights(plain.model), trained(tmp_path / "b"))


def test_the_schedule_is_followed(tmp_path):
    trained(tmp_path, lr_scheduler_type="linear", warmup_steps=2)
    lrs = [step.lrs[0] for step in trajectory.read(tmp_path / "run.mezo").steps]
    assert lrs == pytest.approx([0.0, LR / 2, LR, LR / 2])


def test_evaluation_callbacks_and_the_best_model_work(tmp_path):
    events = []
    look = Watch("on_step_end", lambda model: events.append("step"))
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trainer_at(
        tmp_path, callbacks=[look], max_steps=6, learning_rate=0.05, **steps, **best
    )
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert len(losses) == 3
    assert events == ["step"] * 6
    assert trainer.evaluate()["eval_loss"] == min(losses.values())
    chosen = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{chosen}")
    replayed = trajectory.replay(tmp_path / "run.mezo", llama(), until=chosen)
    assert torch.equal(weights(replayed), weights(trainer.model))


def test_training_arguments_are_pickled_and_parsed(tmp_path):
    """Trap 21: checkpoints hold them; scripts read them from the command line."""
    trained(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, mezo_eps=0.02)
    kept = torch.load(tmp_path / "checkpoint-1/training_args.bin", weights_only=False)
    assert isinstance(kept, MeZOConfig)
    assert kept.mezo_eps == 0.02
    words = ["--output_dir", str(tmp_path), "--num_samples", "4", "--use_cpu", "True"]
    (parsed,) = HfArgumentParser(MeZOConfig).parse_args_into_dataclasses(words)
    assert (parsed.num_samples, parsed.learning_rate) == (4, 1e-6)
    assert parsed.lr_scheduler_type == "constant"


def test_operations_are_counted_as_forward_passes(tmp_path):
    """Trap 20: 4 per weight and token and direction; a list where ids should be is no crash."""
    trainer = trainer_at(tmp_path, max_steps=2, num_samples=2)
    trainer.train()
    count = trainer.model.num_parameters(exclude_embeddings=True)
    assert trainer.state.total_flos == 2 * 4 * 2 * (4 * 8) * count
    assert trainer.floating_point_ops({"input_ids": ["a", "b"]}) == 0


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # no GPU: from torch
def test_the_example_learns():
    """examples/hf_trainer.py, as it stands."""
    example = runpy.run_path(Path(__file__).parents[2] / "examples/hf_trainer.py")
    assert example["trainer"].evaluate()["eval_accuracy"] > 0.95


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own imports
def test_a_compiled_model_trains(tmp_path):
    """Trap 15: in place, so that compiled code sees the weights where it expects them."""
    trainer = trainer_at(tmp_path, torch_compile=True)
    trainer.train()
    bound = 128 * UNIT * 5 * 2 / 1e-3  # of g: losses of about 5, in another order of summation
    trained(tmp_path / "plain")
    for (compiled,), (plain,) in zip(grads(tmp_path), grads(tmp_path / "plain"), strict=True):
        assert abs(compiled - plain) <= bound
