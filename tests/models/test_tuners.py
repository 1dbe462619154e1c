"""peft's methods under MeZO: which train and replay, how a prefix starts, what is refused."""

import json
import os
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from models import llama, tiny_model
from peft import PeftType
from tiny_tokenizers import byte_bpe, word_piece

from mezo import MeZO, objectives, tasks, trajectory
from mezo.errors import InputError
from mezo.models import adapters as tuners
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.modes import evaluating

OPTIONS = {  # sizes that fit a model of width 16
    "adaption_prompt": {"adapter_len": 3, "adapter_layers": 2},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 20},
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": [3, 4, 5]},
    "vblora": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "vera": {"save_projection": False},
    "waveft": {"n_frequency": 20},
}
WORKING = sorted({one.name.lower() for one in PeftType} - tuners.REFUSED.keys())
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
CAUSAL = ["opt", "gpt2", "llama", "qwen2"]  # qwen2: fewer heads for keys than for queries
KINDS = {"bert": word_piece, "roberta": lambda: byte_bpe(mask=True)}


def asked(peft_type, **options):
    return ModelArguments(use_peft=True, peft_type=peft_type, **options)


def made(peft_type, seed=5, base=None):
    options = json.dumps(OPTIONS.get(peft_type, {}))
    base = llama() if base is None else base
    return tuners.with_adapter(base, asked(peft_type, peft_options=options), seed).eval()


def loss_of(model):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss


def parameters(model):
    return dict(model.named_parameters())


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("peft_type", WORKING)
def test_a_method_of_peft_trains_and_replays(peft_type, tmp_path):
    """Steps move the loss and only the adapter; the log and the seed give the same bits."""
    before = torch.get_rng_state()
    model = made(peft_type)
    assert torch.equal(torch.get_rng_state(), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(tuners.is_of_adapter(name) for name in trained)
    start = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        first = loss_of(model)
    optimizer = MeZO(model.named_parameters(), lr=0.1, eps=1e-2, seed=3)
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        for _ in range(3):
            optimizer.step(lambda: loss_of(model))
    with torch.no_grad():
        assert loss_of(model) != first
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved
    assert moved <= trained
    rebuilt = parameters(trajectory.replay(tmp_path / "run.mezo", made(peft_type)))
    assert all(torch.equal(p, rebuilt[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("peft_type", sorted(tuners.REFUSED))
def test_a_method_that_needs_more_than_forward_passes_is_refused_by_name(peft_type):
    with pytest.raises(
        InputError, match=f"peft_type {peft_type} cannot be combined with MeZO: it "
    ):
        made(peft_type)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "prefx"}, "'prefx' is unknown; did you mean prefix"),
        ({"peft_type": "zzz"}, "'zzz' is unknown; known: prefix, prompt, "),
        ({"peft_options": "{"}, "is not JSON"),
        ({"peft_options": "[1]"}, r"must be like {'r': 4}"),
        ({"peft_options": '{"nosuch": 1}'}, "lora has no option nosuch: it has alora"),
        ({"peft_options": '{"megatron_core": "os"}'}, "megatron_core must be numbers or truth"),
        ({"peft_options": '{"modules_to_save": ["a"]}'}, "modules_to_save must be numbers"),
        ({"lora_target_modules": ["nosuch"]}, r"LoRA: .*nosuch"),
        ({"peft_type": "ia3", "lora_target_modules": ["nosuch"]}, "ia3: .*nosuch"),
        ({"peft_type": "c3a"}, "c3a: The block size should be a factor"),
    ],
)
def test_a_wrong_adapter_is_one_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        tuners.with_adapter(llama(), ModelArguments(use_peft=True, **changes), 0)
    assert "\n" not in str(caught.value)


def prefixed(kind, seed=3):
    """A model and the same behind a prefix, in float64 both, and the tokens of the prefix."""
    model = tuners.with_adapter(tiny_model(kind), asked("prefix"), seed).double().eval()
    tuners._start_at_activations(model, seed)  # peft's encoder is made in float32
    tokens = torch.randint(400, (1, 5), generator=torch.Generator().manual_seed(seed))
    return tiny_model(kind), model, tokens.expand(2, 5)


