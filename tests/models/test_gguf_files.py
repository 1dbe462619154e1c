"""GGUF files as base models: the same model as the one that was written, and clear refusals."""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open

gguf = pytest.importorskip("gguf")

from gguf import GGML_QUANT_SIZES  # noqa: E402
from gguf import GGMLQuantizationType as Kind  # noqa: E402
from gguf_writing import WIDE, tiny_causal_model, write_gguf  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from mezo.errors import InputError  # noqa: E402
from mezo.models import gguf_files  # noqa: E402
from mezo.models import loading as models  # noqa: E402
from mezo.models.arguments import ModelArguments  # noqa: E402

TOKENS = torch.tensor([[5, 40, 80, 120, 7, 9, 200, 31]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The converted models of a test are its own."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(gguf_files, "cache_folder", lambda: folder)
    return folder


def load(path, **options):
    return models.load(ModelArguments(str(path), **options))


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def readable():
    """The block types that the package gguf can turn into numbers."""
    found = []
    for kind, (_, size) in GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(blocks := torch.zeros(1, size, dtype=torch.uint8).numpy(), kind)
        except NotImplementedError:
            continue
        assert blocks.size
        found.append(kind)
    return found


@pytest.mark.parametrize("kind", readable(), ids=lambda kind: kind.name)
def test_every_block_type_gives_the_numbers_that_its_blocks_stand_for(tmp_path, kind):
    """The weights are those that the package gguf computes, with q and k in transformers' order."""
    model = tiny_causal_model("llama", tie_word_embeddings=True, **WIDE)
    path = write_gguf(tmp_path / "tiny.gguf", model, kind, embedding=Kind.Q8_0)
    found, _ = load(path)
    assert logits(model).isfinite().all()
    assert found.dtype == torch.float32
    expected = dict(model.named_parameters())
    got = dict(found.named_parameters())
    assert got.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in got.items())
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3_text"])
def test_each_architecture_computes_what_the_written_model_computes(tmp_path, name):
    """Names, transposed matrices, shifted norms, the rotary base: a wrong one would show."""
    changes = {"head_dim": 128} if name == "qwen3" else {}  # the reader knows no other
    model = tiny_causal_model(name, **changes)
    found, _ = load(write_gguf(tmp_path / "tiny.gguf", model, Kind.Q4_1, embedding=Kind.Q8_0))
    assert type(found) is type(model)
    assert not hasattr(found.config, "quantization_config")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


def test_the_folder_is_what_transformers_reads_from_the_file(tmp_path):
    """Tied head, Q4_1 and Q8_0 as in SmolLM2: logits and tokens of from_pretrained(gguf_file=)."""
    model = tiny_causal_model("llama", tie_word_embeddings=True)
    path = write_gguf(tmp_path / "tiny.gguf", model, Kind.Q4_1, embedding=Kind.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    found, tokenizer = load(path)
    assert torch.equal(logits(found), logits(theirs))
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    their_words = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "a charming journey . It was great <s> unseen 1234  words</s>"
    assert tokenizer(text)["input_ids"] == their_words(text)["input_ids"]
    assert tokenizer.chat_template == their_words.chat_template is not None
    assert tokenizer.model_max_length == 128


def test_plain_half_precision_stays_half(tmp_path):
    """A file of bfloat16 is not doubled: dtype auto is the file's own."""
    model = tiny_causal_model("qwen2")
    found, _ = load(write_gguf(tmp_path / "tiny.gguf", model, Kind.BF16))
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}


def test_a_folder_with_one_file_is_that_file_and_others_are_left_alone(tmp_path):
    """A tokenizer of another model that lies beside it changes nothing."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_causal_model("llama"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    found, _ = load(tmp_path)
    again, _ = load(path)
    assert found.gguf_sha256 == again.gguf_sha256 == gguf_files.gguf_sha256(path)
    write_gguf(tmp_path / "other.gguf", tiny_causal_model("llama"))
    with pytest.raises(InputError, match="has 2 GGUF files: name one"):
        load(tmp_path)


def test_llama_3_s_frequencies_are_taken_up(tmp_path):
    """transformers' reader drops rope_freqs.weight, and the model would compute something else."""
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_causal_model("llama", rope_parameters=rope)
    plain = 5000.0 ** -(torch.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() > 4  # else the test could not fail
    path = tmp_path / "tiny.gguf"
    with pytest.MonkeyPatch.context() as patch:
        before = gguf.GGUFWriter.write_header_to_file

        def with_divisors(writer):
            writer.add_tensor("rope_freqs.weight", divisors)
            before(writer)

        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_divisors)
        write_gguf(path, model)
    torch.testing.assert_close(logits(load(path)[0]), logits(model), rtol=1e-4, atol=1e-5)


def test_digits_are_taken_one_by_one_where_the_file_says_so(tmp_path, caplog):
    """SmolLM's text was split so; two line breaks before a digit are then one piece."""
    model = tiny_causal_model("llama")
    split = {}
    for pre in ("default", "smollm", "brand-new"):
        _, tokenizer = load(write_gguf(tmp_path / f"{pre}.gguf", model, pre=pre))
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")
        split[pre] = [piece for piece, _ in pieces]
    assert split["smollm"] == ["a", "ĊĊ", "1", "2"]
    assert split["default"] == split["brand-new"] == ["a", "Ċ", "Ċ", "12"]
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert sum("splits text by 'brand-new'" in line for line in told) == 1


def test_two_at_once_convert_once_and_leave_nothing_behind(tmp_path, monkeypatch, cache):
    """The second waits for the first, and finds the folder; both get a whole one."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_causal_model("llama"))
    times, convert = [], gguf_files._convert

    def counted(*args):
        times.append(1)
        convert(*args)

    monkeypatch.setattr(gguf_files, "_convert", counted)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(gguf_files.gguf_folder, [path, path])
    assert one == other
    assert len(times) == 1
    assert {entry.name for entry in cache.iterdir()} == {one.name, f"{one.name}.lock"}
    with safe_open(one / "model.safetensors", "pt") as file:
        assert "model.norm.weight" in file.keys()  # noqa: SIM118


def test_what_a_killed_conversion_left_is_cleared(tmp_path, cache):
    """A half-written folder has another name, and the next conversion begins anew."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_causal_model("llama"))
    left = cache / f".{gguf_files.gguf_sha256(path)}-v1" / "made"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    load(path)
    assert not left.parent.exists()


def refused(tmp_path, cache, message, **extra):
    path = tmp_path / "bad.gguf"
    write_gguf(path, extra.pop("model", tiny_causal_model("llama")), **extra)
    with pytest.raises(InputError, match=message):
        load(path)
    assert not list(cache.iterdir())


def test_an_unknown_architecture_is_named_before_anything_is_written(tmp_path, cache):
    """In one line, with the file's name."""
    extra = {"general.architecture": "brandnew"}
    refused(tmp_path, cache, r"bad\.gguf: GGUF model with architecture brandnew", **extra)


def test_an_unknown_block_type_is_named_before_anything_is_written(tmp_path, cache):
    """The number of a type that does not exist, in the place of F32, is found in the table."""
    path = write_gguf(tmp_path / "bad.gguf", tiny_causal_model("llama"))
    data = bytearray(path.read_bytes())
    name = b"output_norm.weight"
    at = data.index(name) + len(name) + 4 + 8  # one dimension
    data[at : at + 4] = (199).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"output_norm\.weight has the block type 199"):
        load(path)
    data[at : at + 4] = int(Kind.I32).to_bytes(4, "little")  # known, but no weights
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"output_norm\.weight has the block type I32"):
        load(path)
    assert not list(cache.iterdir())


