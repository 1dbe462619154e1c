"""The methods of `mezo train`: the baselines, what a part or an adapter trains, quantised bases."""

import json
import math
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from folders import mezo, reviews, same_weights, training
from models import LENGTH, tiny_model
from safetensors.torch import load_file
from task_runs import data, moved, replayed, settings, trained
from tiny_tokenizers import byte_bpe, word_piece
from transformers import MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

from mezo import MeZO, load, objectives, tasks, trajectory
from mezo.compatibility import checkpointing_option
from mezo.errors import InputError
from mezo.evaluation import linear_probe as baselines
from mezo.models import adapters as tuners
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.models.modes import unwrap
from mezo.models.trainable import head_of
from mezo.runs import rebuild as adapter
from mezo.runs import task as run
from mezo.runs.arguments import TrainArguments
from mezo.runs.methods import passes_of_a_step

FIELDS = {"metric", "method", "test", "dev", "seconds", "peak_memory_above_model", "steps"}
FIELDS |= {"forward_passes", "stored_bytes", "config", "environment", "zero_shot", "kept_step"}
PREFIX = {"use_peft": True, "peft_type": "prefix"}
CHECKPOINTING = checkpointing_option(TrainArguments)
quantised = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.mark.parametrize(
    ("method", "passes"),
    [("mezo", 8), ("adam", 12), ("lp", 1), ("zero-shot", 0)],
)
def test_every_method_gives_the_same_fields(place, tmp_path, method, passes):
    """4 steps: 2 passes each, or 3 with the backward as two; a probe reads its 24 texts once."""
    result = trained(place, tmp_path, method=method)
    assert result.keys() >= FIELDS
    assert result["forward_passes"] == passes
    stored = {"mezo": "run.mezo", "adam": "model.safetensors", "lp": "probe.safetensors"}
    if method in stored:
        assert result["stored_bytes"] == (tmp_path / stored[method]).stat().st_size
    else:
        assert result["test"] == result["zero_shot"] | {"n": 24}
    assert json.loads((tmp_path / "result.json").read_text())["method"] == method


def test_a_probe_separates_what_is_separable():
    """Against scikit-learn's own predictions; a label never seen is never predicted."""
    rng = np.random.default_rng(0)
    centres = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0]])
    labels = [0, 1, 3] * 10
    features = np.concatenate([centres + 0.3 * rng.normal(size=(3, 2)) for _ in range(10)])
    probe = baselines.fit_probe(features, labels)
    assert probe.labels == (0, 1, 3)
    examples = [tasks.Example({}, label) for label in labels]
    task = tasks.custom_task("{x}", [" a", " b", " c", " d"])
    found = probe.evaluate(features, examples, task)
    assert found.accuracy == 1.0
    assert found.loss < math.log(3)
    two = baselines.fit_probe(features[:20], [label == 1 for label in labels[:20]])
    assert two.weight.shape == (2, 2)
    assert np.array_equal(two.weight[0], -two.weight[1])
    with pytest.raises(InputError, match="two labels or more"):
        baselines.fit_probe(features, [1] * 30)


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "roberta", "bert", "encoder"])
def test_a_probe_reads_what_the_head_reads(kind):
    """The head's own logits are head(features): at the last token, at the mask, over the text."""
    masked = {"roberta": byte_bpe(mask=True), "bert": word_piece()}
    tokenizer = masked.get(kind) or (word_piece() if kind == "encoder" else byte_bpe())
    model = tiny_model(kind, len(tokenizer))
    form = objectives.form_for(model, tokenizer, tasks.get("sst2"))
    texts = ("a charming journey .", "dull", "no wit , only labored gags")
    examples = [tasks.Example({"sentence": text}, i % 2) for i, text in enumerate(texts)]
    features = torch.from_numpy(baselines.features_of(model, form, examples, batch_size=2))
    with torch.no_grad():
        batch = form.collate([form.encode(example) for example in examples])
        scores = form.scores(model, batch)
        if kind == "encoder":
            anchors = objectives.encoder.embed(model, form.collate([])).double()
            own = objectives.encoder.SCALE * features @ anchors.T
        elif kind in masked:
            head = objectives.masked._head(model)
            own = head(features[:, None])[:, 0][:, list(form.words)]
        else:
            heads = [target[0] for target in form.encode(examples[0])["targets"]]
            own = model.get_output_embeddings()(features).log_softmax(-1)[:, heads]
    assert (own - scores).abs().max() <= 100 * 2.0**-24 * scores.abs().max()  # scores are float32


