"""SuperGLUE without its inference tasks: BoolQ, WSC, WiC, MultiRC, COPA, ReCoRD. Causal models."""

from mezo.tasks.formats import copa_rows, multirc_rows, record_rows, wsc_rows
from mezo.tasks.inference import SUPER_GLUE, SUPER_GLUE_AT
from mezo.tasks.task import Hub, Task

# BoolQ (a yes/no question that people asked, and a passage of Wikipedia)
# -> "The Punisher (season 2) -- ... in 2019. Are they going to make a punisher season 2?\n" + "Yes"
BOOLQ = Task(
    name="boolq",
    version=1,
    source="arXiv:2305.17333, Table 14",
    columns=("passage", "question"),
    labels=("true", "false"),
    prompt="{passage} {question:asked}\n",
    candidates=("Yes", "No"),
    hub=Hub(  # parquet: question, answer (a boolean), passage
        "google/boolq", revision="35b264d03638db9f4ce671b711558bf7ff0f80d5"
    ),
    aliases={"label": ("answer",)},
    label_aliases={"1": "true", "0": "false"},
    shown={
        "question": "are they going to make a punisher season 2",
        "passage": "The Punisher (season 2) -- The season is set for release in 2019.",
        "label": True,
    },
)

# WSC (whom a pronoun means: the Winograd schemas)
# -> 'Mark told ... skeptical.\nIn the previous sentence, does the pronoun "he" refer to Mark?
#    Yes or No?\n' + "No"
WSC = Task(
    name="wsc",
    version=1,
    source="arXiv:2305.17333, Table 14",
    columns=("text", "span1_text", "span2_text"),
    labels=("false", "true"),
    prompt="{text:whole}\nIn the previous sentence, does the pronoun "
    '"{span2_text:lower}" refer to {span1_text}? Yes or No?\n',
    candidates=("No", "Yes"),
    hub=Hub(SUPER_GLUE, "wsc.fixed", revision=SUPER_GLUE_AT, labels=("false", "true")),
    rows=wsc_rows,
    shown={
        "text": "Mark told Pete many lies about himself, which Pete included in his book. He "
        "should have been more skeptical.",
        "target": {
            "span1_index": 0,
            "span1_text": "Mark",
            "span2_index": 13,
            "span2_text": "He",
        },
        "label": False,
    },
)

# WiC (does a word mean the same in two sentences)
# -> 'Does the word "place" have the same meaning in these two sentences? Yes, No?\nDo you ...
#    later?\nA political ... groups.\n' + "No"
WIC = Task(
    name="wic",
    version=1,
    source="arXiv:2305.17333, Table 14",
    columns=("word", "sentence1", "sentence2"),
    labels=("false", "true"),
    prompt='Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
    "{sentence1}\n{sentence2}\n",
    candidates=("No", "Yes"),
    hub=Hub(SUPER_GLUE, "wic", revision=SUPER_GLUE_AT, labels=("false", "true")),
    shown={
        "word": "place",
        "sentence1": "Do you want to come over to my place later?",
        "sentence2": "A political system with no place for the less prominent groups.",
        "label": False,
    },
)

# MultiRC (questions about a passage; each of several answers is right or wrong on its own)
# -> "Mike and Jeff ...\nQuestion: Roughly ... missing?\nI found this answer "Some". Is that
#    correct? Yes or No?\n" + "Yes". The passage shown is a part of it.
MULTIRC = Task(
    name="multirc",
    version=1,
    source="arXiv:2305.17333, Table 14",
    columns=("paragraph", "question", "answer"),
    labels=("0", "1"),
    prompt="{paragraph:whole}\nQuestion: {question:whole}\n"
    'I found this answer "{answer:whole}". Is that correct? Yes or No?\n',
    candidates=("No", "Yes"),
    hub=Hub(SUPER_GLUE, "multirc", revision=SUPER_GLUE_AT),
    label_aliases={"false": "0", "true": "1"},
    rows=multirc_rows,
    shown={
        "idx": 421,
        "passage": {
            "text": "Mike and Jeff are close friends. The box looks like it is missing some "
            "gumballs. It turns out some people are eating them when they place their guess. ",
            "questions": [
                {
                    "idx": 4749,
                    "question": "Roughly how many gumballs are missing?",
                    "answers": [{"text": "Some", "idx": 25276, "label": 1}],
                }
            ],
        },
    },
)

# COPA (which of two sentences is the cause, or the effect, of a third)
# -> "My body cast a shadow over the grass because" + " the sun was rising."
COPA = Task(
    name="copa",
    version=1,
    source="arXiv:2305.17333, Table 14",
    columns=("premise", "connective", "choice1", "choice2"),
    labels=("0", "1"),
    kind="multiple_choice",
    objective="tokens",
    prompt="{premise:unstopped} {connective}",
    candidates=(" {choice1:continued}", " {choice2:continued}"),
    sfc_prompt="{connective}",
    num_dev=100,
    hub=Hub(SUPER_GLUE, "copa", revision=SUPER_GLUE_AT),
    rows=copa_rows,
    shown={
        "premise": "My body cast a shadow over the grass.",
        "choice1": "The sun was rising.",
        "choice2": "The grass was cut.",
        "question": "cause",
        "label": 0,
    },
)

# ReCoRD (a news story, and a sentence of it without a name; candidates are the story's names)
# -> "Mariam has ... prison.\n- She fled ... husband.\n-" + " The baby ... but Mariam has refused."
# The story shown is shortened. As highlights of the story, of which the sentence is the next one.
RECORD = Task(
    name="record",
    version=1,
    source="arXiv:2305.17333, Table 14, in the form of the reference's code, as for GPT-3",
    columns=("passage", "query"),
    kind="multiple_choice",
    objective="tokens",
    prompt="{passage:listed}\n-",
    sfc_prompt="-",
    hub=Hub(SUPER_GLUE, "record", revision=SUPER_GLUE_AT),
    rows=record_rows,
    shown={
        "passage": {
            "text": "Mariam has been in Badam Bagh prison.\n@highlight\nShe fled her husband.",
            "entities": [{"start": 0, "end": 5}, {"start": 19, "end": 28}],
        },
        "qas": [
            {
                "query": "The baby she gave birth to is her husbands and he has even offered to "
                "have the courts set her free if she returns, but @placeholder has refused",
                "answers": [{"start": 0, "end": 5, "text": "Mariam"}],
            }
        ],
    },
)
