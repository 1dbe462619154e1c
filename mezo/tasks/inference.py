"""Does one sentence follow from another: SNLI, MNLI, RTE, CB.

For masked models the first sentence ends in a question mark instead of its last character, and
the second begins in lower case, as in LM-BFF, whose templates the paper takes.
"""

from dataclasses import replace

from mezo.tasks.classification import GLUE, GLUE_AT
from mezo.tasks.reading import read_tsv
from mezo.tasks.task import Hub, Task

SUPER_GLUE = "aps/super_glue"  # parquet; configurations are named after the tasks
SUPER_GLUE_AT = "3de24cf8022e94f4ee4b9d55a6f539891524d646"
PAIR = {"premise": ("sentence1",), "hypothesis": ("sentence2",), "label": ("gold_label",)}
MASK_PROMPT = "{premise:but_last}? {mask}, {hypothesis:lower_first}"
SUPPOSE = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'

# SNLI (a caption and a sentence about the same picture)
# -> 'Suppose Two women are ... packages . Can we infer that "The sisters ... lunch ."?
#    Yes, No, or Maybe?\n' + "Maybe"
# -> "Two women are ... packages ? [MASK], the sisters ... lunch ." with "Maybe"
SNLI = Task(
    name="snli",
    version=1,
    source="arXiv:2305.17333, Table 13; the prompt for causal models is that of CB in Table 14",
    columns=("premise", "hypothesis"),
    labels=("entailment", "neutral", "contradiction"),
    prompt=SUPPOSE,
    candidates=("Yes", "Maybe", "No"),  # they begin a line: no leading space
    mask_prompt=MASK_PROMPT,
    verbalizers=("Yes", "Maybe", "No"),
    hub=Hub(  # parquet
        "stanfordnlp/snli",
        revision="cdb5c3d5eed6ead6e5a341c8e56e669bb666725b",
        labels=("entailment", "neutral", "contradiction"),
    ),
    aliases=PAIR,
    unlabelled=("-", "-1"),  # annotators disagreed
    files={
        "train": ("snli_1.0_train.jsonl", "snli_1.0_train.txt"),
        "dev": ("snli_1.0_dev.jsonl", "snli_1.0_dev.txt"),
        "test": ("snli_1.0_dev.jsonl", "snli_1.0_dev.txt"),  # the paper's choice
    },
    readers={".txt": read_tsv},
    shown={
        "gold_label": "neutral",
        "sentence1": "Two women are embracing while holding to go packages.",
        "sentence2": "The sisters are hugging goodbye while holding to go packages after just "
        "eating lunch.",
    },
)

# MNLI (sentences of ten genres; GLUE). "mnli_mm" is tested on other genres than it is trained on.
# -> 'Suppose Conceptually cream ... geography. Can we infer that "Product ... work."?
#    Yes, No, or Maybe?\n' + "Maybe"
MNLI = replace(
    SNLI,
    name="mnli",
    hub=Hub(
        GLUE,
        "mnli",
        revision=GLUE_AT,
        dev="validation_matched",
        test="validation_matched",
        labels=("entailment", "neutral", "contradiction"),
    ),
    files={"dev": ("dev_matched.tsv",), "test": ("test_matched.tsv", "dev_matched.tsv")},
    readers={},
    shown={
        "sentence1": "Conceptually cream skimming has two basic dimensions - product and "
        "geography.",
        "sentence2": "Product and geography are what make cream skimming work. ",
        "gold_label": "neutral",
    },
)
MNLI_MM = replace(
    MNLI,
    name="mnli_mm",
    hub=Hub(
        GLUE,
        "mnli",
        revision=GLUE_AT,
        dev="validation_mismatched",
        test="validation_mismatched",
        labels=("entailment", "neutral", "contradiction"),
    ),
    files={
        "dev": ("dev_mismatched.tsv",),
        "test": ("test_mismatched.tsv", "dev_mismatched.tsv"),
    },
)

# RTE (news sentences; the same in GLUE and SuperGLUE)
# -> 'No Weapons ... Yet.\nDoes this mean that "Weapons ... Iraq." is true? Yes or No?\n' + "No"
# -> "No Weapons of Mass Destruction Found in Iraq Yet? [MASK], weapons ... Iraq." with "No"
RTE = Task(
    name="rte",
    version=1,
    source="arXiv:2305.17333, Tables 13 and 14",
    columns=("premise", "hypothesis"),
    labels=("entailment", "not_entailment"),
    prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    candidates=("Yes", "No"),
    mask_prompt=MASK_PROMPT,
    verbalizers=("Yes", "No"),
    hub=Hub(SUPER_GLUE, "rte", revision=SUPER_GLUE_AT, labels=("entailment", "not_entailment")),
    aliases=PAIR,
    shown={
        "premise": "No Weapons of Mass Destruction Found in Iraq Yet.",
        "hypothesis": "Weapons of Mass Destruction Found in Iraq.",
        "label": "not_entailment",
    },
)

# CB (CommitmentBank: does the speaker of a passage stand by a clause in it; SuperGLUE)
# -> 'Suppose It was ... peeled down. Can we infer that "the language was peeled down"?
#    Yes, No, or Maybe?\n' + "Yes"
CB = Task(
    name="cb",
    version=1,
    source="arXiv:2305.17333, Table 14",
    columns=("premise", "hypothesis"),
    labels=("entailment", "contradiction", "neutral"),
    prompt=SUPPOSE,
    candidates=("Yes", "No", "Maybe"),
    num_dev=100,
    hub=Hub(
        SUPER_GLUE, "cb", revision=SUPER_GLUE_AT, labels=("entailment", "contradiction", "neutral")
    ),
    shown={
        "premise": "It was a complex language. Not written down but handed down. One might say it "
        "was peeled down.",
        "hypothesis": "the language was peeled down",
        "label": "entailment",
    },
)
