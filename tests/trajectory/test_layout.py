"""Which tensor of a file is which parameter: names that loading changes, ties, merges."""

import copy
import shutil

import pytest
import torch
import transformers
from checkpoints import base, loaded, same, tune, weights
from safetensors.torch import save_file

from mezo import MeZO, trajectory
from mezo.errors import InputError
from mezo.trajectory import replay_checkpoint

EMBEDDING = "model.decoder.embed_tokens.weight"


def rewritten(path, change):
    """The one file of a checkpoint with its dict of tensors changed.

    The tensors that were read are the file itself, mapped into memory; so the new one is written
    beside it.
    """
    save_file(change(weights(path)), path / "changed", {"format": "pt"})
    (path / "changed").replace(path / "model.safetensors")


def test_a_tied_tensor_that_is_stored_twice_is_replayed_twice(tmp_path):
    """Under both names, under the other name alone, and without the base model's prefix."""
    model = base(tmp_path / "base")
    tune(copy.deepcopy(model), tmp_path / "run.mezo")
    trajectory.replay(tmp_path / "run.mezo", model)
    expected, name = dict(model.named_parameters()), EMBEDDING
    changes = {
        "both": lambda t: t | {"lm_head.weight": t[name].clone()},
        "other": lambda t: {("lm_head.weight" if k == name else k): v for k, v in t.items()},
        "bare": lambda t: {k.removeprefix("model."): v for k, v in t.items()},
    }
    for case, change in changes.items():
        shutil.copytree(tmp_path / "base", tmp_path / case)
        rewritten(tmp_path / case, change)
        replay_checkpoint(tmp_path / "run.mezo", tmp_path / case, tmp_path / f"{case} out")
        found = weights(tmp_path / f"{case} out")
        assert found.keys() == weights(tmp_path / case).keys()
        again = loaded(tmp_path / f"{case} out", type(model))
        assert same(dict(again.named_parameters()), expected)
        if case == "both":
            assert torch.equal(found["lm_head.weight"], found[name])


def test_two_values_under_tied_names_are_two_tensors(tmp_path):
    """Loading does not tie them then, whatever the config says; the log has both, or one."""
    model = base(tmp_path / "base")
    rewritten(tmp_path / "base", lambda t: t | {"lm_head.weight": t[EMBEDDING] + 1})
    for case, keep in (("both", lambda name: True), ("one", lambda name: name == EMBEDDING)):
        untied = loaded(tmp_path / "base", type(model))
        assert "lm_head.weight" in dict(untied.named_parameters())
        log = tmp_path / f"{case}.mezo"
        tune(copy.deepcopy(untied), log, keep=keep)
        replay_checkpoint(log, tmp_path / "base", tmp_path / case)
        trajectory.replay(log, untied)
        again = loaded(tmp_path / case, type(model))
        assert same(dict(again.named_parameters()), dict(untied.named_parameters()))


def test_names_that_loading_changes_are_found(tmp_path):
    """BERT's old gamma and beta; a run of the model without its head on files with one."""
    model = base(tmp_path / "base", "bert")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def aged(tensors):
        for new, name in old.items():
            tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        return tensors

    rewritten(tmp_path / "base", aged)
    tune(copy.deepcopy(model), tmp_path / "run.mezo")
    replay_checkpoint(tmp_path / "run.mezo", tmp_path / "base", tmp_path / "out")
    assert any(name.endswith("gamma") for name in weights(tmp_path / "out"))
    trajectory.replay(tmp_path / "run.mezo", model)
    again = loaded(tmp_path / "out", type(model))
    assert same(dict(again.named_parameters()), dict(model.named_parameters()))
    headless = copy.deepcopy(model.bert)
    optimizer = MeZO(headless.named_parameters(), lr=1e-2, seed=3)
    shutil.copytree(tmp_path / "out", tmp_path / "second")
    with trajectory.record(optimizer, tmp_path / "headless.mezo", model=headless):
        optimizer.step(lambda: float(headless.embeddings.word_embeddings.weight.square().sum()))
    replay_checkpoint(tmp_path / "headless.mezo", tmp_path / "second", tmp_path / "third")
    again = loaded(tmp_path / "third", type(model)).bert
    assert same(dict(again.named_parameters()), dict(headless.named_parameters()))


def test_a_checkpoint_that_transformers_does_not_know_is_taken_by_its_keys(tmp_path, caplog):
    """No config.json; with frozen weights it says that these were not compared."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    for keep in (lambda name: True, lambda name: name.startswith("1")):
        twin = copy.deepcopy(model)
        named = [(name, p) for name, p in twin.named_parameters() if keep(name)]
        for name, p in twin.named_parameters():
            p.requires_grad_(keep(name))
        optimizer = MeZO(named, lr=1e-2, seed=3)
        with trajectory.record(optimizer, tmp_path / "run.mezo", model=twin):
            optimizer.step(lambda twin=twin: float(twin(torch.ones(3)).sum()))
        caplog.clear()
        replay_checkpoint(tmp_path / "run.mezo", tmp_path / "base", tmp_path / "out")
        assert same(weights(tmp_path / "out"), twin.state_dict())
        assert ("are not verified" in caplog.text) == (len(named) == 2)


def test_merged_experts_are_refused_and_what_is_not_merged_is_replayed(tmp_path, caplog):
    """Loading stacks the experts of a layer; the log's tensor is in no file."""
    config = transformers.MixtralConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_local_experts=4,
        vocab_size=50,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        model = transformers.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    tune(copy.deepcopy(model), tmp_path / "run.mezo", steps=1)
    with pytest.raises(
        InputError, match=r"no tensor for model\.layers\.0\.mlp\.experts.*by_tensor"
    ):
        replay_checkpoint(tmp_path / "run.mezo", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    log = tmp_path / "attention.mezo"
    tune(copy.deepcopy(model), log, keep=lambda name: "mlp.experts" not in name)
    replay_checkpoint(log, tmp_path / "base", tmp_path / "out")
    assert "are not verified" in caplog.text
    trajectory.replay(log, model)
    again = loaded(tmp_path / "out", type(model))
    assert same(dict(again.named_parameters()), dict(model.named_parameters()))
