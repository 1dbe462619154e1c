"""Tasks: templates, loading, sampling, and what is said about bad data."""

import json

import numpy as np
import pytest

from mezo import tasks
from mezo.errors import InputError
from mezo.tasks import Example, Task, custom_task, few_shot, fill, load_examples, sample

REVIEWS = custom_task("{text} It was", [" bad", " good"], labels=["neg", "pos"])


def made(n, labels=2):
    return [Example({"text": f"row {i}"}, i * i % 5 % labels, f"row {i}") for i in range(n)]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def message(*args, **options):
    """The one line that a user reads."""
    with pytest.raises(InputError) as error:
        load_examples(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_template_takes_values_as_they_are_but_for_the_white_space_around():
    """GLUE's sentences end in a space; a value with braces is no template."""
    assert fill("{a} It was", {"a": "charming . "}) == "charming . It was"
    assert fill("{{x}} {a}", {"a": "{b}"}) == "{x} {b}"
    assert fill("{a.b}", {"a.b": "c"}) == "c"


def test_every_task_is_complete():
    """A task that lacks a field fails only when a model of that kind is tried."""
    for name, task in tasks.TASKS.items():
        assert name == task.name
        assert task.source
        assert task.version >= 1
        assert task.prompt
        assert task.hub or task.folder
        assert bool(task.mask_prompt) == bool(task.verbalizers)
        assert bool(task.text) == bool(task.descriptions)
        assert not any(word.startswith(" ") for word in task.verbalizers)
        new_line = task.prompt.endswith("\n")  # there a candidate begins without a space
        assert all(candidate.startswith(" ") != new_line for candidate in task.candidates)


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(InputError, match=r"'SST-2'; did you mean sst2\?"):
        tasks.get("SST-2")
    with pytest.raises(InputError, match="known: opinions, sst2, sst5"):
        tasks.get("zzzz")


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_opinions_come_with_the_package(split):
    examples = load_examples(tasks.get("opinions"), split)
    assert {example.label for example in examples} == {0, 1}


def test_a_glue_folder_is_read_with_dev_for_the_unlabelled_test(tmp_path):
    """Quotation marks are text in GLUE's files; its test.tsv has no labels."""
    write(tmp_path / "train.tsv", 'sentence\tlabel\na "great film \t1\n')
    write(tmp_path / "dev.tsv", "sentence\tlabel\ndull \t0\n")
    write(tmp_path / "test.tsv", "index\tsentence\n0\tunknown\n")
    task = tasks.get("sst2")
    train = load_examples(task, "train", data_dir=tmp_path)
    assert train == [Example({"sentence": 'a "great film '}, 1)]
    assert load_examples(task, "test", data_dir=tmp_path) == [Example({"sentence": "dull "}, 0)]
    assert load_examples(task, "dev", data_dir=tmp_path)[0].origin == "dev.tsv row 2"


def test_all_formats_give_the_same_examples(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"text": 'so, "so"', "label": "neg"}, {"text": "café", "label": "pos"}]
    jsonl = "\n\n".join(json.dumps(row) for row in rows)
    files = [
        write(tmp_path / "a.jsonl", jsonl),
        write(tmp_path / "a.json", jsonl),
        write(tmp_path / "a.csv", '\ufefftext,label\n"so, ""so""",neg\r\ncafé,pos\n'),
        write(tmp_path / "a.tsv", 'label\ttext\nneg\tso, "so"\npos\tcafé'),
        tmp_path / "a.parquet",
    ]
    parquet.write_table(pa.Table.from_pylist(rows), files[-1])
    expected = [Example({"text": 'so, "so"'}, 0), Example({"text": "café"}, 1)]
    for file in files:
        assert load_examples(REVIEWS, "train", files=file) == expected
    assert load_examples(REVIEWS, "train", files=files) == expected * len(files)


