"""Models that transformers shards while it loads them: `distributed_config` of from_pretrained."""

import os

import pytest
import torch
from models import llama
from processes import run
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from mezo import MeZO, trajectory
from mezo.distributed import elastic
from mezo.distributed import processes as distributed

IDS = torch.arange(24).view(3, 8) % 64
CASES = [
    ({"fsdp_size": 2}, "float32", "in_place"),
    ({"fsdp_size": 2}, "bfloat16", "scratch"),
    ({"fsdp_size": 2}, "float32", "low_rank"),
    ({"tp_size": 2}, "float32", "in_place"),
    ({"tp_size": 2}, "float32", "scratch"),
    ({"tp_size": 2}, "bfloat16", "scratch"),
]


def loaded(base, dtype, **options):
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options).eval()


def optimizer_of(net, form):
    return MeZO(net.named_parameters(), lr=1e-3, seed=3, perturbation=form, interval=2)


def steps_of(net, optimizer, log):
    with log:
        found = [optimizer.step(lambda: net(input_ids=IDS, labels=IDS).loss) for _ in range(3)]
    optimizer.write()
    return found


def numbers(p):
    whole = p.full_tensor() if hasattr(p, "full_tensor") else p
    return whole.detach().float().tolist()


def sharded(rank, base, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")  # as torchrun does
    found = []
    for number, (how, dtype, form) in enumerate(CASES):
        net = loaded(base, dtype, distributed_config=DistributedConfig(**how))
        optimizer = optimizer_of(net, form)
        distributed.join(optimizer, net)
        log = elastic.record(optimizer, f"{folder}/{number}.mezo", model=net)
        losses = steps_of(net, optimizer, log)
        found.append((losses, [numbers(p) for _, p, _ in optimizer.trained()]))
    return found


@pytest.mark.slow  # 10 to 40 s: both processes import transformers
def test_it_takes_the_steps_of_one_device(tmp_path):
    """FSDP to the bit, with a tied embedding; tensor parallel up to the order of sums.

    Tolerance of its first loss, where a wrong part of z shows with 1e-5: two roundings.
    """
    net = llama()
    net.config.tie_word_embeddings = True
    net.tie_weights()
    net.save_pretrained(tmp_path / "base")
    found = run(sharded, 2, tmp_path, str(tmp_path / "base"), str(tmp_path))
    assert found[0] == found[1]
    for number, (how, dtype, form) in enumerate(CASES):
        losses, after = found[0][number]
        log, path = tmp_path / f"{number}.mezo", tmp_path / "one.mezo"
        net = loaded(tmp_path / "base", dtype)
        optimizer = optimizer_of(net, form)
        told = steps_of(net, optimizer, trajectory.record(optimizer, path, model=net))
        again = trajectory.replay(log, loaded(tmp_path / "base", dtype))
        assert [numbers(p) for p in again.parameters()] == after
        if "fsdp_size" in how:
            assert losses == told
            assert log.read_bytes() == path.read_bytes()
        elif dtype == "float32":
            assert losses[0] == pytest.approx(told[0], rel=2 * 2.0**-23)
