"""Single-sentence classification: SST-2, SST-5, TREC, Opinions."""

from mezo.tasks.formats import headless_sentences, headless_texts, label_first, trec
from mezo.tasks.task import Hub, Task

GLUE = "nyu-mll/glue"  # parquet
GLUE_AT = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"

# SST-2 (Stanford Sentiment Treebank, phrases of film reviews; GLUE)
# -> "that loves ... human nature It was" + " great"
SST2 = Task(
    name="sst2",
    version=1,
    source="arXiv:2305.17333, Tables 13 and 14",
    columns=("sentence",),
    labels=("0", "1"),
    prompt="{sentence} It was",
    candidates=(" terrible", " great"),  # the leading space is part of the token
    sfc_prompt="It was",
    mask_prompt="{sentence} It was {mask}.",
    verbalizers=("terrible", "great"),
    text="{sentence}",
    descriptions=("a terrible, awful, boring movie", "a great, wonderful, enjoyable movie"),
    hub=Hub(GLUE, "sst2", revision=GLUE_AT),
    shown={
        "sentence": "that loves its characters and communicates something rather beautiful about "
        "human nature ",
        "label": 1,
    },
)

# SST-5 (the same reviews' whole sentences, from very negative, 0, to very positive, 4)
# -> "a stirring , funny ... horror films It was" + " great"
SST5 = Task(
    name="sst5",
    version=1,
    source="arXiv:2305.17333, Table 13; the prompt for causal models is of this package",
    columns=("sentence",),
    labels=("0", "1", "2", "3", "4"),
    prompt="{sentence} It was",
    candidates=(" terrible", " bad", " okay", " good", " great"),
    sfc_prompt="It was",
    mask_prompt="{sentence} It was {mask}.",
    verbalizers=("terrible", "bad", "okay", "good", "great"),
    text="{sentence}",
    descriptions=(
        "a terrible, awful movie",
        "a bad, weak movie",
        "an okay, mediocre movie",
        "a good, pleasant movie",
        "a great, wonderful movie",
    ),
    hub=Hub(  # JSONL: text, label, label_text
        "SetFit/sst5", test="test", revision="e51bdcd8cd3a30da231967c1a249ba59361279a3"
    ),
    aliases={"sentence": ("text",)},
    files={
        "train": ("stsa.fine.train",),
        "dev": ("stsa.fine.dev",),
        "test": ("stsa.fine.test",),
    },
    readers={
        ".train": label_first,
        ".dev": label_first,
        ".test": label_first,
        ".csv": headless_sentences,
    },
    shown={
        "label": 4,
        "sentence": "a stirring , funny and finally transporting re-imagining of beauty and the "
        "beast and 1930s horror films",
    },
)

# TREC (what a question asks for; the coarse labels)
# -> "Question: How did serfdom develop in and then leave Russia ?\nAnswer type:" + " Description"
TREC = Task(
    name="trec",
    version=1,
    source="arXiv:2305.17333, Table 13; the prompt for causal models is of this package",
    columns=("text",),
    labels=("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"),
    prompt="Question: {text}\nAnswer type:",
    candidates=(" Description", " Entity", " Expression", " Human", " Location", " Number"),
    sfc_prompt="Answer type:",
    mask_prompt="{mask}: {text}",
    verbalizers=("Description", "Entity", "Expression", "Human", "Location", "Number"),
    text="{text}",
    descriptions=(
        "a definition, description, manner or reason",
        "a thing: an animal, a product, an event, a work",
        "an abbreviation or the expression that it stands for",
        "a person, a group of people, a title",
        "a place: a city, a country, a mountain",
        "a number: a count, a date, a distance, money",
    ),
    hub=Hub(  # JSONL: text, label (fine), label_coarse_original ("DESC"), and others
        "SetFit/TREC-QC",
        dev="",
        test="test",
        revision="0a34640b3cac3affef6f0abdfb81e3d0ecffcf92",
        columns={"label": "label_coarse_original"},
    ),
    label_aliases={"0": "DESC", "1": "ENTY", "2": "ABBR", "3": "HUM", "4": "LOC", "5": "NUM"},
    files={"train": ("train_5500.label",), "test": ("TREC_10.label",)},
    readers={".label": trec, ".csv": headless_texts},
    shown={"label": "DESC", "text": "How did serfdom develop in and then leave Russia ?"},
)

# Opinions (comes with the package, written for it: reviews of anything)
# -> "Couldn't see ... without one. It was" + " great"
OPINIONS = Task(
    name="opinions",
    version=1,
    source="this package",
    columns=("text",),
    labels=("negative", "positive"),
    prompt="{text} It was",
    candidates=(" terrible", " great"),
    sfc_prompt="It was",
    mask_prompt="{text} It was {mask}.",
    verbalizers=("terrible", "great"),
    text="{text}",
    descriptions=("negative", "positive"),
    folder="demo/opinions",
    shown={
        "label": "positive",
        "text": "Couldn't see the point of a rice cooker. Can't see the point of a kitchen without "
        "one.",
    },
)
