"""The battery of engines for vLLM, on tiny models with random weights, with one worker and two.

`make test-vllm` makes an environment for it. VLLM_CPU_KVCACHE_SPACE keeps its cache small.
"""

import copy
import os

import pytest
import torch
from battery import *  # noqa: F403
from battery import BATCH, PROMPTS, QUERIES, begun, moves, same, values, weights
from vllm_models import saved

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from mezo import Generation
from mezo.engines import THETA, Change, Point, Run, TransformersEngine
from mezo.engines.vllm_engine import VLLMEngine
from mezo.errors import InputError


@pytest.fixture(
    scope="module",
    params=[
        ("llama", 1),
        ("qwen2", 1),
        pytest.param(("llama", 2), marks=pytest.mark.slow),  # workers start, and exchange
        pytest.param(("qwen2", 2), marks=pytest.mark.slow),
    ],
    ids=lambda given: f"{given[0]}-by-{given[1]}",
)
def served(request, tmp_path_factory):
    kind, workers = request.param
    environment = pytest.MonkeyPatch()
    environment.setenv("VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
    if workers == 2:  # vLLM gives each worker a NUMA node, unless it is told its cores
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = tmp_path_factory.mktemp(kind)
    model, tokenizer = saved(kind, folder)
    options = {"max_model_len": 64, "max_num_seqs": 16, "gpu_memory_utilization": 0.2}
    options["enforce_eager"] = kind == "llama"  # the other is compiled: moves reach it all the same
    if workers == 1:
        options["distributed_executor_backend"] = "uni"  # no process more than is needed
    engine = VLLMEngine(str(folder), tensor_parallel_size=workers, **options)
    yield model, tokenizer, engine
    engine.close()
    environment.undo()


@pytest.fixture
def made(served):
    model, _, engine = served

    def make(dtype=torch.float32):
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        engine.begin(Run(shapes, 0, "gaussian"))
        engine.take(values(model).items())
        engine.forget()
        return copy.deepcopy(model), engine

    return make


@pytest.mark.parametrize("rows", [1, 32, 33])
def test_the_product_of_few_rows_is_that_of_many(rows):
    """16-bit rows are multiplied from the other side where they are few."""
    from mezo.engines.vllm_plain import product

    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 16, generator=draw), torch.randn(24, generator=draw)
    x = torch.randn(rows, 16, generator=draw)
    assert torch.equal(product(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    expected = x.float() @ weight.float().T + bias.float()
    found = product(x, weight, bias)
    assert found.is_contiguous()
    # two roundings, of the product and of the sum: each at most 2^-8 of what it rounds
    limit = 2.0**-7 * (x.float().abs() @ weight.float().abs().T + bias.float().abs())
    assert ((found.float() - expected).abs() <= limit).all()


def test_it_begins_with_the_files_weights(served):
    """Every fused matrix is found, and every shard: before anything was given to it."""
    model, _, engine = served
    begun(model, engine)
    assert same(weights(engine), values(model))


def test_losses_are_those_of_transformers(served, made):
    """Both losses of a direction within 2e-3 in float32, and far closer than they are apart."""
    model, engine = made()
    reference = TransformersEngine(copy.deepcopy(model), served[1])
    names = begun(model, engine)
    begun(model, reference)
    points = [Point(look=(Change(names, moves(c)),)) for c in (1e-2, -1e-2)]
    found, expected = engine.losses(BATCH, points), reference.losses(BATCH, points)
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-3
    assert engine.logprobs(QUERIES, [THETA])[0][1] == pytest.approx(
        reference.logprobs(QUERIES, [THETA])[0][1], abs=1e-4
    )


def test_greedy_texts_are_those_of_transformers(served, made):
    model, engine = made()
    reference = TransformersEngine(model, served[1])
    settings = Generation(max_new_tokens=5)
    (found,), (expected,) = (e.texts(PROMPTS, [THETA], settings) for e in (engine, reference))
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert [one.text for one in found] == [one.text for one in expected]


def test_texts_follow_the_weights_and_not_the_prefix_cache(made):
    """A long prompt is cached: after an update its keys and values are those of other weights."""
    model, engine = made()
    names, prompts = begun(model, engine), [list(range(5, 45))]
    settings = Generation(max_new_tokens=6)
    far = Point(look=(Change(names, moves(0.3)),))
    first, there, again = engine.texts(prompts, [THETA, far, THETA], settings)
    assert first == again != there


def test_prompts_that_do_not_fit_are_one_line(made):
    _, engine = made()
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        engine.texts([[1], []], [THETA], Generation(max_new_tokens=2))
    with pytest.raises(InputError, match=r"prompt 0 has 63 tokens.*more than the engine's 64"):
        engine.texts([[1] * 63], [THETA], Generation(max_new_tokens=2))


def test_a_matrix_of_another_shape_is_named(made):
    """As where vLLM would pad or fuse a layer in a way that is not mapped."""
    model, engine = made()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(InputError, match=f"{name}.*is not mapped"):
        engine.begin(Run(shapes | {name: (3, 5)}, 0, "gaussian"))
