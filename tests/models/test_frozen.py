"""Skipping frozen lower layers changes the work, and nothing else."""

import pytest
import torch
from models import tiny_model
from peft import LoraConfig, get_peft_model
from tiny_tokenizers import byte_bpe, unigram, word_piece
from transformers import AlbertConfig, AlbertModel, BloomConfig, BloomForCausalLM

from mezo import MeZO
from mezo.errors import InputError
from mezo.models.frozen import FrozenLower
from mezo.models.modes import evaluating
from mezo.objectives import form_for
from mezo.tasks import Example, custom_task

TASK = custom_task("{text} It was", [" terrible", " great"])
TEXTS = ("a charming journey .", "no wit , only labored gags", "dull", "the film of the year")
EXAMPLES = [Example({"text": text}, i % 2) for i, text in enumerate(TEXTS)]
CAUSAL = {"opt": byte_bpe, "llama": unigram, "gpt2": byte_bpe}  # padded on the left
KINDS = CAUSAL | {"bert": word_piece, "encoder": word_piece}  # padded on the right
# float64: a pass rounds by about depth * width * 2^-53 ~ 1e-14 of scores of size 10; a wrong
# position or mask moves them by more than 1e-3
ATOL = 1e-11


def made(kind):
    """A model of two layers, a padded batch of texts of unlike length, and their form."""
    tokenizer = KINDS[kind]()
    model = tiny_model(kind, len(tokenizer))
    form = form_for(model, tokenizer, TASK)
    return model, form, form.collate([form.encode(example) for example in EXAMPLES])


