"""Which demonstrations are left out where a prompt is too long."""

import real_shapes
from models import tiny_model

from mezo import tasks
from mezo.objectives import form_for
from mezo.tasks import Example


def test_the_first_demonstrations_are_dropped_and_the_last_ones_stay():
    """Those next to the question count most; a reader of the prompt sees which they are."""
    tokenizer = real_shapes.opt()
    model = tiny_model("opt", len(tokenizer), context=400)
    shown = [Example({"sentence": word}, i % 2) for i, word in enumerate("abcd")]
    question = Example({"sentence": "z"}, 0)
    whole = form_for(model, tokenizer, tasks.get("sst2")).in_context(model, shown)
    length = len(whole.encode(question)["rows"][0])
    short = form_for(model, tokenizer, tasks.get("sst2"), length - 3).in_context(model, shown)
    feature = short.encode(question)
    text = tokenizer.decode(feature["rows"][0], skip_special_tokens=True)
    assert feature["dropped"] == 1
    assert [line.split()[0] for line in text.split("\n\n")] == ["b", "c", "d", "z"]
