"""Files and rows as the data sets are published, where a table's reader does not suffice.

A reader takes a file, and a function of rows takes one row. Both yield rows of plain columns, to
which answers, choices, candidates and group may be added, as in an Example.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mezo.errors import InputError
from mezo.tasks.reading import lines_of, read_csv, read_json
from mezo.tasks.task import Row

CONNECTIVES = {"cause": "because", "effect": "so"}
_WHAT_FOLLOWS = "\nAnswer:"


def label_first(path: Path) -> Iterator[tuple[str, Row]]:
    """Read SST-5's stsa.fine.*: a label from 0 to 4, a space, a sentence.

    Its -lrb- and -rrb- become the brackets that they stand for, as in the few-shot folders.
    """
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(lines_of(path, file), start=1):
            label, _, sentence = text.strip().partition(" ")
            if label and not sentence:
                raise InputError(f"{path.name} row {line} is not a label, a space and a sentence")
            if label:
                sentence = sentence.replace("-lrb-", "(").replace("-rrb-", ")")
                yield f"row {line}", {"label": label, "sentence": sentence}


def trec(path: Path) -> Iterator[tuple[str, Row]]:
    """Read train_5500.label and TREC_10.label: `DESC:manner How did ... ?`, in Latin-1."""
    with path.open(encoding="latin-1") as file:
        for line, text in enumerate(lines_of(path, file), start=1):
            kind, _, question = text.strip().partition(" ")
            label, colon, _ = kind.partition(":")
            if kind and not (colon and question):
                raise InputError(f"{path.name} row {line} is not LABEL:fine, a space, a question")
            if kind:
                yield f"row {line}", {"label": label, "text": question}


def headless_sentences(path: Path) -> Iterator[tuple[str, Row]]:
    """Read the few-shot folders' CSV: label,sentence with or without a header."""
    return read_csv(path, ["label", "sentence"])


def headless_texts(path: Path) -> Iterator[tuple[str, Row]]:
    """Read the few-shot folders' CSV: label,text with or without a header."""
    return read_csv(path, ["label", "text"])


def squad(path: Path) -> Iterator[tuple[str, Row]]:
    """Read SQuAD v1.1: {"data": [{title, paragraphs: [{context, qas: [{question, answers}]}]}]}."""
    content = read_json(path)
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    row = {"title": article["title"], "context": paragraph["context"], **qa}
                    yield f"question {qa.get('id', '')}", row
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path.name} is not as SQuAD v1.1 is published (data, paragraphs, qas): "
            f"{_problem(error)}"
        ) from None


def squad_rows(row: Row) -> Iterator[Row]:
    """Yield the row with its answers: [{text, answer_start}] in the file, {"text":
    [...]} on the hub."""
    answers = row["answers"]
    texts = answers["text"] if isinstance(answers, dict) else [one["text"] for one in answers]
    yield row | {"answers": list(texts)}


def drop(path: Path) -> Iterator[tuple[str, Row]]:
    """Read DROP: {section: {passage, qa_pairs: [{question, answer, validated_answers}]}}."""
    content = read_json(path)
    try:
        for section in content.values():
            for qa in section["qa_pairs"]:
                yield f"question {qa.get('query_id', '')}", {"passage": section["passage"], **qa}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path.name} is not as DROP is published (passage, qa_pairs): {_problem(error)}"
        ) from None


def drop_rows(row: Row) -> Iterator[Row]:
    """The three published forms of DROP; a row whose answers are none of their types has no rows.

    The hub's list holds every span of every answer, and so does this one of the official file:
    of its validated answers, or, in the training set, of its answer.
    """
    if "answers_spans" in row:  # the hub
        answers = list(row["answers_spans"]["spans"])
    elif "ref_text" in row:  # drop_v0_dev.jsonl.gz: the prompt as a whole, answers joined by bars
        front, _, question = row["context"].removesuffix(_WHAT_FOLLOWS).rpartition("\nQuestion: ")
        row = {"passage": front.removeprefix("Passage: "), "question": question} | row
        answers = row["ref_text"].split("|")
    else:
        every = row.get("validated_answers") or [row["answer"]]
        parts = [_spans(answer) for answer in every]
        answers = [] if None in parts else [span for part in parts for span in part or ()]
    if answers:
        yield row | {"answers": answers}


def _spans(answer: dict[str, Any]) -> list[str] | None:
    """Return a number, a date or spans as text; None if the answer is more than one of them."""
    number, spans = str(answer["number"]), list(answer["spans"])
    date = " ".join(answer.get("date", {}).get(part, "") for part in ("day", "month", "year"))
    kinds = [kind for kind in ([number], [date.strip()], spans) if any(kind)]
    return None if len(kinds) > 1 else [span for kind in kinds for span in kind]


def multirc_rows(row: Row) -> Iterator[Row]:
    """A passage with its questions and their answers becomes one row an answer."""
    if "passage" not in row:  # the hub has one row per answer
        idx = row.get("idx")
        own = {"group": f"{idx['paragraph']}-{idx['question']}"} if isinstance(idx, dict) else {}
        yield row | own
        return
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            flat = {"paragraph": row["passage"]["text"], "question": question["question"]}
            flat |= {"answer": answer["text"], "group": f"{row['idx']}-{question['idx']}"}
            yield flat | ({"label": answer["label"]} if "label" in answer else {})


def record_rows(row: Row) -> Iterator[Row]:
    """A passage with its queries becomes one row a query; its candidates are the query with each
    of the passage's entities, in alphabetical order."""
    if isinstance(row["passage"], str):  # the hub has one row per query
        yield _record(row["passage"], row["query"], row["entities"], row["answers"])
        return
    text = row["passage"]["text"]
    entities = {text[e["start"] : e["end"] + 1] for e in row["passage"]["entities"]}
    for qa in row["qas"]:
        answers = {answer["text"] for answer in qa.get("answers", ())}
        yield _record(text, qa["query"], sorted(entities), sorted(answers))


def _record(passage: str, query: str, entities: list[str], answers: list[str]) -> Row:
    candidates = [" " + query.strip().replace("@placeholder", entity) for entity in entities]
    row = {"passage": passage, "query": query, "candidates": candidates}
    return row | {"choices": list(entities), "answers": list(answers)}


def wsc_rows(row: Row) -> Iterator[Row]:
    """The file's target becomes columns, and its spans are put right where they are not as in the
    text: capitals, a full stop, a line break. So does the hub's wsc.fixed."""
    if "target" in row:
        row = row | row["target"]
    spans = {}
    for name in ("span1", "span2"):
        span = row[f"{name}_text"]
        if span not in row["text"]:
            first = row["text"].split()[int(row[f"{name}_index"]) :][:1] or [""]
            head = span[:1].lower() if first[0][:1].islower() else span[:1].upper()
            span = (head + span[1:]).rstrip(".").replace("\n", " ")
        spans[f"{name}_text"] = span
    yield row | spans


def copa_rows(row: Row) -> Iterator[Row]:
    """The question, cause or effect, becomes the word that joins premise and choice."""
    if row["question"] not in CONNECTIVES:
        raise InputError(f"question must be cause or effect, got {row['question']!r}")
    yield row | {"connective": CONNECTIVES[row["question"]]}


def _problem(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