def test_labels_may_be_numbers_or_json_booleans(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"q": "x", "y": true}\n{"q": "z", "y": false}\n')
    task = custom_task("{q}?", [" no", " yes"], labels=["false", "true"], label_column="y")
    assert [e.label for e in load_examples(task, "train", files=file)] == [1, 0]
    numbers = write(tmp_path / "b.jsonl", '{"q": "x", "label": 1}\n')
    assert load_examples(custom_task("{q}?", [" no", " yes"]), "dev", files=numbers)[0].label == 1


def test_bad_data_is_named_by_file_and_row(tmp_path):
    good = "text\tlabel\nfine\tpos\n"
    unknown = write(tmp_path / "unknown.tsv", good + "odd\tmaybe\n")
    assert message(REVIEWS, "train", files=unknown) == (
        "unknown.tsv row 3: label 'maybe' is not one of neg, pos"
    )
    column = write(tmp_path / "column.csv", "txt,label\nfine,pos\n")
    assert message(REVIEWS, "train", files=column) == (
        "column.csv row 2 has no column 'text', it has txt, label"
    )
    short = write(tmp_path / "short.tsv", good + "only\n")
    assert message(REVIEWS, "train", files=short) == (
        "short.tsv row 3 has 1 columns, its header has 2"
    )
    null = write(tmp_path / "null.jsonl", '{"text": null, "label": "pos"}\n')
    assert message(REVIEWS, "train", files=null) == "null.jsonl row 1: column 'text' is null"
    for name in ("empty.tsv", "empty.csv", "empty.jsonl"):
        assert message(REVIEWS, "train", files=write(tmp_path / name, "")) == f"{name} is empty"
    header = write(tmp_path / "header.tsv", "text\tlabel\n")
    assert message(REVIEWS, "train", files=header) == "header.tsv is empty"


def test_unreadable_files_are_named(tmp_path):
    assert message(REVIEWS, "train", files="/no/reviews.csv") == "file not found: /no/reviews.csv"
    broken = write(tmp_path / "broken.jsonl", '{"text": "x", "label": "pos"}\n{"text"\n')
    assert "broken.jsonl row 2 is not JSON" in message(REVIEWS, "train", files=broken)
    array = write(tmp_path / "array.json", '[{"text": "x", "label": "pos"},\n 3]')
    assert "array.json row 2 is not a JSON object" in message(REVIEWS, "train", files=array)
    quotes = write(tmp_path / "quotes.csv", 'text,label\n"open,pos\n')
    assert "quotes.csv row 2" in message(REVIEWS, "train", files=quotes)
    latin = tmp_path / "latin.tsv"
    latin.write_bytes("text\tlabel\ncafé\tpos\n".encode("latin-1"))
    assert "latin.tsv is not UTF-8" in message(REVIEWS, "train", files=latin)
    wrong = write(tmp_path / "wrong.parquet", "text")
    assert "wrong.parquet is not parquet" in message(REVIEWS, "train", files=wrong)
    assert "notes.txt is not one of .tsv" in message(REVIEWS, "train", files=tmp_path / "notes.txt")


def test_a_missing_split_says_where_it_was_sought(tmp_path):
    assert "has no train file of task custom: expected train with a suffix of .tsv" in message(
        REVIEWS, "train", data_dir=tmp_path
    )
    assert "is not a folder" in message(REVIEWS, "train", data_dir=tmp_path / "no")
    assert "split must be train, dev, test, got 'valid'" in message(REVIEWS, "valid")
    assert "task custom has no data of its own" in message(REVIEWS, "train")


def test_the_hub_out_of_reach_is_one_line(monkeypatch):
    """datasets raises several classes of error, all of them OSErrors, of several lines."""
    import datasets

    def offline(*args, **options):
        raise ConnectionError("offline\nmode")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    told = message(tasks.get("sst2"), "train")
    assert told == "cannot load nyu-mll/glue sst2 from the hub (offline mode); give data_dir"


