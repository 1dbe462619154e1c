"""Offload under the Trainer: the same losses, weights, checkpoints and log, to the bit."""

from pathlib import Path

import pytest
import torch
from models import Toy, llama, weights
from trainers import PairedTrainer, Watch, points, settings, trainer_at

from mezo import MeZO, MeZOTrainer, trajectory
from mezo.errors import InputError
from mezo.models.adapters import with_adapter
from mezo.models.arguments import ModelArguments
from mezo.offload import blocks
from mezo.offload.blocks import BlockCache
from mezo.offload.context import Offload

SAVING = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
AWAY = {"offload": True}


@pytest.fixture(autouse=True)
def other_memory(monkeypatch):
    """The CPU stands for a device with a memory of its own: weights are copied there and back."""
    monkeypatch.setattr(blocks, "must_copy", lambda device, write_every: True)


def made(path, half=False, **options):
    model = options.pop("model", None) or llama()
    trainer = trainer_at(path, model=model.bfloat16() if half else model, **options)
    trainer.run_config = {}  # else the log has the arguments, of which offload is one
    return trainer


def trained(path, resume=None, **options):
    trainer = made(path, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def log_of(trainer):
    return Path(trainer.args.output_dir, "run.mezo").read_bytes()


def records(trainer):
    """For a resumed run, whose log says once more what holds from there on."""
    return [one.record for one in trajectory.read(Path(trainer.args.output_dir, "run.mezo")).steps]


def history(trainer):
    """What was logged, but for times."""
    timed = ("runtime", "per_second", "_time")
    rows = trainer.state.log_history
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in rows]


def assert_the_same(here, away):
    assert torch.equal(weights(away.model), weights(here.model))
    assert history(away) == history(here)
    assert log_of(away) == log_of(here)


