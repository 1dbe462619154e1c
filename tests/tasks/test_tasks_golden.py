"""Every task on a row as it is published: the exact prompts, candidates and what is right."""

import pytest
from golden_prompts import CAUSAL, COOKER, GENERATION, PAIRS, REVIEW, SERFDOM, STIRRING
from models import tiny_model
from tiny_tokenizers import byte_bpe

from mezo import tasks
from mezo.errors import InputError
from mezo.objectives import form_for
from mezo.tasks import Task, custom_task, fill
from mezo.tasks.listing import models_of, shown_example

ENCODED = {"opinions": COOKER, "sst2": REVIEW, "sst5": STIRRING, "trec": SERFDOM}


def test_there_is_a_golden_case_for_every_task_and_kind_of_model():
    for name, task in tasks.TASKS.items():
        golden = {"causal": {**CAUSAL, **GENERATION}, "masked": PAIRS, "encoder": ENCODED}
        assert models_of(task) == tuple(kind for kind, cases in golden.items() if name in cases)


@pytest.mark.parametrize("name", CAUSAL)
def test_prompt_and_candidates_for_causal_models(name):
    prompt, candidates, right, calibration = CAUSAL[name]
    task = tasks.get(name)
    example = shown_example(task)
    assert fill(task.prompt, example.fields) == prompt
    assert task.candidates_of(example) == candidates
    assert task.completion_of(example) == candidates[right]
    assert fill(task.sfc_prompt, example.fields) == calibration
    assert [example.is_right(i) for i in range(len(candidates))] == [
        i == right for i in range(len(candidates))
    ]


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "record"])
def test_what_a_causal_model_reads(name):
    """Through the form: prompt and candidate side by side, nothing between them."""
    tokenizer = byte_bpe()
    form = form_for(tiny_model("opt", len(tokenizer)), tokenizer, tasks.get(name))
    prompt, candidates, _, _ = CAUSAL[name]
    assert form.texts(shown_example(form.task)) == [prompt + text for text in candidates]


@pytest.mark.parametrize("name", PAIRS)
def test_text_and_verbalizers_for_masked_models(name):
    text, words = PAIRS[name]
    task = tasks.get(name)
    example = shown_example(task)
    assert fill(task.mask_prompt, {**example.fields, "mask": "<mask>"}) == text
    assert task.verbalizers == words
    assert words[example.label] == CAUSAL[name][1][CAUSAL[name][2]].strip()


@pytest.mark.parametrize("name", GENERATION)
def test_prompt_and_answers_of_generation(name):
    """Greedy, 50 tokens, to the end of the line, as in the reference."""
    prompt, completion, answers = GENERATION[name]
    task = tasks.get(name)
    example = shown_example(task)
    assert fill(task.prompt, example.fields) == prompt
    assert task.completion_of(example) == completion
    assert example.answers == answers
    assert (example.label, task.candidates_of(example)) == (-1, ())
    assert (task.metric, task.max_new_tokens, task.stop) == ("f1", 50, ("\n",))


@pytest.mark.parametrize("name", ENCODED)
def test_text_for_encoders(name):
    task = tasks.get(name)
    assert fill(task.text, shown_example(task).fields) == ENCODED[name]
    assert len(task.descriptions) == len(task.labels)


def test_the_papers_loss_of_each_task():
    """mezo.sh: all options as classes, but for COPA, ReCoRD, SQuAD and DROP."""
    on_tokens = {name for name, task in tasks.TASKS.items() if task.objective == "tokens"}
    assert on_tokens == {"copa", "record", "squad", "drop"}
    assert {name for name, task in tasks.TASKS.items() if task.num_dev == 100} == {"cb", "copa"}


@pytest.mark.parametrize(
    ("how", "value", "written"),
    [
        ("", " a ", "a"),
        (":whole", " a ", " a "),
        (":lower", "He ", "he"),
        (":lower_first", "The BBC", "the BBC"),
        (":lower_first", "", ""),
        (":but_last", "It is. ", "It is"),
        (":unstopped", "It is. ", "It is"),
        (":unstopped", "Is it?", "Is it?"),
        (":continued", "The TV was on.", "the TV was on."),
        (":continued", "I slept.", "I slept."),
        (":continued", "Stop", "stop"),
        (":asked", "is it", "Is it?"),
        (":asked", "Is it?", "Is it?"),
        (":listed", "a\n@highlight\nb", "a\n- b"),
    ],
)
def test_how_a_value_is_written(how, value, written):
    assert fill(f"<{{text{how}}}>", {"text": value}) == f"<{written}>"


def test_an_unknown_way_to_write_a_value_is_refused():
    with pytest.raises(
        InputError, match=r"'upper' after the colon of \{text\} is not one of whole"
    ):
        custom_task("{text:upper}", [" a", " b"])


def test_a_task_of_no_known_kind_or_metric_is_refused():
    fine = {"name": "t", "version": 1, "source": "", "columns": ("text",)}
    with pytest.raises(InputError, match=r"kind must be classification, .*, got 'ranking'"):
        Task(**fine, kind="ranking")
    with pytest.raises(InputError, match=r"metric must be accuracy, .*, got 'bleu'"):
        Task(**fine, labels=("0", "1"), metric="bleu")
    with pytest.raises(InputError, match="needs completion and max_new_tokens"):
        Task(**fine, kind="generation", prompt="{text}")
    with pytest.raises(InputError, match="two or more distinct labels"):
        Task(**fine)
