"""Tasks whose answer the model writes: the loss on the answer, and evaluation by greedy text."""

import pytest
import torch
from models import tiny_model
from tiny_tokenizers import byte_bpe, word_piece

from mezo import MeZO
from mezo.errors import InputError
from mezo.evaluation.evaluate import evaluate
from mezo.objectives import Generated, form_for
from mezo.tasks import Example, Task

QUESTIONS = Task(
    name="questions",
    version=1,
    source="this test",
    columns=("context", "question"),
    kind="generation",
    metric="f1",
    objective="tokens",
    prompt="Context: {context}\nQuestion: {question}\nAnswer:",
    completion=" {answer}\n",
    max_new_tokens=6,
    stop=("\n",),
)
ROWS = [
    ("a charming journey", "film", ("great", "a great film")),
    ("no wit", "gags", ("no wit and never dull",)),
]
EXAMPLES = [
    Example({"context": c, "question": q}, -1, f"row {i}", answers=answers)
    for i, (c, q, answers) in enumerate(ROWS)
]
TOLERANCE = 10 * 64 * 2.0**-24  # as in test_objectives_shared.py


@pytest.fixture(scope="module")
def bpe():
    return byte_bpe()


@pytest.fixture(scope="module")
def model():
    return tiny_model("opt")


def batch_of(form, examples=EXAMPLES):
    return form.collate([form.encode(example) for example in examples])


def prompt_of(example):
    return "Context: {context}\nQuestion: {question}\nAnswer:".format(**example.fields)


def naive(model, tokenizer, example):
    """-log p of each token of the first answer and the line break behind it."""
    ids = tokenizer(prompt_of(example) + f" {example.answers[0]}\n", return_tensors="pt").input_ids
    start = len(tokenizer(prompt_of(example)).input_ids)
    log_probs = model(input_ids=ids).logits.log_softmax(-1)[0].detach()
    return -torch.stack([log_probs[t - 1, ids[0, t]] for t in range(start, ids.shape[1])])


def refused(match, call, *args, **options):
    with pytest.raises(InputError, match=match) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


def test_the_loss_is_the_mean_over_the_first_answers_tokens(model, bpe):
    """The end of the line is one of them: the model has to learn where to stop."""
    form = form_for(model, bpe, QUESTIONS)
    assert isinstance(form, Generated)
    assert form.texts(EXAMPLES[0]) == [prompt_of(EXAMPLES[0]) + " great\n"]
    expected = torch.cat([naive(model, bpe, example) for example in EXAMPLES])
    assert len(naive(model, bpe, EXAMPLES[0])) != len(naive(model, bpe, EXAMPLES[1]))
    assert abs(form.loss(model, batch_of(form)).item() - expected.mean()) <= TOLERANCE


def test_both_losses_along_low_rank_directions(bpe):
    model = tiny_model("opt").float()
    form = form_for(model, bpe, QUESTIONS)
    optimizer = MeZO(model.named_parameters(), eps=0.1, seed=1, perturbation="low_rank")
    perturbed, batch = optimizer.direction(0), batch_of(form)
    with torch.no_grad():
        pair = form.pair_loss(model, batch, perturbed.both)
        for sign, found in zip((+1, -1), pair, strict=True):
            with perturbed.at(sign):
                assert abs(found - form.loss(model, batch)) <= 1000 * 2.0**-24 * abs(found)


def test_evaluation_writes_greedily_after_each_prompt(model, bpe):
    """As transformers' own generate, one at a time; the score is the best over the answers."""
    expected = []
    for example in EXAMPLES:
        ids = bpe(prompt_of(example), return_tensors="pt").input_ids
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        text = bpe.decode(made[ids.shape[1] :], skip_special_tokens=True)
        expected.append(text.split("\n")[0].strip())
    form = form_for(model, bpe, QUESTIONS)
    result = evaluate(model, form, EXAMPLES)
    assert result.predictions == tuple(expected)
    assert result.n == 2
    rewritten = [
        Example(e.fields, -1, answers=("nothing of the kind", text))
        for e, text in zip(EXAMPLES, expected, strict=True)
    ]
    half = evaluate(model, form, [rewritten[0], EXAMPLES[1]], batch_size=1)
    assert half.metrics == {"exact_match": 0.5, "f1": 0.5}
    assert (half.metric, half.value) == ("f1", 0.5)
    assert half.accuracy != half.accuracy  # there is none


def test_the_loss_of_an_evaluation_is_that_of_all_answers_tokens(model, bpe):
    form = form_for(model, bpe, QUESTIONS)
    expected = torch.cat([naive(model, bpe, example) for example in EXAMPLES]).mean()
    for batch_size in (1, 2):
        assert abs(evaluate(model, form, EXAMPLES, batch_size).loss - expected) <= TOLERANCE


def test_demonstrations_are_questions_with_their_first_answers(model, bpe):
    form = form_for(model, bpe, QUESTIONS).in_context(model, EXAMPLES[:1])
    assert form.texts(EXAMPLES[1]) == [
        f"{prompt_of(EXAMPLES[0])} great\n\n{prompt_of(EXAMPLES[1])} no wit and never dull\n"
    ]


def test_demonstrations_leave_room_for_what_is_written(bpe):
    """Those that do not are dropped, the first ones first, and their number is told."""
    roomy = tiny_model("opt", context=256)
    whole = form_for(roomy, bpe, QUESTIONS)
    shown = [EXAMPLES[0]] * 3
    two = whole.encode(EXAMPLES[0], demonstrations=shown[:2])
    needed = len(two["prompt"]) + 6
    for limit, dropped in ((needed, 1), (needed - 1, 2)):
        form = form_for(roomy, bpe, QUESTIONS, max_length=limit)
        feature = form.encode(EXAMPLES[0], demonstrations=shown)
        assert feature["dropped"] == dropped
        assert len(feature["prompt"]) + 6 <= limit
        result = evaluate(roomy, form, EXAMPLES[:1], demonstrations=shown)
        assert result.dropped == dropped


def test_what_leaves_no_room_is_refused_or_cut_on_the_left(model, bpe):
    long = Example(
        {"context": "no wit" + " no wit" * 19, "question": "gags"}, -1, "row 5", answers=("no",)
    )
    form = form_for(model, bpe, QUESTIONS)
    refused("row 5 takes [0-9]+ tokens with the 6 that may be written, the limit is 64",
            form.encode, long)  # fmt: skip
    cut = form_for(model, bpe, QUESTIONS, truncate=True)
    feature, ids = cut.encode(long), bpe(prompt_of(long)).input_ids
    assert feature["prompt"] == [ids[0], *ids[-57:]]
    assert list(feature["rows"][0][:58]) == feature["prompt"]
    assert len(evaluate(model, cut, [long]).predictions) == 1


def test_what_a_task_that_generates_cannot_do_is_refused(model, bpe):
    form = form_for(model, bpe, QUESTIONS)
    refused("questions generates text: it has no scores", form.calibrate, model)
    refused("row 3 has no answers", form.encode, Example(EXAMPLES[0].fields, -1, "row 3"))
    words = word_piece()
    for name in ("bert", "encoder"):
        kind = {"bert": "masked"}.get(name, name)
        refused(f"questions generates text: it needs a causal model, not {kind}",
                form_for, tiny_model(name), words, QUESTIONS)  # fmt: skip
