"""Every task on a row as it is published: the exact prompts, candidates and what is right."""

import pytest
import tiny

from mezo import tasks
from mezo.errors import InputError
from mezo.objectives import form_for
from mezo.tasks import Task, custom_task, fill
from mezo.tasks.listing import models_of, shown_example

REVIEW = "that loves its characters and communicates something rather beautiful about human nature"
STIRRING = (
    "a stirring , funny and finally transporting re-imagining of beauty and the beast and 1930s "
    "horror films"
)
SERFDOM = "How did serfdom develop in and then leave Russia ?"
COOKER = "Couldn't see the point of a rice cooker. Can't see the point of a kitchen without one."
CREAM = "Conceptually cream skimming has two basic dimensions - product and geography"
CREAM_TWO = "roduct and geography are what make cream skimming work."
BABY = (
    "The baby she gave birth to is her husbands and he has even offered to have the courts set her "
    "free if she returns, but "
)
TESLA = (
    "On 7 January 1900, Tesla left Colorado Springs.[citation needed] His lab was torn down in "
    "1904, and its contents were sold two years later to satisfy a debt."
)
SCHOOLS = (
    "Between 2000 and 2009, school enrollment declined by 121,000 students, and the number of "
    "teachers increased by 15,000. The student:teacher ratio was the eighth lowest in the country, "
    "13:1. At $16,000, its per student spending was the nation's highest."
)
SENTIMENT = (" terrible", " bad", " okay", " good", " great")
KINDS_OF_ANSWER = (" Description", " Entity", " Expression", " Human", " Location", " Number")

# task -> prompt, candidates, the right one, what stands for the prompt in calibration
CAUSAL = {
    "opinions": (f"{COOKER} It was", (" terrible", " great"), 1, "It was"),
    "sst2": (f"{REVIEW} It was", (" terrible", " great"), 1, "It was"),
    "sst5": (f"{STIRRING} It was", SENTIMENT, 4, "It was"),
    "trec": (f"Question: {SERFDOM}\nAnswer type:", KINDS_OF_ANSWER, 0, "Answer type:"),
    "snli": (
        "Suppose Two women are embracing while holding to go packages. Can we infer that "
        '"The sisters are hugging goodbye while holding to go packages after just eating lunch."? '
        "Yes, No, or Maybe?\n",
        ("Yes", "Maybe", "No"),
        1,
        "",
    ),
    "mnli": (
        f'Suppose {CREAM}. Can we infer that "P{CREAM_TWO}"? Yes, No, or Maybe?\n',
        ("Yes", "Maybe", "No"),
        1,
        "",
    ),
    "rte": (
        "No Weapons of Mass Destruction Found in Iraq Yet.\nDoes this mean that "
        '"Weapons of Mass Destruction Found in Iraq." is true? Yes or No?\n',
        ("Yes", "No"),
        1,
        "",
    ),
    "cb": (
        "Suppose It was a complex language. Not written down but handed down. One might say it "
        'was peeled down. Can we infer that "the language was peeled down"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        0,
        "",
    ),
    "boolq": (
        "The Punisher (season 2) -- The season is set for release in 2019. Are they going to make "
        "a punisher season 2?\n",
        ("Yes", "No"),
        0,
        "",
    ),
    "wsc": (
        "Mark told Pete many lies about himself, which Pete included in his book. He should have "
        'been more skeptical.\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes '
        "or No?\n",
        ("No", "Yes"),
        0,
        "",
    ),
    "wic": (
        'Does the word "place" have the same meaning in these two sentences? Yes, No?\nDo you want '
        "to come over to my place later?\nA political system with no place for the less prominent "
        "groups.\n",
        ("No", "Yes"),
        0,
        "",
    ),
    "multirc": (  # the reference keeps the space at the end of the passage
        "Mike and Jeff are close friends. The box looks like it is missing some gumballs. It turns "
        "out some people are eating them when they place their guess. \nQuestion: Roughly how many "
        'gumballs are missing?\nI found this answer "Some". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        1,
        "",
    ),
    "copa": (
        "My body cast a shadow over the grass because",
        (" the sun was rising.", " the grass was cut."),
        0,
        "because",
    ),
    "record": (
        "Mariam has been in Badam Bagh prison.\n- She fled her husband.\n-",
        (f" {BABY}Badam Bagh has refused", f" {BABY}Mariam has refused"),
        1,
        "-",
    ),
}
CAUSAL["mnli_mm"] = CAUSAL["mnli"]

PAIRS = {  # text with the mask, verbalizers
    "opinions": (f"{COOKER} It was <mask>.", ("terrible", "great")),
    "sst2": (f"{REVIEW} It was <mask>.", ("terrible", "great")),
    "sst5": (f"{STIRRING} It was <mask>.", ("terrible", "bad", "okay", "good", "great")),
    "trec": (
        f"<mask>: {SERFDOM}",
        ("Description", "Entity", "Expression", "Human", "Location", "Number"),
    ),
    "snli": (
        "Two women are embracing while holding to go packages? <mask>, the sisters are hugging "
        "goodbye while holding to go packages after just eating lunch.",
        ("Yes", "Maybe", "No"),
    ),
    "mnli": (f"{CREAM}? <mask>, p{CREAM_TWO}", ("Yes", "Maybe", "No")),
    "rte": (
        "No Weapons of Mass Destruction Found in Iraq Yet? <mask>, weapons of Mass Destruction "
        "Found in Iraq.",
        ("Yes", "No"),
    ),
}
PAIRS["mnli_mm"] = PAIRS["mnli"]

GENERATION = {  # prompt, what is trained behind it, all right answers
    "squad": (
        f"Title: Nikola_Tesla\nContext: {TESLA}\nQuestion: When did Tesla depart from Colorado "
        "Springs?\nAnswer:",
        " 1900\n",
        ("1900", "On 7 January 1900", "7 January 1900"),
    ),
    "drop": (
        f"Passage: {SCHOOLS}\nQuestion: Was enrollment higher in 2000 or 2009?\nAnswer:",
        " 2000\n",
        ("2000",),
    ),
}
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
    tokenizer = tiny.byte_bpe()
    form = form_for(tiny.model("opt", len(tokenizer)), tokenizer, tasks.get(name))
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
    with pytest.raises(InputError, match=r"'upper' after the colon of \{text\} is none of whole"):
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
