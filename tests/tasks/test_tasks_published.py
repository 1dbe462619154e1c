"""Folders as the data sets are published, each in miniature."""

import gzip
import json

import pytest

from mezo import tasks
from mezo.errors import InputError
from mezo.tasks import Example, load_examples


def put(folder, name, *lines, encoding="utf-8"):
    """A file of these lines; what is no string is written as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_bytes("".join(text + "\n" for text in texts).encode(encoding))
    return folder


def load(name, split, folder):
    return load_examples(tasks.get(name), split, data_dir=folder)


def told(name, split, folder):
    with pytest.raises(InputError) as error:
        load(name, split, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def pair(premise, hypothesis, label):
    return Example({"premise": premise, "hypothesis": hypothesis}, label)


MNLI_HEADER = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\t"
)


def test_rte_of_glue(tmp_path):
    """index, sentence1, sentence2, label; the test set has no label, and dev takes its place."""
    put(tmp_path, "train.tsv", "index\tsentence1\tsentence2\tlabel", '0\tA "b.\tC.\tentailment')
    put(tmp_path, "dev.tsv", "index\tsentence1\tsentence2\tlabel", "0\tD.\tE.\tnot_entailment")
    put(tmp_path, "test.tsv", "index\tsentence1\tsentence2", "0\tF.\tG.")
    assert load("rte", "train", tmp_path) == [pair('A "b.', "C.", 0)]
    assert load("rte", "test", tmp_path) == load("rte", "dev", tmp_path) == [pair("D.", "E.", 1)]


def test_mnli_of_glue_matched_and_mismatched(tmp_path):
    header = MNLI_HEADER + "label1\tgold_label"
    five = MNLI_HEADER + "\t".join(f"label{i}" for i in range(1, 6)) + "\tgold_label"
    row = "0\t1\t1n\tfiction\t( a )\t( b )\t(ROOT)\t(ROOT)\t{0}.\tWhat follows.\t"
    put(tmp_path, "train.tsv", header, row.format("Train") + "neutral\tneutral")
    for name in ("matched", "mismatched"):
        labels = "\t".join(["contradiction"] * 6)
        put(tmp_path, f"dev_{name}.tsv", five, row.format(name) + labels)
        put(tmp_path, f"test_{name}.tsv", MNLI_HEADER[:-1], row.format("Test")[:-1])
    assert load("mnli", "train", tmp_path) == [pair("Train.", "What follows.", 1)]
    assert load("mnli", "dev", tmp_path) == [pair("matched.", "What follows.", 2)]
    assert load("mnli", "test", tmp_path) == [pair("matched.", "What follows.", 2)]
    assert load("mnli_mm", "test", tmp_path) == [pair("mismatched.", "What follows.", 2)]


SNLI_ROWS = [
    {"gold_label": "-", "sentence1": "A.", "sentence2": "B.", "annotator_labels": ["neutral"]},
    {"gold_label": "entailment", "sentence1": "C.", "sentence2": "D.", "pairID": "3.jpg#0"},
]


def test_snli_as_published_leaves_out_rows_without_a_label(tmp_path):
    """The paper tests on the dev set, also where there is a test set with labels."""
    put(tmp_path, "snli_1.0_train.jsonl", *SNLI_ROWS)
    put(tmp_path, "snli_1.0_dev.txt", "gold_label\tsentence1\tsentence2", "neutral\tE.\tF.")
    put(tmp_path, "snli_1.0_test.txt", "gold_label\tsentence1\tsentence2", "neutral\tG.\tH.")
    assert load("snli", "train", tmp_path) == [pair("C.", "D.", 0)]
    assert load("snli", "train", tmp_path)[0].origin == "snli_1.0_train.jsonl row 2"
    assert load("snli", "test", tmp_path) == [pair("E.", "F.", 1)]


def test_few_shot_folders(tmp_path):
    """The reference writes TSV with, CSV without a header; SST-5's label comes first."""
    put(tmp_path, "train.tsv", "index\tsentence1\tsentence2\tgold_label", "7\tA.\tB.\tneutral")
    put(
        tmp_path,
        "test_matched.tsv",
        "index\tsentence1\tsentence2\tgold_label",
        "7\tA.\tB.\tneutral",
    )
    assert load("snli", "train", tmp_path) == load("mnli", "test", tmp_path)
    (tmp_path / "csv").mkdir()
    put(tmp_path / "csv", "train.csv", '3,"what \'s , you know ""so"""', "0,dull")
    first, second = load("sst5", "train", tmp_path / "csv")
    assert (first.fields, first.label) == ({"sentence": 'what \'s , you know "so"'}, 3)
    assert (first.origin, second.origin) == ("train.csv row 1", "train.csv row 2")
    put(tmp_path / "csv", "test.csv", "2,What is BPH ?")
    assert load("trec", "test", tmp_path / "csv") == [Example({"text": "What is BPH ?"}, 2)]
    put(tmp_path / "csv", "dev.csv", "sentence,label", "fine,4")
    assert load("sst5", "dev", tmp_path / "csv") == [Example({"sentence": "fine"}, 4)]


