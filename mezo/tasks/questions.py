"""Questions whose answer the model writes: SQuAD and DROP. Causal models.

As in the reference, the model writes greedily, at most 50 tokens, up to the end of the line. It is
trained on the first of the answers and the line break after it.
"""

from mezo.tasks.formats import drop, drop_rows, squad, squad_rows
from mezo.tasks.task import Hub, Task

# SQuAD v1.1 (a span of a paragraph of Wikipedia)
# -> "Title: Nikola_Tesla\nContext: On 7 January ... debt.\nQuestion: When ... Springs?\nAnswer:"
#    + " 1900\n"
SQUAD = Task(
    name="squad",
    version=1,
    source="arXiv:2305.17333, Table 14",
    columns=("title", "context", "question"),
    kind="generation",
    objective="tokens",
    metric="f1",
    prompt="Title: {title:whole}\nContext: {context:whole}\nQuestion: {question}\nAnswer:",
    completion=" {answer:whole}\n",
    max_new_tokens=50,
    stop=("\n",),
    hub=Hub(  # parquet: title, context, question, answers {text, answer_start}
        "rajpurkar/squad", revision="7b6d24c440a36b6815f21b70d25016731768db1f"
    ),
    files={
        "train": ("train-v1.1*.json",),
        "dev": ("dev-v1.1*.json",),
        "test": ("dev-v1.1*.json",),
    },
    readers={".json": squad},
    rows=squad_rows,
    shown={
        "title": "Nikola_Tesla",
        "context": "On 7 January 1900, Tesla left Colorado Springs.[citation needed] His lab was "
        "torn down in 1904, and its contents were sold two years later to satisfy a debt.",
        "question": "When did Tesla depart from Colorado Springs?",
        "answers": [
            {"text": "1900", "answer_start": 13},
            {"text": "On 7 January 1900", "answer_start": 0},
            {"text": "7 January 1900", "answer_start": 3},
        ],
    },
)

# DROP (counting, comparing, adding over a paragraph; answers are numbers, dates or spans)
# -> "Passage: Between 2000 ... highest.\nQuestion: Was ... 2009?\nAnswer:" + " 2000\n"
DROP = Task(
    name="drop",
    version=1,
    source="arXiv:2305.17333, Table 14",
    columns=("passage", "question"),
    kind="generation",
    objective="tokens",
    metric="f1",
    prompt="Passage: {passage:whole}\nQuestion: {question}\nAnswer:",
    completion=" {answer:whole}\n",
    max_new_tokens=50,
    stop=("\n",),
    hub=Hub(  # parquet: passage, question, answers_spans {spans, types}
        "ucinlp/drop", revision="95cda593fae71b60b5b19f82de3fcf3298c1239c"
    ),
    files={
        "train": ("drop_dataset_train.json",),
        "dev": ("drop_dataset_dev.json", "drop_v0_dev.jsonl.gz"),
        "test": ("drop_dataset_dev.json", "drop_v0_dev.jsonl.gz"),
    },
    readers={".json": drop},
    rows=drop_rows,
    shown={
        "passage": "Between 2000 and 2009, school enrollment declined by 121,000 students, and "
        "the number of teachers increased by 15,000. The student:teacher ratio was the eighth "
        "lowest in the country, 13:1. At $16,000, its per student spending was the nation's "
        "highest.",
        "question": "Was enrollment higher in 2000 or 2009?",
        "answer": {"number": "2000", "date": {"day": "", "month": "", "year": ""}, "spans": []},
        "validated_answers": [],
    },
)
