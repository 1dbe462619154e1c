"""What every engine must do. A test module gives a fixture `made`, and imports these tests.

`made(dtype)` returns (model, engine): the model is what a replay starts from, and the engine has
its weights. `made.lengths` says how many tokens texts have.
"""

import copy

import pytest
import torch

from mezo import Generation, MeZO, noise, trajectory
from mezo.engines import THETA, Change, Point, Query, Run, attach
from mezo.engines.engine import token_batch
from mezo.errors import InputError
from mezo.rewards import RewardFunctions

QUERIES = [Query((1, 2, 3, 4), ((1, 3), (2, 4), (3, 5))), Query((5, 6), ((1, 7), (1, 8)))]
BATCH = token_batch([((1, 2, 3, 4), 1), ((5, 6, 7), 2)])
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
OPTIONS = {"lr": 1e-3, "eps": 1e-2, "seed": 5}


def begun(model, engine, distribution="gaussian"):
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    engine.begin(Run(shapes, 5, distribution))
    return tuple(shapes)


def moves(*coefficients, step=3):
    return noise.table([noise.Move(step, 0, 1.0, c) for c in coefficients])


def weights(engine):
    return {name: value.clone() for name, value in engine.weights()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def values(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def replayed(model, path):
    return values(trajectory.replay(path, copy.deepcopy(model)))


def test_a_look_moves_losses_and_leaves_no_trace(made):
    """The two losses of a direction are at theta + c z and theta - c z; theta keeps its bits."""
    model, engine = made()
    names, before = begun(model, engine), weights(engine)
    plus, minus = (Point(look=(Change(names, moves(c)),)) for c in (0.1, -0.1))
    home, there, back, again = engine.logprobs(QUERIES, [THETA, plus, minus, THETA])
    assert there != home != back != there
    assert again == home
    assert same(weights(engine), before)
    assert [len(row) for row in home] == [3, 2]
    assert all(x < 0 for row in home for x in row)


def test_a_walk_stays_and_is_the_definitions_to_the_bit(made):
    """In place a walk is rounded like the log's moves; what is asked after it sees it."""
    model, engine = made()
    names, expected = begun(model, engine), {n: p.clone() for n, p in values(model).items()}
    engine.logprobs(QUERIES, [Point(walk=(Change(names, moves(0.1, -0.2)),))])
    engine.apply([Change(names, moves(0.1, -1e-3))])
    for name, p in expected.items():
        for c in (0.1, -0.2, 0.1, -1e-3):
            noise.apply_(p, noise.tensor_key(5, name), moves(c))
    assert same(weights(engine), expected)


def test_an_update_between_two_looks_is_made_to_theta(made):
    """Scratch: what is walked while the model is at theta + c z must not be lost or doubled."""
    model, engine = made()
    names = begun(model, engine)
    look, walk = Change(names, moves(0.1)), Change(names, moves(-1e-2, step=4))
    engine.losses(BATCH, [Point(look=(look,)), Point((walk,), (look,))])
    expected = {n: p.clone() for n, p in values(model).items()}
    for name, p in expected.items():
        noise.apply_(p, noise.tensor_key(5, name), moves(-1e-2, step=4))
    assert same(weights(engine), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"perturbation": "in_place"},
        {"perturbation": "scratch", "distribution": "rademacher", "weight_decay": 0.1},
        {"perturbation": "scratch", "num_samples": 3, "shaping": "ranks", "lr": 1e-2},
        {"perturbation": "in_place", "num_samples": 2, "estimator": "one_sided"},
    ],
    ids=["in place", "scratch", "population", "one-sided"],
)
def test_the_log_of_a_run_replays_to_the_engines_weights(made, options, tmp_path):
    """20 steps: the log alone rebuilds, in plain torch, what the engine holds, to the bit."""
    model, engine = made()
    base = copy.deepcopy(model)
    optimizer = MeZO(model.named_parameters(), **(OPTIONS | options))
    remote = attach(optimizer, engine)
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        for step in range(20):
            optimizer.step((lambda: float("nan")) if step == 7 else lambda: remote.loss(BATCH))
    optimizer.write()
    assert same(weights(engine), replayed(base, tmp_path / "run.mezo"))
    assert same(weights(engine), values(model))
    assert not same(values(base), values(model))


def test_both_halves_of_an_estimate_write_with_the_same_noise(made):
    """Common random numbers: equal weights write equal texts, another draw writes others."""
    model, engine = made()
    names = begun(model, engine)
    settings = Generation(max_new_tokens=6, temperature=1.0)
    nowhere, far = (Point(look=(Change(names, moves(c)),)) for c in (0.0, 0.5))
    first, second, third = engine.texts(PROMPTS, [THETA, nowhere, far], settings, 1)
    assert first == second != third
    assert engine.texts(PROMPTS, [THETA], settings, 1) == [first]
    assert engine.texts(PROMPTS, [THETA], settings, 2) != [first]
    assert all(1 <= len(one.ids) <= 6 for one in first)


def test_rewards_are_those_of_the_texts(made):
    model, engine = made()
    begun(model, engine)
    judge = RewardFunctions(lambda completions, **kwargs: [float(len(c)) for c in completions])
    settings = Generation(max_new_tokens=3)
    prompts = ["a", "b", "c"]
    (found,) = engine.rewards(prompts, [THETA], settings, judge, tokens=PROMPTS)
    assert found.scores.total == [len(c.text) for c in found.completions]
    assert [c.ids for c in found.completions] == [
        c.ids for c in engine.texts(PROMPTS, [THETA], settings)[0]
    ]


def test_a_tensor_that_the_engine_does_not_hold_is_named(made):
    """One line, before anything is moved."""
    model, engine = made()
    before = values(model)
    with pytest.raises(InputError, match="no parameter ghost"):
        engine.begin(Run({"ghost": (2, 2)}, 0, "gaussian"))
    begun(model, engine)
    assert same(weights(engine), before)