@pytest.mark.parametrize("kind", ["opt", "llama", "roberta", "bert", "encoder"])
def test_the_head_is_what_is_above_the_base_model(kind):
    model = tiny_model(kind)
    if kind == "encoder":
        with pytest.raises(InputError, match="BertModel has no head"):
            head_of(model)
        return
    model.requires_grad_(False)
    pattern = head_of(model)
    names = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
    expected = {
        "opt": {"model.decoder.embed_tokens.weight"},  # tied
        "llama": {"lm_head.weight"},
    }
    if kind in expected:
        assert set(names) == expected[kind]
    else:
        assert {"dense", "decoder"} & {part for name in names for part in name.split(".")}
        assert not any(".encoder." in name for name in names)


def test_head_tuning_moves_the_head_alone(place, tmp_path):
    trained(place, tmp_path / "a", {"trainable": "head"})
    assert moved(place, tmp_path / "a") == {"model.decoder.embed_tokens.weight"}
    log = tmp_path / "a" / "run.mezo"
    assert same_weights(replayed(place, tmp_path / "b", log), tmp_path / "a")


@pytest.mark.parametrize("lora", [False, True])
def test_adam_with_checkpointing_gives_the_same_in_more_passes(place, tmp_path, lora, monkeypatch):
    """The same weights; while training, each layer's forward runs twice a step instead of once."""
    calls, load = [], models.load

    def counting(*args, **options):
        model, tokenizer = load(*args, **options)
        layer = unwrap(model).model.decoder.layers[0]
        layer.fc1.register_forward_pre_hook(lambda m, args: calls.append(m.training))
        return model, tokenizer

    monkeypatch.setattr(models, "load", counting)
    own, counts = {"use_peft": lora}, []
    for name, more in (("plain", {}), ("less", {CHECKPOINTING: True})):
        result = trained(place, tmp_path / name, own, method="adam", **more)
        counts.append((sum(calls), result["forward_passes"]))
        calls.clear()
    assert counts == [(4, 12), (8, 16)]
    assert same_weights(tmp_path / "plain", tmp_path / "less")


def test_passes_count_samples_and_accumulation(tmp_path):
    args = settings(tmp_path, num_samples=3, gradient_accumulation_steps=2)
    assert passes_of_a_step(args) == 12


def test_a_prefix_run_is_rebuilt_from_its_log(place, tmp_path):
    """Bitwise: in one line, by the terminal's replay, and the adapter alone."""
    result = trained(place, tmp_path / "a", PREFIX, mezo_eps=0.1, learning_rate=1e-2)
    assert result["method"] == "mezo-prefix"
    assert result["test"]["loss"] != result["zero_shot"]["loss"]
    log = tmp_path / "a" / "run.mezo"
    assert same_weights(replayed(place, tmp_path / "b", log), tmp_path / "a")
    weight = load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"]
    model = load(place / "tiny", log)
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, weight)
    onto = adapter.save_adapter(ModelArguments(str(place / "tiny")), log, str(tmp_path / "c"))
    assert onto["steps"] == 4
    assert same_weights(tmp_path / "c", tmp_path / "a")
    with pytest.raises(InputError, match=r"trained an adapter \(prompt_encoder"):
        adapter.replay_by_tensor(ModelArguments(str(place / "tiny")), log, str(tmp_path / "d"))
    begun = load(place / "tiny", log, until=0).prompt_encoder["default"].embedding
    assert not torch.equal(begun.weight, weight)
    saved = run.evaluate(
        ModelArguments(str(tmp_path / "a")), data(place, test_file=data(place).dev_file)
    )
    assert saved["loss"] == result["test"]["loss"]