def padded_ids():
    ids = torch.randint(5, 400, (2, 7), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_new_prefix_is_that_of_real_tokens(kind):
    """The logits are those behind the tokens themselves, with padding between, to rounding."""
    base, model, tokens = prefixed(kind)
    ids, mask, positions = padded_ids()
    with torch.no_grad():
        behind = base(
            input_ids=torch.cat([tokens, ids], 1),
            attention_mask=torch.cat([torch.ones_like(tokens), mask], 1),
            position_ids=torch.cat([torch.arange(5).expand(2, 5), positions + 5], 1),
        ).logits[:, 5:]
        found = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    read = mask.bool()
    # two orders of the same sums: a few hundred roundings of 2^-53 of logits of size 10
    assert (found - behind)[read].abs().max() <= 1000 * 2.0**-53 * behind.abs().max()
    with torch.no_grad():
        plain = base(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert (plain - behind)[read].abs().max() > 0.1  # the tokens matter


@pytest.mark.parametrize("kind", ["bert", "roberta", "encoder"])
def test_an_encoder_s_prefix_is_that_of_real_tokens(kind):
    """Its first layer's keys and values are the projections of the tokens' embeddings."""
    base, model, tokens = prefixed(kind)
    inner = base.base_model
    with torch.no_grad():
        states = inner.embeddings(input_ids=tokens[:1])[0]
        attention = inner.encoder.layer[0].attention.self
        expected = torch.cat([attention.key(states), attention.value(states)], -1)
    found = model.prompt_encoder["default"].embedding.weight[:, :32]
    assert (found - expected).abs().max() <= 100 * 2.0**-53 * expected.abs().max()


def test_a_start_is_its_seed_s():
    """Bitwise, whatever the caller's generator and the base model's mode."""
    for name in ("prefix", "prompt"):
        torch.manual_seed(1)
        one = made(name, 1).prompt_encoder["default"].embedding.weight
        base = llama(dropout=0.5).train()
        same = made(name, 1, base).prompt_encoder["default"].embedding.weight
        other = made(name, 2).prompt_encoder["default"].embedding.weight
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
    rows = llama().get_input_embeddings().weight
    start = made("prompt").prompt_encoder["default"].embedding.weight
    assert all((row == rows).all(-1).any() for row in start)  # real tokens' embeddings


def scores_of(kind, peft_type, tokenizer):
    model = tuners.with_adapter(tiny_model(kind, len(tokenizer)), asked(peft_type), 3).eval()
    form = objectives.form_for(model, tokenizer, tasks.get("sst2"))
    texts = ("a charming journey .", "no wit , only labored gags never too long")
    examples = [tasks.Example({"sentence": text}, i) for i, text in enumerate(texts)]
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft's, of what it drops
        features = [form.encode(example) for example in examples]
        together = form.scores(model, form.collate(features))
        alone = [form.scores(model, form.collate([feature])) for feature in features]
    return together, torch.cat(alone)


@pytest.mark.parametrize("peft_type", ["prefix", "prompt"])
@pytest.mark.parametrize("kind", [*CAUSAL, *KINDS])
def test_scores_behind_a_prefix_do_not_depend_on_the_batch(kind, peft_type):
    """Padding is between prefix and text, on the left: positions are counted without it."""
    tokenizer = KINDS.get(kind, byte_bpe)()
    together, alone = scores_of(kind, peft_type, tokenizer)
    # the prefix is float32, all else float64, and the scores are float32
    assert (together - alone).abs().max() <= 100 * 2.0**-24 * alone.abs().max()


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_generation_behind_a_prompt_does_not_depend_on_the_batch():
    model = made("prompt", base=llama())
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[0, :4] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        together = model.generate(input_ids=ids, attention_mask=mask, **options)
        alone = model.generate(
            input_ids=ids[:1, 4:], attention_mask=torch.ones(1, 3).long(), **options
        )
    assert together[0, -5:].tolist() == alone[0, -5:].tolist()


def test_a_prefix_takes_positions_of_the_context():
    tokenizer = byte_bpe()
    for peft_type, left in (("prefix", 59), ("lora", 64)):
        model = tuners.with_adapter(tiny_model("opt", len(tokenizer)), asked(peft_type), 0)
        assert objectives.form_for(model, tokenizer, tasks.get("sst2")).max_length == left


@pytest.mark.parametrize("peft_type", ["prefix", "prompt", "ia3", "p_tuning"])
def test_a_saved_adapter_computes_what_it_did(peft_type, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base").eval()
    model = made(peft_type, base=base)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.1 * p.requires_grad)
        expected = loss_of(model)
        model.save_pretrained(tmp_path / "saved")
        base = type(llama()).from_pretrained(tmp_path / "base")
        found = loss_of(models._saved_adapter(base, str(tmp_path / "saved")).eval())
    assert found == expected


def test_lora_starts_from_the_same_bits_on_every_processor():
    """torch rounds u * (to - from) + from once where the processor fuses, and twice elsewhere.

    Here it is rounded once, which exact fractions check; a process that is held to the plainest
    instructions draws the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        with tuners.PortableUniform():
            found = torch.empty(1000).uniform_(-0.1768, 0.1768)
        torch.default_generator.manual_seed(7)
        drawn = torch.rand(1000)
    bound = float(torch.tensor(0.1768))
    for value, u in zip(found.tolist(), drawn.tolist(), strict=True):
        exact = Fraction(u) * Fraction(2 * bound) - Fraction(bound)
        assert value == np.float32(float(exact))
    made = tuners.with_adapter(tiny_model("opt", 64).float(), asked("lora"), 3)
    digest = trajectory.fingerprint(next(p for n, p in made.named_parameters() if "lora_A" in n))
    program = (
        "from models import tiny_model; from mezo import trajectory;"
        "from mezo.models import adapters; from mezo.models.arguments import ModelArguments;"
        "made = adapters.with_adapter(tiny_model('opt', 64).float(),"
        " ModelArguments(use_peft=True), 3);"
        "factors = (p for n, p in made.named_parameters() if 'lora_A' in n);"
        "print(trajectory.fingerprint(next(factors)))"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    plain = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": paths}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=plain, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split()[-1] == digest