FORMS = {
    "in place": {"gradient_accumulation_steps": 2},
    "in place, two directions": {"num_samples": 2},
    "scratch": {"half": True, "weight_decay": 0.1},
    "scratch, three directions": {"half": True, "num_samples": 3, "gradient_accumulation_steps": 2},
    "scratch, a batch each": {
        "half": True,
        "num_samples": 2,
        "gradient_accumulation_steps": 2,
        "fresh_batches": True,
    },
    "low rank": {"perturbation": "low_rank", "interval": 4, "num_samples": 2},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_a_run_is_that_without_offload(tmp_path, options):
    """Evaluation, checkpoints and the best model included, which comes before the last step."""
    options = options | SAVING | {"max_steps": 7, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "age", "greater_is_better": False}

    def run(name, **more):
        trainer = made(tmp_path / name, **options, **more)
        trainer.compute_metrics = lambda _: {"age": trainer.state.global_step}
        trainer.train()
        return trainer

    here, away = run("here"), run("away", **AWAY)
    assert_the_same(here, away)
    for step in (3, 6):
        one, other = (
            Path(t.args.output_dir, f"checkpoint-{step}", "model.safetensors") for t in (here, away)
        )
        assert one.read_bytes() == other.read_bytes()
    assert away.evaluate() | SPEED == here.evaluate() | SPEED
    assert all(p.device.type == "cpu" and not p.is_meta for p in away.model.parameters())


SPEED = dict.fromkeys(
    f"eval_{name}"
    for name in ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
)


def test_both_losses_from_one_forward_pass(tmp_path):
    """A trainer that knows its pair; micro-batches and directions as without."""
    options = {"perturbation": "low_rank", "num_samples": 2, "gradient_accumulation_steps": 2}
    options |= {"data": points(), "interval": 3, "kind": PairedTrainer, "max_steps": 5}
    here = trained(tmp_path / "here", model=Toy(), **options)
    away = trained(tmp_path / "away", model=Toy(), **options, **AWAY)
    assert away.optimizer.optimizer.memory.paired
    assert_the_same(here, away)


def test_weights_wait_in_a_file(tmp_path):
    """Written there every other step; it is made once, and the parameters stay in it."""
    here = trained(tmp_path / "here", **SAVING)
    folder = {"offload_folder": str(tmp_path / "disk"), "offload_write_every": 2}
    away = made(tmp_path / "away", **SAVING, **AWAY, **folder)
    before = away.evaluate()["eval_loss"]
    inode = Path(tmp_path / "disk/weights.safetensors").stat().st_ino
    away.train()
    assert_the_same(here, away)
    assert before != away.evaluate()["eval_loss"] == here.evaluate()["eval_loss"]
    assert Path(tmp_path / "disk/weights.safetensors").stat().st_ino == inode


class Interrupts(Watch):
    def __init__(self, after):
        def look(model):
            self.steps += 1
            if self.steps > after:
                raise KeyboardInterrupt

        self.steps = 0
        super().__init__("on_step_begin", look)


RESUMED = {
    "in place": {},
    "scratch": {"half": True, "num_samples": 2},
    "low rank": {"perturbation": "low_rank", "interval": 3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("after", [pytest.param(2, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED)
def test_an_interrupted_run_goes_on_from_its_log(tmp_path, options, after):
    """From the base model, or a checkpoint, and the tail: queued, and made as blocks come."""
    options = options | {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    here = trained(tmp_path / "here", **options)
    trainer = made(tmp_path / "away", callbacks=[Interrupts(after)], **options, **AWAY)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    base = llama().bfloat16() if "half" in options else llama()
    trajectory.replay(tmp_path / "away/run.mezo", base)
    assert torch.equal(weights(trainer.model), weights(base))  # as they were left
    again = trained(tmp_path / "away", resume=True, **options, **AWAY)
    assert torch.equal(weights(again.model), weights(here.model))
    assert records(again) == records(here)


def test_an_exception_leaves_the_weights_of_the_log(tmp_path):
    """In the second half of a step: both end, the step counts, the weights are up to date."""

    passes, trainer = [], made(tmp_path, half=True, **AWAY)
    inner = trainer.compute_loss

    def fails(*args, **kwargs):
        passes.append(1)
        return inner(*args, **kwargs) + 1 / (4 - len(passes))

    trainer.compute_loss = fails
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    replayed = trajectory.replay(tmp_path / "run.mezo", llama().bfloat16())
    assert torch.equal(weights(trainer.model), weights(replayed))


def test_what_makes_its_model_anew_is_refused(tmp_path):
    with pytest.raises(InputError, match="model_init cannot be combined with offload"):
        MeZOTrainer(None, settings(tmp_path, **AWAY), model_init=lambda: llama())


@pytest.mark.parametrize("perturbation", [None, "low_rank"])
def test_nothing_is_written_but_the_log(tmp_path, perturbation):
    """offload_write_every=0: each visit makes all updates; a killed run goes on from the base."""
    options = {"max_steps": 6, "perturbation": perturbation, "interval": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    never = options | AWAY | {"offload_write_every": 0}
    here = trained(tmp_path / "here", **options)
    trainer = made(tmp_path / "away", callbacks=[Interrupts(3)], **never)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again, base = made(tmp_path / "away", **never), llama()
    with again.offloaded():
        again.train(resume_from_checkpoint=True)
        assert again.evaluate()["eval_loss"] == here.evaluate()["eval_loss"]
        with pytest.raises(InputError, match="replay --by_tensor"):
            again.save_model()
    assert torch.equal(weights(again.model), weights(base))
    assert records(again) == records(here)
    with pytest.raises(InputError, match="are in the run log alone"):
        again.evaluate()
    assert torch.equal(
        weights(trajectory.replay(tmp_path / "away/run.mezo", base)), weights(here.model)
    )


def test_a_trainer_given_its_optimizer_and_a_second_training(tmp_path):
    """Steps go on; the model's own calls, and its methods, see all updates within offloaded()."""
    trainers = []
    for name, more in (("here", {}), ("away", AWAY)):
        model = llama()
        trainer = made(tmp_path / name, model=model, **more)
        trainer.optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=7)
        with trainer.offloaded():
            trainer.train()
            trainer.train()
            written = model.generate(torch.ones(2, 3, dtype=torch.long), max_new_tokens=4)
        trainers.append((trainer, written))
    (here, one), (away, other) = trainers
    assert_the_same(here, away)
    assert torch.equal(one, other)
    assert not isinstance(away.optimizer.optimizer.weights, Offload)


def test_an_adapter_on_an_offloaded_base(tmp_path):
    """Nothing is written, and text is generated by the model inside peft's wrapper all the same."""
    written = []
    for name, more in (("here", {}), ("away", AWAY | {"offload_write_every": 0})):
        model = with_adapter(llama(), ModelArguments(lora_r=2), 0)
        trainer = made(tmp_path / name, model=model, learning_rate=1.0, **more)
        with trainer.offloaded():
            trainer.train()
            ids = torch.ones(2, 3, dtype=torch.long)
            written.append(
                model.generate(
                    input_ids=ids,
                    max_new_tokens=4,
                    output_logits=True,
                    return_dict_in_generate=True,
                ).logits
            )
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))
    assert written[0][0].isfinite().all()


def test_all_directions_of_a_step_take_one_pass(tmp_path, monkeypatch):
    """Each block that moves is loaded once a step, however many directions there are."""
    loads = []

    class Counting(BlockCache):
        def close(self):
            super().close()
            loads.append(max(self.loads[block] for block in self.blocks if not block.kept))

    monkeypatch.setattr("mezo.offload.context.BlockCache", Counting)
    for number, samples in enumerate((1, 4)):
        trained(tmp_path / str(number), half=True, num_samples=samples, max_steps=9, **AWAY)
    assert loads[1] <= loads[0] + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offload_folder": "x", "offload": False}, "are for offload"),
        ({"offload_write_every": 0, "save_strategy": "steps"}, "set save_strategy no"),
        ({"offload_write_every": -1}, "write_every must be at least 1"),
        ({"offload_write_every": 0, "offload_folder": "x"}, "with write_every=0 none is"),
        ({"torch_compile": True}, "torch_compile cannot be combined with offload"),
        ({"bf16_full_eval": True}, "bf16_full_eval cannot be combined with offload"),
        ({"rule": "momentum"}, "rule momentum cannot be combined with offload"),
        ({"estimator": "one_sided"}, "estimator one_sided cannot be combined with offload"),
        ({"keep": 0.5}, "keep.* cannot be combined with offload"),
        ({"rounding": "compensated", "half": True}, "take stochastic"),
    ],
    ids=str,
)
def test_refused_when_the_trainer_is_made(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        made(tmp_path, **(AWAY | changes))