def test_sst5_as_text_with_its_brackets(tmp_path):
    put(tmp_path, "stsa.fine.train", "4 a film -lrb- so called -rrb- .", "", "0 dull crème")
    train = load("sst5", "train", tmp_path)
    assert train == [
        Example({"sentence": "a film ( so called ) ."}, 4),
        Example({"sentence": "dull crème"}, 0),
    ]
    assert train[1].origin == "stsa.fine.train row 3"
    put(tmp_path, "stsa.fine.dev", "4")
    assert told("sst5", "dev", tmp_path) == (
        "stsa.fine.dev row 1 is not a label, a space and a sentence"
    )
    put(tmp_path, "stsa.fine.test", "1 fine", "5 no such label")
    assert "stsa.fine.test row 2: label '5' is not one of 0, 1" in told("sst5", "test", tmp_path)


def test_trec_is_latin_1(tmp_path):
    lines = ["DESC:manner How did serfdom develop ?", "LOC:other Where is Café Zébu ?"]
    put(tmp_path, "train_5500.label", *lines, encoding="latin-1")
    assert load("trec", "train", tmp_path) == [
        Example({"text": "How did serfdom develop ?"}, 0),
        Example({"text": "Where is Café Zébu ?"}, 4),
    ]
    put(tmp_path, "TREC_10.label", "DESC How ?")
    assert "TREC_10.label row 1 is not LABEL:fine" in told("trec", "test", tmp_path)


def test_superglue_tables(tmp_path):
    """RTE, CB, BoolQ, WiC, COPA: one JSON object a line; test.jsonl has no labels."""
    put(tmp_path, "train.jsonl", {"premise": "A.", "hypothesis": "B.", "label": "contradiction"})
    assert load("cb", "train", tmp_path) == [pair("A.", "B.", 1)]
    put(tmp_path, "train.jsonl", {"premise": "A.", "hypothesis": "B.", "label": "not_entailment"})
    assert load("rte", "train", tmp_path) == [pair("A.", "B.", 1)]
    put(tmp_path, "val.jsonl", {"question": "is it", "passage": "It is.", "label": True, "idx": 0})
    put(tmp_path, "test.jsonl", {"question": "is it", "passage": "It is.", "idx": 0})
    (example,) = load("boolq", "test", tmp_path)
    assert example == Example({"passage": "It is.", "question": "is it"}, 0)
    assert example.origin == "val.jsonl row 1"
    wic = {"word": "place", "sentence1": "A.", "sentence2": "B.", "start1": 0, "version": 1.1}
    put(tmp_path, "val.jsonl", wic | {"label": True})
    fields = {"word": "place", "sentence1": "A.", "sentence2": "B."}
    assert load("wic", "dev", tmp_path) == [Example(fields, 1)]


