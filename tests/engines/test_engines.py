"""The battery of engines for transformers and for a fake one; what attach() refuses."""

import copy

import pytest
import torch
from battery import *  # noqa: F403
from battery import BATCH, OPTIONS, same, values, weights
from fake import Bigram, FakeEngine
from models import llama
from tiny_tokenizers import byte_bpe

from experiments.rules.anchored import Anchored
from mezo import MeZO
from mezo.engines import THETA, Query, TransformersEngine, attach
from mezo.engines.engine import token_batch
from mezo.errors import InputError


@pytest.fixture(params=["transformers", "fake"])
def made(request):
    def make(dtype=torch.float32):
        if request.param == "fake":
            model = Bigram().to(dtype)
            return model, FakeEngine(model)
        model = llama().to(dtype).eval()
        return model, TransformersEngine(copy.deepcopy(model), byte_bpe())

    return make


def test_16_bit_weights_come_back_from_a_look(made, tmp_path):
    """bfloat16 loses theta + eps z - eps z: the log of a scratch run holds updates alone."""
    model, engine = made(torch.bfloat16)
    base = copy.deepcopy(model)
    optimizer = MeZO(model.named_parameters(), **OPTIONS)
    remote = attach(optimizer, engine)
    assert optimizer.perturbation == "scratch"
    before = weights(engine)
    optimizer.estimate(lambda: remote.loss(BATCH))
    assert same(weights(engine), before)
    optimizer.step()
    optimizer.write()
    assert not same(values(base), values(model))


def test_losses_of_an_engine_are_those_of_a_plain_run():
    """The same directions, the same numbers: only where the weights lie has changed."""
    model = llama().eval()
    alone = copy.deepcopy(model)
    optimizer, plain = (MeZO(m.named_parameters(), **OPTIONS) for m in (model, alone))
    remote, home = attach(optimizer, TransformersEngine(model, None)), TransformersEngine(alone, 0)
    for _ in range(3):
        expected = plain.step(lambda: home.losses(BATCH, [THETA])[0])
        assert optimizer.step(lambda: remote.loss(BATCH)) == expected
    optimizer.write()
    assert same(values(model), values(alone))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rule": "adam"}, "rule adam does not work with an engine.*take rule sgd or scalar_adam"),
        ({"rule": "sign"}, "rule sign does not work with an engine"),
        ({"rule": Anchored()}, "rule experiments.rules.anchored:Anchored does not work with an"),
        ({"perturbation": "low_rank"}, "low_rank is not made by engines"),
        ({"layers": {"thresholds": {"bias": 0.1}}, "perturbation": "scratch"}, "masks"),
    ],
)
def test_settings_that_no_engine_has_are_refused(options, told):
    model = Bigram()
    with pytest.raises(InputError, match=told):
        attach(MeZO(model.named_parameters(), **(OPTIONS | options)), FakeEngine(model))


def test_a_buffer_beside_16_bit_weights_is_refused():
    model = Bigram().bfloat16()
    optimizer = MeZO(model.named_parameters(), rounding="compensated", **OPTIONS)
    with pytest.raises(InputError, match="rounding compensated keeps a buffer"):
        attach(optimizer, FakeEngine(model))


def test_other_weights_are_refused_by_name():
    model, other = Bigram(), Bigram()
    other.bias.data[3] += 1
    with pytest.raises(InputError, match="fake: parameter bias differs"):
        attach(MeZO(model.named_parameters(), **OPTIONS), FakeEngine(other))
    with pytest.raises(InputError, match=r"is bfloat16 \(12, 12\) there and float32 \(12, 12\)"):
        attach(MeZO(model.named_parameters(), **OPTIONS), FakeEngine(Bigram().bfloat16()))


def test_an_engine_that_reads_stale_weights_is_found():
    """A packed copy of a matrix would leave every loss as it is, and the run a random walk."""

    class Stale(FakeEngine):
        def moved(self, changes):
            return super().moved(changes) | {"table": self.theta["table"]}

    model = Bigram()
    with pytest.raises(InputError, match="does not read parameter table"):
        attach(MeZO(model.named_parameters(), **OPTIONS), Stale(model))


def test_an_engine_that_does_not_come_back_is_found():
    class Leaves(FakeEngine):
        def at(self, point):
            self.theta = super().at(point)
            return self.theta

    model = Bigram()
    with pytest.raises(InputError, match="does not come back"):
        attach(MeZO(model.named_parameters(), **OPTIONS), Leaves(model))


def test_an_optimizer_has_one_place_for_its_weights():
    model = Bigram()
    optimizer = MeZO(model.named_parameters(), **OPTIONS)
    attach(optimizer, FakeEngine(model))
    with pytest.raises(InputError, match="in an engine already"):
        attach(optimizer, FakeEngine(model))


def test_queries_say_what_they_lack():
    with pytest.raises(InputError, match="at least one token"):
        Query((), ())
    with pytest.raises(InputError, match="asks beyond its 2 tokens"):
        Query((1, 2), ((2, 3),))
    with pytest.raises(InputError, match=r"first must be in \[1, 1\] for 2 tokens"):
        token_batch([((1, 2), 2)])