def calls_of(module, monkeypatch):
    """The rows of every call of a layer's own forward, from now on."""
    rows, own = [], type(module).forward

    def counted(self, hidden_states, *args, **kwargs):
        if self is module:
            rows.append(len(hidden_states))
        return own(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(module), "forward", counted)
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_plain_forward(kind):
    """Whatever the side of the padding and the kind of positions; the second call is cached."""
    model, form, batch = made(kind)
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        plain = form.scores(model, batch)
        with FrozenLower(model, 1):
            for _ in range(2):
                torch.testing.assert_close(form.scores(model, batch), plain, atol=ATOL, rtol=0)
        assert torch.equal(form.scores(model, batch), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_upper_layers_are_trained_as_without_the_cache(kind):
    """Three steps of MeZO move the same weights to the same place, and no others."""
    found = []
    for skip in (True, False):
        model, form, batch = made(kind)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        frozen = FrozenLower(model, 1)
        optimizer = MeZO(model.named_parameters(), lr=1e-3, seed=1)
        closure = lambda: form.loss(model, batch)  # noqa: B023, E731
        if skip:
            with frozen:
                losses = [optimizer.step(closure) for _ in range(3)]
        else:
            losses = [optimizer.step(closure) for _ in range(3)]
        found.append((losses, dict(model.named_parameters())))
    moved = {name for name, p in before.items() if not torch.equal(p, found[0][1][name])}
    assert moved == {name for name, p in found[0][1].items() if p.requires_grad}
    assert moved
    for name, p in found[1][1].items():
        # losses are float32: projected_grad is off by 2^-24 loss / eps ~ 1e-4, times lr, 3 steps
        torch.testing.assert_close(found[0][1][name], p, atol=3e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_enters_the_cache_is_frozen(kind):
    """GPT-2's embeddings are called wte: what is below is what runs before, not a name."""
    model, form, batch = made(kind)
    FrozenLower(model, 1)
    entered = []
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    stack[1].register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    with torch.no_grad():
        form.scores(model, batch)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
        form.scores(model, batch)
    assert torch.equal(*entered)


def test_lower_layers_run_once_a_text(monkeypatch):
    """And alone: a text's states must not depend on what it is batched with."""
    model, form, batch = made("llama")
    rows = calls_of(model.model.layers[0], monkeypatch)
    with torch.no_grad(), FrozenLower(model, 1):
        form.scores(model, batch)
        first = list(rows)
        for _ in range(3):
            form.scores(model, batch)
        reordered = form.collate([form.encode(example) for example in reversed(EXAMPLES)])
        form.scores(model, reordered)
    # freezing; the texts; the comparison of the first call
    assert first == [1] + [1] * len(EXAMPLES) + [len(batch["input_ids"])]
    assert rows == first


def test_states_do_not_depend_on_the_batch():
    """Bitwise: the same text in another batch, padded differently, enters as the same states."""
    model, form, batch = made("opt")
    entered = []
    with torch.no_grad(), FrozenLower(model, 1) as frozen:
        for examples in (EXAMPLES, EXAMPLES[:1], EXAMPLES[2:] + EXAMPLES[:1]):
            batch = form.collate([form.encode(example) for example in examples])
            row = 0 if examples[0] is EXAMPLES[0] else -1
            form.scores(model, batch)
            ids, mask = batch["input_ids"], batch["attention_mask"].bool()
            states = frozen._enter(ids, mask, {"position_ids": mask.cumsum(-1).sub(1).clamp(min=0)})
            entered.append(states[row][mask[row]])
    assert torch.equal(entered[0], entered[1])
    assert torch.equal(entered[0], entered[2])


def test_leaving_restores_every_forward_and_hook():
    """Even by an exception; and what another library had put in a layer's place."""
    model, form, batch = made("llama")
    layer = model.model.layers[0]
    with pytest.raises(ZeroDivisionError), FrozenLower(model, 1):
        _ = 1 / len(form.scores(model, batch)[:0])
    assert "forward" not in layer.__dict__
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    own = layer.forward = layer.forward
    with FrozenLower(model, 1):
        assert layer.forward is not own
    assert layer.forward is own


def test_a_call_that_raises_leaves_no_states_behind():
    """Else the next call of an inner module would answer for the batch before."""
    model, form, batch = made("llama")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        plain = model.model(**inputs).last_hidden_state
        with FrozenLower(model, 1):
            form.scores(model, batch)
            handle = model.lm_head.register_forward_pre_hook(lambda *call: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                form.scores(model, batch)
            handle.remove()
            assert torch.equal(model.model(**inputs).last_hidden_state, plain)


def test_left_padding_without_positions_is_refused():
    """GPT-2 would count the padding, the states of a text alone do not."""
    model, _, batch = made("gpt2")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with FrozenLower(model, 1), pytest.raises(InputError, match="pass position_ids"):
        model(**inputs)


@pytest.mark.parametrize("shift", [0, 5])
def test_positions_are_those_that_the_call_gives(shift):
    """The same text at other positions is another text."""
    model, _, batch = made("gpt2")
    mask = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(**inputs, position_ids=positions + shift).logits
        with FrozenLower(model, 1):
            model(**inputs, position_ids=positions)
            found = model(**inputs, position_ids=positions + shift).logits
    torch.testing.assert_close(found[mask == 1], plain[mask == 1], atol=ATOL, rtol=0)


def test_token_types_are_part_of_the_text():
    model, _, batch = made("encoder")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    kinds, keep = torch.ones_like(inputs["input_ids"]), inputs["attention_mask"] == 1
    with torch.no_grad():
        plain = model(**inputs, token_type_ids=kinds).last_hidden_state
        with FrozenLower(model, 1):
            model(**inputs)
            found = model(**inputs, token_type_ids=kinds).last_hidden_state
    torch.testing.assert_close(found[keep], plain[keep], atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": None}, "needs input_ids and their attention_mask"),
        ({"output_hidden_states": True}, "does not take output_hidden_states"),
        ({"past_key_values": ()}, "does not take past_key_values"),
    ],
)
def test_calls_that_cannot_be_answered_are_refused(change, message):
    model, _, batch = made("llama")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with FrozenLower(model, 1), pytest.raises(InputError, match=message):
        model(**(inputs | {"position_ids": positions} | change))


def albert():
    shape = {"hidden_size": 16, "embedding_size": 8, "num_attention_heads": 2}
    depth = {"num_hidden_layers": 4, "num_hidden_groups": 2, "intermediate_size": 32}
    return AlbertModel(AlbertConfig(vocab_size=50, **shape, **depth)).eval()


def test_models_that_do_not_fit_are_refused():
    """Shared layers, layers that pass on more than states, too few layers."""
    with pytest.raises(InputError, match="does not run its layers once, in order"):
        FrozenLower(albert(), 1)
    with pytest.raises(InputError, match=r"model.layers has 2 layers, 2 cannot be frozen"):
        FrozenLower(made("llama")[0], 2)
    with pytest.raises(InputError, match="has no list of layers"):
        FrozenLower(torch.nn.Linear(2, 2), 1)
    shape = {"hidden_size": 16, "n_layer": 2, "n_head": 2}
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, **shape)).eval()
    ids = torch.ones(2, 3, dtype=torch.long)
    with FrozenLower(bloom, 1), pytest.raises(InputError, match="passes on a tuple"):
        bloom(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_a_model_whose_output_would_differ_is_refused():
    """The first call compares: here the upper layer depends on the size of the batch."""
    model = made("llama")[0]
    model.config.use_cache = False
    ids = torch.ones(2, 3, dtype=torch.long)

    class Odd(type(model.model.layers[0])):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) * len(hidden_states)

    model.model.layers[0].__class__ = Odd
    model.model.layers[1].__class__ = Odd
    with FrozenLower(model, 1), pytest.raises(InputError, match="cannot skip lower layers"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_an_adapter_s_lower_half_is_frozen_too():
    """LoRA inside peft's wrapper: names and calls go through it."""
    model, form, batch = made("opt")
    adapter = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    model = get_peft_model(model, adapter).eval()
    with evaluating(model):
        plain = form.scores(model, batch)
    with FrozenLower(model, 1), evaluating(model):
        torch.testing.assert_close(form.scores(model, batch), plain, atol=1e-5, rtol=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".layers.1." in name and "lora_" in name for name in trained)


def test_frozen_layers_are_in_evaluation_mode():
    """Kept states with dropout would be one draw of it, for ever."""
    model, form, batch = made("bert")
    with torch.no_grad(), FrozenLower(model, 1):
        expected = form.scores(model, batch)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    with torch.no_grad(), FrozenLower(model, 1):
        model.train()
        model.bert.encoder.layer[1].eval()
        torch.testing.assert_close(form.scores(model, batch), expected, atol=ATOL, rtol=0)
        assert model.bert.encoder.layer[0].training
