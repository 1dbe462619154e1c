"""Estimates without weights: what is counted on the meta device is what lives on a real one."""

import json

import pytest
import torch
from folders import mezo
from offloading import made
from torch.nn import functional as F

from mezo.errors import InputError
from mezo.memory import sizes
from mezo.memory.meta import FusedAttention, LiveBytes
from mezo.memory.plan import OPT, PLANNED, Machine, Planner, config_of, skeleton
from mezo.objectives import progress
from mezo.offload.blocks import blocks_of

PUBLISHED = {"125m": 125, "350m": 331, "1.3b": 1316, "2.7b": 2652, "6.7b": 6658, "13b": 12853}
PUBLISHED |= {"30b": 29975, "66b": 65720, "175b": 174604}  # millions of parameters


def test_living_bytes_by_hand():
    """A chain of three products keeps two results at a time; views and known tensors are free."""
    x, w = torch.empty(4, 8, device="meta"), torch.empty(8, 8, device="meta")
    with LiveBytes([x, w]) as living:
        y = x @ w
        y = y @ w.t()
        y = (y @ w).view(8, 4)
    assert living.peak == 2 * 4 * 8 * 4
    assert living.now == 4 * 8 * 4
    del y
    assert living.now == 0


def test_attention_stores_no_scores():
    q = torch.empty(1, 2, 512, 4, device="meta")
    with FusedAttention() as attention, LiveBytes([q]) as living:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert living.peak == q.numel() * 4 + 2 * 512 * 4  # the output, and a sum for each row
    assert attention.flops == 4 * 2 * 512 * 512 * 4


@pytest.mark.parametrize("name", OPT)
def test_published_shapes(name):
    with torch.device("meta"):
        planner = Planner(config_of(f"facebook/opt-{name}"), torch.bfloat16, 1, 8)
    assert round(planner.parameters / 1e6) == PUBLISHED[name]
    assert planner.weights == 2 * planner.parameters


def test_the_figure_of_sizes_shows_what_is_estimated_now():
    """A row of the table that is kept, made anew: a prefix and AdamW among its methods.

    The number of weights is OPT's; activations are those of the transformers that is installed,
    which another version allocates otherwise: a few per cent of inference, and less of the rest.
    """
    (parameters, *found), (published, *kept) = sizes.estimate("125m"), sizes.ESTIMATES["125M"]
    assert parameters == published
    assert found == pytest.approx(kept, rel=0.05)


def test_with_an_adapter_the_base_is_not_perturbed_nor_trained():
    """`make`: scratch then needs no room for weights, and AdamW none for their gradients."""
    config = config_of("facebook/opt-125m")
    plain, prefix = (
        Planner(config, torch.bfloat16, 1, 8, make=m) for m in (skeleton, sizes.prefixed)
    )
    own = 4 * 5 * 2 * 768 * 12  # keys and values of 5 tokens, in float32
    assert prefix.weights == plain.weights + own
    assert prefix.plan("scratch", 1).device - prefix.inference() <= own
    assert (
        plain.plan("scratch", 1).device - plain.inference() >= 2 * 768 * 3072
    )  # a matrix made anew
    assert prefix.plan("adam", 1).device < 1.1 * prefix.weights < plain.plan("adam", 1).device / 3


def test_few_layers_stand_for_many():
    """Carried out in full, a model of six layers needs what was continued from two and four."""
    config = config_of("facebook/opt-125m")
    config.hidden_size = config.word_embed_proj_dim = config.ffn_dim = 48
    config.num_hidden_layers, config.vocab_size = 6, 100
    few = Planner(config, torch.float32, 2, 16)
    config.layer_types = ["full"] * 6  # layers that may differ are carried out
    whole = Planner(config, torch.float32, 2, 16)
    for method in PLANNED:
        assert few.plan(method, 10) == whole.plan(method, 10), method


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_orders_that_must_hold(name):
    planner = Planner(made(name).config, torch.float32, 4, 32)
    plans = {method: planner.plan(method, 1000) for method in PLANNED}
    sizes = {method: plan.device for method, plan in plans.items()}
    assert planner.weights < sizes["in_place"] <= sizes["scratch"] < sizes["adam"]
    assert sizes["adam"] >= 4 * planner.weights
    assert sizes["adam_checkpointing"] <= sizes["adam"]
    blocks = sorted(block.nbytes for block in blocks_of(planner.model))
    assert sum(blocks[-2:]) < sizes["offload"]  # llama: head and embedding, last and first
    assert plans["offload"].host == planner.weights
    assert plans["in_place"].stored == plans["scratch"].stored < 20_000 + 16 * 1000
    assert planner.plan("scratch", 3000).stored - plans["scratch"].stored == 16 * 2000


def test_the_large_ones_fit_under_offload():
    """The bars: OPT-13B within 6 GB of device memory, OPT-66B within 12, at 16 x 300 tokens."""
    for name, most in (("13b", 6e9), ("66b", 12e9)):
        planner = Planner(config_of(name), torch.bfloat16, 16, 300)
        assert planner.plan("offload", 20000).device < most


def test_encoders_too():
    planner = Planner(config_of("minilm"), torch.float32, 2, 32)
    assert round(planner.parameters / 1e6, 1) == 22.7
    assert planner.weights < planner.plan("in_place", 1).device < 1.1 * planner.weights


def test_time_is_arithmetic_over_measured_speeds():
    planner = Planner(made("opt").config, torch.float32, 2, 8)
    slow = Machine(flops=1e6, draws=1e30, bandwidth=1e30, device="cpu")
    times = {m: planner.plan(m, 1, slow).seconds for m in ("in_place", "adam")}
    assert times["adam"] == pytest.approx(1.5 * times["in_place"])
    bound = Machine(flops=1e30, draws=1e30, bandwidth=1e3, device="cpu")
    assert planner.plan("offload", 1, bound).seconds == planner.weights / 1e3


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.0)  # instead of after ten seconds
    asked = ["memory", "--model", "facebook/opt-66b", "--method", "offload", "--no_time"]
    code, out, err = mezo(capsys, *asked, "--json")
    (plan,) = json.loads(out)["methods"]
    assert code == 0
    assert plan["method"] == "offload"
    assert plan["device"] < 12e9 < plan["host"]
    code, out, err = mezo(capsys, *asked)
    assert code == 0
    name, size, *_ = out.splitlines()[1].split("\t")
    assert (name, size) == ("MeZO, offload", f"{plan['device'] / 1e9:.3g} GB")  # as in the JSON
    assert "65.7 B parameters" in err
    assert "method 1/1" in err  # how far it is


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--model", "facebook/opt-125m", "--max_length", "4096"], "max_length is 4096"),
        (["--model", "facebook/opt-125m", "--batch_size", "0"], "--batch_size must be at least 1"),
        (
            ["--model", "facebook/opt-125m", "--method", "in_place"],
            "16-bit weights cannot be perturbed in place",
        ),
        (["--model", "./nowhere"], "model ./nowhere"),
    ],
)
def test_mistakes_are_one_line(capsys, given, words):
    code, out, err = mezo(capsys, "memory", *given, "--no_time")
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_no_such_method():
    planner = Planner(made("opt").config, torch.float32, 1, 4)
    with pytest.raises(InputError, match="method must be one of"):
        planner.plan("sgd", 1)
