"""What a Trainer says of a run after it: its model card, and what it loads of tied weights."""

import logging

import pytest
from huggingface_hub import ModelCard
from models import llama
from trainers import trainer_at

from mezo.trainers.checkpoints import untied

BEST = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
BEST |= {"load_best_model_at_end": True}


def test_the_card_names_mezo_and_how_its_log_rebuilds_the_model(tmp_path):
    """transformers' card said AdamW, whatever made the steps."""
    trainer = trainer_at(tmp_path)
    trainer.train()
    trainer.create_model_card(tags=["mine"])
    card = ModelCard.load(tmp_path / "README.md")
    assert {"mine", "mezo", "zeroth-order"} <= set(card.data.tags)
    assert "- optimizer: MeZO, rule=sgd, estimator=two_point, mezo_eps=0.001" in card.text
    assert "- lr_scheduler_type: " in card.text
    assert "adamw_torch" not in card.text
    assert "mezo replay --model BASE_MODEL --log run.mezo --output_dir tuned\n" in card.text


def test_the_card_of_the_best_weights_replays_up_to_them(tmp_path):
    """The weights beside the card are not those of the last step."""
    trainer = trainer_at(tmp_path)
    trainer.train()
    trainer.args.load_best_model_at_end, trainer.state.best_global_step = True, 2
    trainer.create_model_card()
    assert "--output_dir tuned --until 2\n" in (tmp_path / "README.md").read_text()


def test_a_tied_model_s_best_checkpoint_lacks_nothing(tmp_path, caplog):
    """transformers warned that lm_head.weight was missing at the end of every such run."""
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    trainer = trainer_at(tmp_path, model=model, **BEST)
    logger = logging.getLogger("transformers.trainer")
    logger.addHandler(caplog.handler)
    try:
        trainer.train()
    finally:
        logger.removeHandler(caplog.handler)
    assert trainer.state.best_model_checkpoint is not None
    assert "missing keys" not in caplog.text


@pytest.mark.parametrize("tied", [True, False])
def test_a_key_that_is_really_missing_is_still_named(tied):
    """Only what another name has loaded is left out of the warning."""
    model = llama()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    missing = ["lm_head.weight", "model.norm.weight"]
    assert untied(model, missing) == (missing[1:] if tied else missing)