def test_a_prefix_is_rebuilt_where_a_forward_pass_rounds_otherwise(place, tmp_path, monkeypatch):
    """Another processor, or other threads: the log holds the values with which the run began.

    A run that was cut off goes on there as well, without a checkpoint.
    """
    options = {"mezo_eps": 0.1, "learning_rate": 1e-2, "save_strategy": "no"}
    trained(place, tmp_path / "whole", PREFIX, **options)
    trained(place, tmp_path / "cut", PREFIX, **options, max_steps=2)
    computed = tuners._keys_and_values

    def rounded_otherwise(*args):
        return [(keys * (1 + 2e-7), values + 1e-7) for keys, values in computed(*args)]

    monkeypatch.setattr(tuners, "_keys_and_values", rounded_otherwise)
    log = tmp_path / "whole" / "run.mezo"
    assert same_weights(replayed(place, tmp_path / "b", log), tmp_path / "whole")
    trained(place, tmp_path / "cut", PREFIX, **options, resume_from_checkpoint="true")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_the_log_holds_what_neither_the_seed_nor_the_options_give_again(place, tmp_path):
    """Of LoRA nothing, of DoRA the norms, which are sums of floats, of a prefix everything."""
    dora = {"use_peft": True, "peft_options": '{"use_dora": true}'}
    for own, kept in (({"use_peft": True}, None), (dora, "magnitude"), (PREFIX, "prompt_encoder")):
        folder = tmp_path / str(kept)
        trained(place, folder, own, max_steps=1)
        header = trajectory.read(folder / "run.mezo").header
        names = {e["name"] for e in header["tensors"] if kept is not None and kept in e["name"]}
        assert set(header.get("start_values", {})) == names
        assert bool(names) == (kept is not None)


def test_a_prefix_run_goes_on_from_its_log(place, tmp_path):
    """From the adapter it began with, where there is no checkpoint."""
    options = {"mezo_eps": 0.1, "learning_rate": 1e-2, "save_strategy": "no"}
    whole = trained(place, tmp_path / "whole", PREFIX, **options)
    trained(place, tmp_path / "cut", PREFIX, **options, max_steps=2)
    again = options | {"resume_from_checkpoint": "true"}
    result = trained(place, tmp_path / "cut", PREFIX, **again)
    assert (result["steps"], result["test"]) == (4, whole["test"])
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_prompt_on_a_masked_model_trains_and_replays(tmp_path):
    tokenizer = byte_bpe(mask=True)
    tiny_model("roberta", len(tokenizer)).float().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    reviews(tmp_path / "reviews.jsonl")
    for peft_type in ("prefix", "prompt"):
        result = trained(tmp_path, tmp_path / peft_type, PREFIX | {"peft_type": peft_type})
        assert result["method"] == f"mezo-{peft_type}"
        log = tmp_path / peft_type / "run.mezo"
        assert same_weights(replayed(tmp_path, tmp_path / f"{peft_type}2", log), log.parent)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base 64 wide: on processors with AVX-512, bitsandbytes packs 4-bit weights in such rows."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = byte_bpe()
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": LENGTH, "init_std": 0.3}
    with torch.random.fork_rng():
        torch.random.manual_seed(7)
        model = OPTForCausalLM(
            OPTConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes, **heads)
        )
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    reviews(folder / "reviews.jsonl")
    return folder


@quantised
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_on_a_quantised_base_trains_and_replays(wide, tmp_path, bits):
    """The same steps from the same base and the log, whatever instructions the processor has."""
    for name, more in (("lora", {}), ("prefix", {"peft_type": "prefix"})):
        options = {"use_peft": True, bits: True} | more
        result = trained(wide, tmp_path / name, options, learning_rate=1e-2, mezo_eps=1e-2)
        assert result["test"]["loss"] != result["zero_shot"]["loss"]
        log = tmp_path / name / "run.mezo"
        assert same_weights(replayed(wide, tmp_path / f"{name}2", log), tmp_path / name)
    with pytest.raises(InputError, match=r"is quantised \(bitsandbytes\).*--use_peft trains"):
        trained(wide, tmp_path / "full", {bits: True})
    assert not (tmp_path / "full" / "run.mezo").exists()