def test_copa_joins_by_the_question(tmp_path):
    row = {"premise": "P.", "choice1": "A.", "choice2": "B.", "label": 1, "idx": 0}
    put(tmp_path, "train.jsonl", row | {"question": "cause"}, row | {"question": "effect"})
    examples = load("copa", "train", tmp_path)
    assert [e.fields["connective"] for e in examples] == ["because", "so"]
    assert examples[0].label == 1
    put(tmp_path, "val.jsonl", row | {"question": "why"})
    assert told("copa", "dev", tmp_path) == (
        "val.jsonl row 1: question must be cause or effect, got 'why'"
    )


def wsc(text, **target):
    index = {"span1_index": 0, "span2_index": 1}
    return {"text": text, "target": index | target, "label": False, "idx": 0}


@pytest.mark.parametrize(
    ("text", "span", "expected"),
    [
        ("Mark saw Pete. He left.", "Mark", "Mark"),
        ("Mark saw Pete. He left.", "mark", "Mark"),  # the text's first word decides
        ("my dog saw it.", "My dog", "my dog"),
        ("My dog saw it.", "My\ndog.", "My dog"),
        ("iPhones saw it.", "IPhones", "iPhones"),  # its first letter decides
    ],
)
def test_wscs_spans_are_put_right_as_in_the_hubs_wsc_fixed(tmp_path, text, span, expected):
    put(tmp_path, "train.jsonl", wsc(text, span1_text=span, span2_text="saw"))
    (example,) = load("wsc", "train", tmp_path)
    assert example.fields["span1_text"] == expected
    assert expected in text


MULTIRC = {
    "idx": 3,
    "version": 1.1,
    "passage": {
        "text": "P. ",
        "questions": [
            {"idx": 0, "question": "Q?", "answers": [{"text": "a", "idx": 0, "label": 1}] * 2},
            {"idx": 1, "question": "R?", "answers": [{"text": "b", "idx": 2, "label": 0}]},
        ],
    },
}


def test_multirc_is_one_example_an_answer(tmp_path):
    """As the reference: each answer on its own; the group says which belong to one question."""
    put(tmp_path, "val.jsonl", MULTIRC)
    examples = load("multirc", "dev", tmp_path)
    assert [(e.fields["question"], e.fields["answer"], e.label, e.group) for e in examples] == [
        ("Q?", "a", 1, "3-0"),
        ("Q?", "a", 1, "3-0"),
        ("R?", "b", 0, "3-1"),
    ]
    put(tmp_path, "train.jsonl", MULTIRC, {"idx": 4, "passage": {"text": "P."}})
    assert told("multirc", "train", tmp_path) == (
        "train.jsonl row 2 has no 'questions': it is not as task multirc is published"
    )
    put(tmp_path, "train.jsonl", {"idx": 4, "passage": "P."})
    assert "train.jsonl row 1 is not as task multirc is published" in told(
        "multirc", "train", tmp_path
    )


RECORD = {
    "passage": {
        "text": "Zoe met Ann and Zoe.\n@highlight\nFine",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 16, "end": 18}],
    },
    "qas": [
        {"query": "@placeholder smiled", "answers": [{"start": 16, "end": 18, "text": "Zoe"}] * 2},
        {"query": "Ann and @placeholder", "answers": [{"text": "Zoe"}, {"text": "Ann"}]},
    ],
}


def test_record_is_one_example_a_query(tmp_path):
    """Candidates are the query with each entity; of several right ones the first is trained."""
    put(tmp_path, "val.jsonl", RECORD)
    one, two = load("record", "dev", tmp_path)
    assert one.candidates == (" Ann smiled", " Zoe smiled")
    assert (one.choices, one.answers, one.label) == (("Ann", "Zoe"), ("Zoe",), 1)
    assert (two.answers, two.label) == (("Ann", "Zoe"), 0)
    assert [two.is_right(i) for i in (-1, 0, 1, 2)] == [False, True, True, False]
    query = {"query": "@placeholder", "answers": [{"text": "Bob"}]}
    put(tmp_path, "train.jsonl", RECORD | {"qas": [query]})
    assert told("record", "train", tmp_path) == (
        "train.jsonl row 1: none of its answers (Bob) is a candidate"
    )


SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "C",
                    "qas": [
                        {"id": "a1", "question": "Q? ", "answers": [{"text": "x"}, {"text": "y"}]}
                    ],
                }
            ],
        }
    ],
}


ANSWERS = '[{"text": "x"}, {"text": "y"}]'


def test_squad(tmp_path):
    put(tmp_path, "train-v1.1.json", SQUAD)
    (example,) = load("squad", "train", tmp_path)
    fields = {"title": "T", "context": "C", "question": "Q? "}
    assert example == Example(fields, -1, answers=("x", "y"))
    assert example.origin == "train-v1.1.json question a1"
    put(tmp_path, "dev-v1.1.json", {"data": [{"title": "T"}]})
    assert told("squad", "dev", tmp_path) == (
        "dev-v1.1.json is not as SQuAD v1.1 is published (data, paragraphs, qas): no 'paragraphs'"
    )
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(SQUAD).replace(ANSWERS, "[]"))  # as v2
    assert told("squad", "test", tmp_path) == "dev-v1.1.json question a1 has no answer"
    put(tmp_path, "train-v1.1.json", "{")
    assert "train-v1.1.json is not JSON" in told("squad", "train", tmp_path)


NONE = {"day": "", "month": "", "year": ""}


def answer(number="", spans=(), **date):
    return {"number": number, "date": NONE | date, "spans": list(spans)}


def test_drop(tmp_path):
    """All spans of the validated answers, as in the hub's list; of the answer in training."""
    several = [answer(spans=["a", "b"]), answer("3"), answer(day="9", month="March")]
    pairs = [
        {"question": "Q?", "answer": answer("1"), "query_id": "q1", "validated_answers": several},
        {"question": "R?", "answer": answer("1"), "query_id": "q2"},
        {"question": "S?", "answer": answer("1", spans=["x"]), "query_id": "q3"},  # of two types
        {"question": "T?", "answer": answer(), "query_id": "q4"},  # of none
    ]
    put(tmp_path, "drop_dataset_dev.json", {"nfl_1": {"passage": "P.", "qa_pairs": pairs}})
    one, two = load("drop", "test", tmp_path)
    assert one.answers == ("a", "b", "3", "9 March")
    assert (two.answers, two.fields) == (("1",), {"passage": "P.", "question": "R?"})
    put(tmp_path, "drop_dataset_train.json", {"nfl_1": {"passage": "P."}})
    assert "is not as DROP is published (passage, qa_pairs): no 'qa_pairs'" in told(
        "drop", "train", tmp_path
    )


def test_drop_of_whole_prompts(tmp_path):
    """drop_v0_dev.jsonl.gz: our prompt is theirs."""
    context = "Passage: P.\nQuestion: of what\nQuestion: Q?\nAnswer:"
    row = {"context": context, "completion": " 1", "ref_text": "1|two"}
    (tmp_path / "drop_v0_dev.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    (example,) = load("drop", "dev", tmp_path)
    assert tasks.fill(tasks.get("drop").prompt, example.fields) == context
    assert example.answers == ("1", "two")
    put(tmp_path, "drop_v0_dev.jsonl.gz", "not compressed")
    assert "drop_v0_dev.jsonl.gz is not gzip" in told("drop", "dev", tmp_path)


def test_a_folder_of_another_task_is_told_what_was_expected(tmp_path):
    put(tmp_path, "train_5500.label", "DESC:manner How ?")
    assert told("squad", "train", tmp_path).startswith(
        f"{tmp_path} has no train file of task squad: expected train-v1.1*.json, train with a "
        "suffix of .tsv"
    )
    assert told("squad", "train", tmp_path).endswith("it holds train_5500.label")
    put(tmp_path, "train.tsv", "sentence\tlabel", "fine\t1")
    assert told("rte", "train", tmp_path) == (
        "train.tsv row 2 has no column 'premise' or 'sentence1', it has sentence, label"
    )
    put(tmp_path, "dev.tsv", "premise\thypothesis\tlabel", "A.\tB.\t-")
    assert told("snli", "dev", tmp_path) == "dev.tsv has no labels"