def test_scaled_positions_that_the_reader_drops_are_refused(tmp_path, cache):
    """YaRN's scaling would be lost without a word."""
    extra = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    refused(tmp_path, cache, r"rotary positions are scaled \('yarn'\)", **extra)


def test_weights_that_the_reader_drops_are_refused(tmp_path):
    """Biases that the config cannot ask for: the model would be another one."""
    model = tiny_causal_model("llama", attention_bias=True)
    path = write_gguf(tmp_path / "bad.gguf", model)
    with pytest.raises(InputError, match=r"holds \d+ weights, and transformers' LlamaForCausalLM"):
        load(path)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    """transformers would make it anew, at random."""
    model = tiny_causal_model("llama")
    del model.model.norm.weight
    path = write_gguf(tmp_path / "bad.gguf", model)
    with pytest.raises(InputError, match=r"lacks model\.norm\.weight"):
        load(path)


def test_a_file_that_is_cut_off_is_refused_at_every_length(tmp_path, cache):
    """In the header and in the data, in one line."""
    path = write_gguf(tmp_path / "bad.gguf", tiny_causal_model("llama"), Kind.Q8_0)
    data = path.read_bytes()
    for length in (0, 3, 4, 9, 23, 24, 100, 5000, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"bad\.gguf is (no GGUF file|cut off)"):
            load(path)
    assert not list(cache.iterdir())


def test_without_the_package_gguf_the_line_says_how_to_get_it(tmp_path, monkeypatch):
    """The reader is optional."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_causal_model("llama"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'mezo-lm\[gguf\]'"):
        load(path)