class Packed(torch.nn.Parameter):
    """As quantising libraries make them."""


def test_a_quantised_model_is_told_by_its_parameters():
    """Whatever made it: a config, integers, or a tensor of a class of its own."""
    model = tiny_model("opt")
    models.refuse_quantised(model)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match=r"the model is quantised \(gptq\)"):
        models.refuse_quantised(model)
    for kind, dtype, message in (
        (torch.nn.Parameter, torch.int8, r"fc1\.weight is quantised \(Parameter, int8\)"),
        (Packed, torch.float32, r"fc1\.weight is quantised \(Packed, float32\)"),
    ):
        model = tiny_model("opt")
        weight = torch.zeros(32, 16, dtype=dtype)
        model.model.decoder.layers[0].fc1.weight = kind(weight, requires_grad=False)
        with pytest.raises(InputError, match=message):
            models.refuse_quantised(model)
        model.peft_config = {}
        models.refuse_quantised(model)


def test_quantising_needs_its_library(place, monkeypatch):
    args = ModelArguments(str(place / "tiny"), load_in_4bit=True)
    with pytest.raises(InputError, match="exclude each other"):
        models.load(ModelArguments(str(place / "tiny"), load_in_4bit=True, load_in_8bit=True))
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mezo-lm\[quant\]'"):
        models.load(args)


REFUSED = [
    (["--method=adm"], "method 'adm' is unknown; did you mean adam?"),
    (["--method=zzz"], "known: mezo, adam, lp, zero-shot"),
    (["--method=lp", "--use_peft"], "method lp trains no adapter"),
    (["--peft_type=prefix"], "peft_type prefix needs --use_peft"),
    (["--use_peft", "--peft_type=prefx"], "did you mean prefix?"),
    (
        ["--use_peft", "--peft_type=adalora"],
        "adalora cannot be combined with MeZO: it is steered by",
    ),
    (
        ["--use_peft", "--peft_type=prefix", "--freeze_layers=1"],
        "freeze_layers cannot be combined with",
    ),
    (
        [
            "--use_peft",
            "--peft_type=prefix",
            "--method=adam",
            f"--{checkpointing_option(TrainArguments)}=true",
        ],
        "_checkpointing cannot be combined with peft_type prefix",
    ),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_a_method_that_cannot_be_is_one_line(place, argv, message, capsys, tmp_path):
    code, out, err = mezo(capsys, "train", *training(place, place / "tiny"), *argv)
    assert (code, out) == (2, "")
    assert err.startswith("mezo: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_log_cannot_name_what_is_loaded(place, tmp_path):
    """Its options of an adapter are numbers: none names a tokenizer, a module or a folder."""
    model = models.load(ModelArguments(str(place / "tiny"), use_peft=True))[0]
    for config, message in (
        ({"peft_options": '{"megatron_core": "os"}'}, "megatron_core must be numbers"),
        ({"peft_type": "../x"}, "is unknown"),
        ({"num_virtual_tokens": -1}, "num_virtual_tokens cannot be -1"),
        ({"load_in_4bit": "yes"}, "load_in_4bit cannot be 'yes'"),
    ):
        optimizer = MeZO(model.named_parameters(), seed=1, perturbation="scratch")
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.mezo"
        trajectory.record(optimizer, path, config={"use_peft": True} | config).close()
        with pytest.raises(InputError, match=message):
            load(place / "tiny", path)


def test_a_model_that_takes_no_prefix_is_one_line(tmp_path):
    """peft's or the model's reason; this one keeps no keys and values that a prefix could join."""
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    args = ModelArguments(use_peft=True, peft_type="prefix")
    with pytest.raises(InputError, match="prefix_tuning: ") as caught:
        tuners.with_adapter(MambaForCausalLM(config).eval(), args, 0)
    assert "\n" not in str(caught.value)
