"""What an engine reads for evaluations is what the model reads; the command line's refusals."""

import pytest
from models import tiny_model
from tiny_tokenizers import byte_bpe

from mezo import Generation, tasks
from mezo.cli import main as cli
from mezo.engines import THETA, TransformersEngine, vllm_engine
from mezo.engines.reading import EngineReader
from mezo.errors import InputError
from mezo.evaluation.evaluate import evaluate
from mezo.objectives import form_for
from mezo.tasks import Example, custom_task

WORDS = ["a", "charming", "journey", "no", "wit", "only", "labored", "gags", "the", "film"]
EXAMPLES = [
    Example({"sentence": " ".join(WORDS[i % 5 : i % 5 + 1 + 3 * i % 10])}, i % 2) for i in range(7)
]
TASKS = {
    "several tokens": custom_task("{sentence} It was", [" a terrible, awful movie", " great"]),
    "one token each": custom_task("{sentence} It was", [" a", " no"]),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_scores_are_those_of_the_model(name, calibrated):
    """Candidates with a row of their own, candidates that share one, and a constant subtracted."""
    model, tokenizer = tiny_model("opt"), byte_bpe()
    form = form_for(model, tokenizer, TASKS[name])
    form = form.calibrate(model) if calibrated else form
    reader = EngineReader(TransformersEngine(model, tokenizer))
    expected = evaluate(model, form, EXAMPLES)
    found = evaluate(model, form, EXAMPLES, batch_size=3, reader=reader)
    assert found.predictions == expected.predictions
    assert found.loss == pytest.approx(expected.loss, abs=1e-4)


def test_written_answers_are_those_of_the_model():
    model, tokenizer = tiny_model("opt", context=256), byte_bpe()
    form = form_for(model, tokenizer, tasks.get("squad"))
    fields = {"title": "wit", "context": "a charming film", "question": "what was it"}
    examples = [Example(fields, 0, "", answers=("a film",))]
    reader = EngineReader(TransformersEngine(model, tokenizer))
    expected, found = (evaluate(model, form, examples, reader=r) for r in (None, reader))
    assert found.predictions == expected.predictions
    assert found.loss == pytest.approx(expected.loss, abs=1e-4)


def test_a_form_that_no_engine_scores_is_refused():
    from tiny_tokenizers import word_piece

    model = tiny_model("bert")
    form = form_for(model, word_piece(), tasks.get("sst2"))
    reader = EngineReader(TransformersEngine(model, None))
    with pytest.raises(InputError, match="scores candidates of causal models"):
        evaluate(model, form, EXAMPLES, reader=reader)


def test_an_engine_of_transformers_asks_for_begin_before_it_moves():
    engine = TransformersEngine(tiny_model("llama"), byte_bpe())
    assert len(engine.texts([[1, 2]], [THETA], Generation(max_new_tokens=1))[0]) == 1
    with pytest.raises(InputError, match="begin"):
        engine.apply([])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["eval", "--model", "x", "--engine", "vllm"], "engine vllm needs vLLM"),
        (["eval", "--model", "x", "--engine", "sglang"], "engine must be one of transformers"),
        (["eval", "--model", "x", "--engine", "vllm", "--offload"], "offload"),
        (["train", "--model", "x", "--reward", "cat", "--engine", "vllm"], "needs vLLM"),
        (
            ["train", "--model", "x", "--reward", "cat", "--stop_forgotten", "1"],
            "--stop_forgotten needs texts: --held_out_file",
        ),
    ],
)
def test_an_engine_that_cannot_start_is_one_line(words, told, monkeypatch, capsys):
    """Before the model, which does not exist, is loaded."""
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    assert cli.main([*words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
