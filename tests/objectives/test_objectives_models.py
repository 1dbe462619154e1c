"""Any model with any kind of tokenizer: which tokens are scored, whichever side is padded."""

import pytest
import torch
from shared_prompts import SHARING, TOLERANCE, model_of
from tiny_tokenizers import byte_bpe, unigram, word_piece
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForMaskedLM

from mezo import tasks
from mezo.objectives import form_for
from mezo.tasks import Example, custom_task

TASK = custom_task("{sentence} It was", [" a terrible, awful movie", " great"])
TEXTS = ["a charming journey", "no wit , only labored gags and no wit", "dull"]
EXAMPLES = [Example({"sentence": text}, i % 2, f"row {i}") for i, text in enumerate(TEXTS)]
TOKENIZERS = {"bpe": byte_bpe, "unigram": unigram, "word piece": word_piece}
MASKED = {
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "albert": {"embedding_size": 8},
    "xlm-roberta": {},
    "electra": {"embedding_size": 8},
    "modernbert": {},
}


def plain_tokens(tokenizer, text):
    """Without the special tokens that some tokenizers put behind a text."""
    ids = tokenizer(text).input_ids
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("[SEP]")}
    return ids[:-1] if ids[-1] in ends and ids[-1] != tokenizer.unk_token_id else ids


def padded_on_the_right(model, tokenizer):
    """Cross-entropy over both candidates: transformers' usual batch, all logits, no positions."""
    rows, starts = [], []
    for example in EXAMPLES:
        prompt = f"{example.fields['sentence']} It was"
        starts += [len(plain_tokens(tokenizer, prompt))] * 2
        rows += [torch.tensor(plain_tokens(tokenizer, prompt + c)) for c in TASK.candidates]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    log_probs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1).detach()
    means = []
    for row, start, found in zip(rows, starts, log_probs, strict=True):
        places = torch.arange(start, len(row))
        means.append(found[places - 1, row[places]].mean())
    scores = torch.stack(means).view(len(EXAMPLES), 2)
    return torch.nn.functional.cross_entropy(scores, torch.tensor([e.label for e in EXAMPLES]))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "qwen2", *SHARING])
def test_the_loss_is_that_of_a_batch_padded_on_the_right(name, kind):
    """Whatever the tokenizer's own padding_side says."""
    model, losses = model_of(name), []
    for side in ("left", "right"):
        tokenizer = TOKENIZERS[kind]()
        tokenizer.padding_side = side
        form = form_for(model, tokenizer, TASK)
        losses.append(form.loss(model, form.collate([form.encode(e) for e in EXAMPLES])))
    assert losses[0] == losses[1]
    expected = padded_on_the_right(model, TOKENIZERS[kind]())
    assert abs(losses[0].item() - expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", MASKED)
def test_masked_models_are_asked_at_the_mask_alone(name):
    """Padded or not; and with their own heads."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 32, "vocab_size": 120, "pad_token_id": 0}
    small |= {"max_position_embeddings": 65, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        config = AutoConfig.for_model(name, **(small | MASKED[name]))
        model = AutoModelForMaskedLM.from_config(config).double().eval()
    tokenizer = word_piece()
    form = form_for(model, tokenizer, tasks.get("sst2"))
    batch, made = form.collate([form.encode(e) for e in EXAMPLES]), []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: made.append(out.shape[:-1].numel())
    )
    found = form.scores(model, batch).detach()
    hook.remove()
    assert made == [len(EXAMPLES)]
    words = tokenizer.convert_tokens_to_ids(["terrible", "great"])
    for example, row in zip(EXAMPLES, found, strict=True):
        ids = tokenizer(form.texts(example)[0], return_tensors="pt").input_ids
        place = (ids[0] == tokenizer.mask_token_id).nonzero().item()
        expected = model(input_ids=ids).logits[0, place, words].detach()
        scale = max(1.0, expected.abs().max().item())
        assert (row - expected).abs().max() <= TOLERANCE[torch.float64] * scale
