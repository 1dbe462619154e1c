"""Offload with write_every=0: the weights of the run exist on the device alone, block by block."""

import contextlib

import pytest
from offloading import loss_of, made

from mezo import MeZO, trajectory
from mezo.errors import InputError
from mezo.offload.context import Offload, offload


@pytest.mark.parametrize("form", ["in_place", "low_rank"])
def test_the_log_of_weights_that_are_never_written_has_the_same_digests(form, tmp_path):
    """The weights exist on the device alone, block by block; other writers must be found there."""
    digests = []
    for name, how in (("here", None), ("away", {"device": "cpu", "write_every": 0})):
        model = made("opt")
        optimizer = MeZO(model.named_parameters(), lr=1e-2, perturbation=form, seed=3, interval=2)
        around = contextlib.nullcontext() if how is None else Offload(model, optimizer, **how)
        with around, trajectory.record(optimizer, tmp_path / name):
            for _ in range(3):
                optimizer.step(loss_of(model))
        digests.append(trajectory.read(tmp_path / name).digests)
    assert digests[0].keys() == {3}
    assert digests[0] == digests[1]


def test_a_step_after_weights_that_were_never_written_is_refused():
    """Outside the context the model has its base weights, from which the log's run cannot go on."""
    model = made("opt")
    optimizer = MeZO(model.named_parameters(), seed=3)
    with offload(model, optimizer, device="cpu", write_every=0):
        optimizer.step(loss_of(model))
    with pytest.raises(InputError, match="the updates of the run are in its log alone"):
        optimizer.step(loss_of(model))
