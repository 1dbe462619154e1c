"""accelerate's hooks around a model on several devices, and models that it has offloaded.

Without a GPU all blocks are on one device, and the hooks around them alone are those of several.
With one, half of the blocks are on the CPU, and computed there: two devices.
"""

import pytest
import torch
from accelerate import dispatch_model
from models import tiny_model
from trainers import settings

from mezo import MeZO, MeZOTrainer, trajectory
from mezo.errors import InputError

IDS = torch.arange(24).view(3, 8) % 50
FORMS = [
    ("float32", "in_place"),
    ("float32", "scratch"),
    ("bfloat16", "scratch"),
    ("float32", "low_rank"),
    ("bfloat16", "low_rank"),
]
BLOCKS = ("embed_tokens", "embed_positions", "layers.0", "layers.1", "final_layer_norm")


def opt(dtype="float32"):
    return tiny_model("opt").to(getattr(torch, dtype)).eval()


def dispatched(model, layers, rest="cpu", **options):
    where = {f"model.decoder.{b}": layers if "layers" in b else rest for b in BLOCKS}
    return dispatch_model(model, where | {"lm_head": rest}, force_hooks=True, **options)


def hooks(model):
    return [type(m._hf_hook).__name__ for m in model.modules() if hasattr(m, "_hf_hook")]


def tuned(model, path, form):
    optimizer = MeZO(model.named_parameters(), lr=1e-3, seed=3, perturbation=form, interval=2)
    with trajectory.record(optimizer, path, model=model):
        losses = [optimizer.step(lambda: model(input_ids=IDS, labels=IDS).loss) for _ in range(3)]
    optimizer.write()
    return losses, [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_a_dispatched_model_takes_the_same_steps(tmp_path, dtype, form):
    """Losses, weights and run log to the bit: what `device_map="auto"` does but for the devices."""
    split = dispatched(opt(dtype), "cpu")
    assert hooks(split).count("AlignDevicesHook") >= 2 * len(BLOCKS)
    found = tuned(split, tmp_path / "split.mezo", form)
    expected = tuned(opt(dtype), tmp_path / "one.mezo", form)
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1], expected[1]))
    assert (tmp_path / "split.mezo").read_bytes() == (tmp_path / "one.mezo").read_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "form"), FORMS)
def test_a_run_on_two_devices_replays_on_one(tmp_path, dtype, form):
    """Each tensor is drawn on its own device, by the bits of any other."""
    split = dispatched(opt(dtype), 0, main_device="cpu")
    assert {p.device.type for p in split.parameters()} == {"cuda", "cpu"}
    _, found = tuned(split, tmp_path / "split.mezo", form)
    replayed = trajectory.replay(tmp_path / "split.mezo", opt(dtype))
    assert all(map(torch.equal, found, replayed.parameters()))


def trainer_of(model, path):
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    return MeZOTrainer(model, settings(path, max_steps=2), train_dataset=rows)


def test_the_trainer_takes_a_dispatched_model(tmp_path):
    logs = []
    for name in ("split", "one"):
        trainer_of(dispatched(opt(), "cpu") if name == "split" else opt(), tmp_path / name).train()
        logs.append(trajectory.read(tmp_path / name / "run.mezo").steps)
    assert [step.record for step in logs[0]] == [step.record for step in logs[1]]


def test_what_accelerate_offloads_is_refused_with_the_way_out(tmp_path):
    """By the plain loop, and by the Trainer, whose own move to the device would come first."""
    model = dispatched(opt(), "disk", offload_dir=str(tmp_path / "disk"))
    told = r"parameter model\.decoder\.layers\.0.* is on the meta device .*load_offloaded"
    with pytest.raises(InputError, match=told):
        MeZO(model.named_parameters())
    with pytest.raises(InputError, match=told):
        trainer_of(model, tmp_path / "out")
    with pytest.raises(InputError, match=told):
        MeZOTrainer(model=model, args=settings(tmp_path / "out"))