def test_a_hub_data_set_is_read_from_the_split_of_the_task(monkeypatch):
    import datasets

    asked = []

    def load(*args, **options):
        asked.append((*args, options["split"]))
        return datasets.Dataset.from_list([{"sentence": "dull", "label": 0, "idx": 0}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_examples(tasks.get("sst2"), "test") == [Example({"sentence": "dull"}, 0)]
    assert asked == [("nyu-mll/glue", "sst2", "validation")]


def test_a_task_that_does_not_fit_together_is_refused():
    with pytest.raises(InputError, match="custom has 3 candidates for 2 labels"):
        custom_task("{text}", [" a", " b", " c"], labels=["x", "y"])
    with pytest.raises(InputError, match="two or more distinct labels"):
        custom_task("{text}", [" a"])
    with pytest.raises(InputError, match="needs candidates"):
        custom_task("{text}", [])
    with pytest.raises(InputError, match="two equal candidates, which no score tells apart"):
        custom_task("{text}", [" a", " a"])
    with pytest.raises(InputError, match="names no column"):
        custom_task("It was", [" a", " b"])
    with pytest.raises(InputError, match=r"'\{text': expected '\}'"):
        custom_task("{text", [" a", " b"])
    with pytest.raises(InputError, match="names the column 'txt', but task t has text"):
        Task("t", 1, "", ("text",), ("0", "1"), prompt="{txt}", candidates=("a", "b"))
    with pytest.raises(InputError, match=r"must hold \{mask\} exactly once"):
        Task("t", 1, "", ("text",), ("0", "1"), mask_prompt="{text}", verbalizers=("a", "b"))


def test_a_custom_prompt_serves_every_kind_of_model_unless_it_has_a_mask():
    assert REVIEWS.mask_prompt == "{text} It was {mask}"
    assert REVIEWS.verbalizers == ("bad", "good")
    masked = custom_task("A {mask} text: {text}", ["bad", "good"])
    assert masked.columns == ("text",)
    assert masked.prompt == ""


def test_a_sample_is_numpys_permutation_whatever_the_global_generator():
    """The paper's samples; and the user's random numbers are left alone."""
    examples, state = made(50), np.random.get_state()[1].copy()
    expected = np.random.RandomState(3).permutation(50)[:10]
    assert sample(examples, 10, 3) == [examples[i] for i in expected]
    assert len(sample(examples, 99, 0)) == 50
    few_shot(examples, 2, 0)
    assert (np.random.get_state()[1] == state).all()


def test_few_shot_is_the_reference_procedure():
    """LM-BFF: shuffle the lines, first k of each label to train, next k to dev, as they come."""
    examples = made(60, labels=3)
    order = list(examples)
    np.random.RandomState(13).shuffle(order)
    by_label = {}
    for example in order:
        by_label.setdefault(example.label, []).append(example)
    train, dev = few_shot(examples, 4, 13)
    assert train == [e for rows in by_label.values() for e in rows[:4]]
    assert dev == [e for rows in by_label.values() for e in rows[4:8]]


def test_few_shot_is_balanced_disjoint_and_the_seeds_alone():
    examples = made(100)
    train, dev = few_shot(examples, 8, 42)
    assert [sum(e.label == label for e in train) for label in (0, 1)] == [8, 8]
    assert [sum(e.label == label for e in dev) for label in (0, 1)] == [8, 8]
    assert not {e.origin for e in train} & {e.origin for e in dev}
    assert few_shot(examples, 8, 42) == (train, dev)
    assert few_shot(examples, 8, 21) != (train, dev)


def test_few_shot_names_a_label_that_is_short(caplog):
    """As the reference, which must for TREC at k = 512, but not silently."""
    examples = [Example({}, 0)] * 3 + [Example({}, 1)] * 8
    train, dev = few_shot(examples, 2, 0)
    assert (len(train), len(dev)) == (4, 3)
    assert "label 0 has 3 examples, 4 were asked for" in caplog.text


def test_wrong_numbers_are_refused():
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        few_shot(made(9), 0, 1)
    with pytest.raises(InputError, match="at least 1, got 0"):
        sample(made(9), 0, 1)
    with pytest.raises(InputError, match=r"seed .* got -1"):
        sample(made(9), 1, -1)
