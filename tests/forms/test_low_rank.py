"""Low-rank directions: what is drawn, summed up, written, logged and rebuilt."""

import copy
import math
import signal
from contextlib import nullcontext
from functools import partial

import pytest
import reference
import torch
from models import Regression, weights

from mezo import MeZO, noise, rules, trajectory
from mezo.errors import InputError
from mezo.forms import factors
from mezo.noise import Move, definition

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEED, INTERVAL = 4, 7


def optimizer_of(model, **options):
    defaults = {"lr": 1e-3, "seed": SEED, "perturbation": "low_rank", "interval": INTERVAL}
    return MeZO(model.named_parameters(), **(defaults | options))


def drawn(name, factor, size, rank, step, probe=0):
    """U or V in float64, as docs/noise.md has them."""
    key = noise.tensor_key(SEED, f"{name}\0{factor}")
    z = noise.draw(key, 0, size * rank, step=step, probe=probe)
    return z.double().view(size, rank)


def direction(name, p, rank, step, probe=0, interval=INTERVAL):
    """z of a parameter."""
    if p.dim() != 2:
        z = noise.draw(noise.tensor_key(SEED, name), 0, p.numel(), step=step, probe=probe)
        return z.double().view(p.shape)
    u = drawn(name, "U", p.shape[0], rank, step, probe)
    v = drawn(name, "V", p.shape[1], rank, step - step % interval)
    return u @ v.T / math.sqrt(rank)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_estimate_is_unbiased(rank):
    """Mean of g z over U and V within 5 sigma of the gradient, in each coordinate.

    With r = 1, E (g z_ij)^2 = sum over k, l of G_kl^2 (1 + 2 [k = i]) (1 + 2 [l = j]); with more
    columns it is less.
    """
    a, b, loss = reference.quadratic(12)
    x = torch.nn.Parameter(torch.ones(4, 3))
    gradient = (a @ torch.ones(12, dtype=torch.float64) + b).view(4, 3)
    optimizer = MeZO(
        [("x", x)], 0.0, seed=SEED, perturbation="low_rank", rank=rank, interval=1, eps=1e-2
    )
    total, n = torch.zeros(4, 3, dtype=torch.float64), 800
    for step in range(n):
        g = optimizer.estimate(lambda: loss(x.detach().flatten().double())).projected_grad
        total += g * direction("x", x, rank, step, interval=1)
        optimizer.step()
    square = gradient**2
    sums = square.sum() + 2 * square.sum(0) + 2 * square.sum(1, keepdim=True) + 4 * square
    assert ((total / n - gradient).abs() < 5 * (sums / n).sqrt()).all()


@pytest.mark.parametrize(
    ("rank", "num_samples", "weight_decay", "rule"),
    [(1, 1, 0.0, "sgd"), (3, 2, 0.1, "sgd"), (2, 1, 0.1, rules.Momentum(0.0))],
)
def test_a_run_equals_the_twin_that_makes_every_matrix(rank, num_samples, weight_decay, rule):
    """20 steps over 2 intervals and a part, in float64. W is decayed when it is written.

    Momentum of 0 is SGD, and takes the course of rules that moves cannot express.
    """
    model, twin, settings = Regression(), Regression(), {"lr": 1e-2, "eps": 1e-3}
    settings |= {"num_samples": num_samples, "weight_decay": weight_decay}
    optimizer = optimizer_of(model, rank=rank, rule=rule, **settings)
    losses = [optimizer.step(model) for _ in range(20)]
    optimizer.write()

    theta = {name: p.detach().clone() for name, p in twin.named_parameters()}
    moved = {name: torch.zeros_like(p) for name, p in theta.items()}  # A V', of matrices
    keep, expected = 1 - settings["lr"] * weight_decay, []
    for step in range(20):
        now, seen = {name: p + moved[name] for name, p in theta.items()}, []
        zs = [
            {name: direction(name, p, rank, step, probe) for name, p in theta.items()}
            for probe in range(num_samples)
        ]
        for z in zs:
            for sign in (+1, -1):
                at = {name: p + sign * settings["eps"] * z[name] for name, p in now.items()}
                seen.append(float(torch.func.functional_call(twin, at)))
        expected.append(sum(seen) / len(seen))
        for name, p in theta.items():
            if p.dim() != 2:
                p *= keep
            for i, z in enumerate(zs):
                g = (seen[2 * i] - seen[2 * i + 1]) / (2 * settings["eps"])
                target = moved[name] if p.dim() == 2 else p
                target -= settings["lr"] / num_samples * g * z[name]
        if (step + 1) % INTERVAL == 0 or step == 19:
            since = step % INTERVAL + 1
            for name, p in theta.items():
                if p.dim() == 2:
                    p.mul_(keep**since).add_(moved[name])
                    moved[name].zero_()
    # as for full directions (test_mezo), with a few operations more
    assert losses == pytest.approx(expected, rel=1e4 * 2.0**-53)
    for name, p in model.named_parameters():
        assert (p - theta[name]).abs().max() < 1e4 * 2.0**-53 * (1 + p.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_is_written_as_the_document_says(dtype):
    """A twin in numpy, of one rounding after the other; three pieces, the last one short."""
    m, n, rank, step, wide = 150, 900, 3, 9, torch.float64 if dtype.itemsize == 8 else torch.float32
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(m, n, generator=generator).to(dtype))
    a = torch.randn(m, rank, generator=generator, dtype=wide)
    number = a.numpy().dtype.type
    x = p.detach().to(wide).numpy() * number(0.9)
    v = drawn("p", "V", n, rank, step - step % INTERVAL).to(wide).numpy()
    for k in range(rank):
        x = x + (a.numpy()[:, k] * number(1 / math.sqrt(rank)))[:, None] * v[:, k]
    expected, key = torch.from_numpy(x), noise.tensor_key(SEED, "p")
    if dtype.itemsize == 2:
        bits = definition.rounding_bits(key, 0, m * n, step=step).view(m, n)
        expected = definition.round_stochastically(expected, bits, dtype)
    optimizer = MeZO([("p", p)], seed=SEED, perturbation="low_rank", rank=rank, interval=INTERVAL)
    optimizer.state[p] |= {"low_rank": a, "decay": 0.9}
    optimizer.param_groups[0]["step"] = step + 1
    optimizer.write()
    assert torch.equal(p.detach(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_an_interval_a_matrix_keeps_its_bits_and_moves_along_one_v(dtype):
    """The update goes along the V that its losses were measured with: the rows of W's change."""
    model, rank = Regression(dtype), 2
    optimizer = optimizer_of(model, rank=rank, lr=1e-2, eps=5e-2, rounding="nearest")
    records = []  # eps is such that losses in 16 bits differ
    optimizer.observers.append(records.append)
    for start in (0, INTERVAL, 2 * INTERVAL):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(INTERVAL):
            assert torch.equal(model.first, before["first"])
            assert torch.equal(model.last, before["last"])
            optimizer.step(model)
        for name in ("first", "last"):
            p = dict(model.named_parameters())[name].detach()
            v = drawn(name, "V", p.shape[1], rank, start)
            seen = records[start:]
            us = [drawn(name, "U", p.shape[0], rank, r.step) * r.projected_grads[0] for r in seen]
            expected = before[name].double() - 1e-2 * sum(us) @ v.T / math.sqrt(rank)
            # at most 20 roundings of the terms' sum, all of them float32's but one
            terms = before[name].double().abs() + 1e-2 * sum(u.abs() for u in us) @ v.abs().T
            unit = max(2.0**-24, torch.finfo(dtype).eps) if dtype.itemsize < 8 else 2.0**-53
            assert ((p.double() - expected).abs() <= 20 * unit * terms).all()
            assert not torch.equal(p, before[name])


def run_to(model, optimizer, path, steps, writes=()):
    """To step number `steps`, logged; some losses are not finite, one at an interval's end."""
    with trajectory.record(optimizer, path, resume=True):
        for step in range(optimizer.param_groups[0]["step"], steps):
            if step in writes:
                optimizer.write()
            optimizer.step(model if step not in (6, 30) else lambda: math.nan)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_replays_to_the_bit(tmp_path, dtype, rank):
    """120 steps over 2 intervals of 50 and a part, written now and then: the log says when."""
    model, path = Regression(dtype), tmp_path / "run.mezo"
    options = {"rank": rank, "interval": 50, "weight_decay": 0.1, "num_samples": 2}
    optimizer, ends = optimizer_of(model, **options), {}
    for step in (31, 77, 120):  # as for an evaluation
        run_to(model, optimizer, path, step, writes=(3, 31, 50, 90))
        optimizer.write()
        ends[step] = weights(model)
    log = trajectory.read(path)
    assert [s.start for s in log.segments if s.header.get("written")] == [3, 31, 77, 90]
    assert (log.header["rank"], log.header["interval"]) == (rank, 50)
    trajectory.compact(path, tmp_path / "small.mezo")
    for name in ("run.mezo", "small.mezo"):
        for until, expected in ends.items():
            base = Regression(dtype)
            trajectory.replay(tmp_path / name, base, until=until)
            assert torch.equal(weights(base), expected)


@pytest.mark.parametrize("saved", [0, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_within_an_interval(tmp_path, dtype, saved):
    """From its base or a checkpoint and its log: W, A and the decay to come are the run's."""
    options = {"rank": 2, "weight_decay": 0.1}
    whole, lost, path = Regression(dtype), Regression(dtype), tmp_path / "run.mezo"
    run_to(whole, optimizer_of(whole, **options), tmp_path / "whole.mezo", 19, writes=(4, 10))
    optimizer = optimizer_of(lost, **options)
    run_to(lost, optimizer, path, saved, writes=(4, 10))
    checkpoint = copy.deepcopy((lost.state_dict(), optimizer.state_dict()))
    run_to(lost, optimizer, path, 11, writes=(4, 10))
    expected = optimizer.state_dict()["state"]

    again = Regression(dtype)
    optimizer = optimizer_of(again, **options)
    if saved:
        again.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
    assert trajectory.catch_up(path, optimizer) == 11 - saved
    assert torch.equal(weights(again), weights(lost))
    found = optimizer.state_dict()["state"]
    for i, state in expected.items():
        assert torch.equal(found[i]["low_rank"], state["low_rank"])
        assert found[i]["low_rank"].dtype == torch.float32
        assert found[i]["decay"] == state["decay"] < 1
    run_to(again, optimizer, path, 19)
    base = Regression(dtype)
    trajectory.replay(path, base)
    optimizer.write()
    assert torch.equal(weights(base), weights(again))
    trajectory.replay(tmp_path / "whole.mezo", again := Regression(dtype))
    assert torch.equal(weights(base), weights(again))


def test_logs_of_one_run_are_joined_with_what_was_written_between(tmp_path):
    """A log that begins within an interval begins with matrices that are up to date."""
    model, base = Regression(torch.float32), Regression(torch.float32)
    optimizer = optimizer_of(model)
    for i, steps in enumerate((10, 17)):
        run_to(model, optimizer, tmp_path / f"{i}.mezo", steps)
    trajectory.merge([tmp_path / "0.mezo", tmp_path / "1.mezo"], tmp_path / "run.mezo")
    optimizer.write()
    trajectory.replay(tmp_path / "run.mezo", base)
    assert torch.equal(weights(base), weights(model))


def test_another_rank_or_interval_is_another_run(tmp_path):
    model, path = Regression(torch.float32), tmp_path / "run.mezo"
    run_to(model, optimizer_of(model, rank=2), path, 5)
    for options, message in (({}, "rank is 2, not 1"), ({"rank": 2, "interval": 8}, "7, not 8")):
        base = Regression(torch.float32)
        with pytest.raises(InputError, match=message):
            trajectory.catch_up(path, optimizer_of(base, **options))


def test_writing_is_what_the_forward_pass_saw():
    """float64: the loss after write() is that with A beside W, to rounding; and nothing is left."""
    model = Regression()
    optimizer = optimizer_of(model, rank=3, lr=1e-2)
    for _ in range(5):
        optimizer.step(model)
    beside = optimizer.direction(0)
    with torch.no_grad(), beside.at(0):
        expected = float(model())
    plain = float(model().detach())
    optimizer.write()
    assert abs(float(model().detach()) - expected) <= 1e3 * 2.0**-53 * expected
    assert abs(plain - expected) > 1e-6
    assert not any(optimizer.state.values())
    before = weights(model)
    optimizer.write()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_16_bit_matrices_are_rounded_once_an_interval_as_asked(rounding):
    """Updates of a hundredth of a unit: in the mean all of it, or nothing."""
    p = torch.nn.Parameter(torch.ones(64, 1024, dtype=torch.bfloat16))
    optimizer = MeZO([("p", p)], 1.0, seed=1, perturbation="low_rank", rounding=rounding)
    u = torch.full((64, 1), 2.0**-8 / 100)
    optimizer.state[p]["low_rank"] = u.clone()
    optimizer.param_groups[0]["step"] = 3
    optimizer.write()
    v = torch.zeros(1024, 1)
    noise.apply_(v, noise.tensor_key(1, "p\0V"), [Move(0, 0, 1.0, 1.0)])
    change = (p.detach().float() - 1).double()
    if rounding == "nearest":
        assert not change.any()
    else:  # of 65,536 roundings, each with a variance of at most |update| * 2^-7
        sigma = math.sqrt(float((u @ v.T).abs().sum()) * 2.0**-7)
        assert abs(float(change.sum() - (u @ v.T).double().sum())) < 5 * sigma
        assert change.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupt_while_matrices_are_written_comes_when_they_are(dtype, monkeypatch):
    """Ctrl-C anywhere: each piece is added once, then KeyboardInterrupt is raised."""
    generator = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(700, 300).to(dtype)  # four pieces
    base.weight.data = torch.randn(300, 700, generator=generator).to(dtype)
    a, found = torch.randn(300, 1, generator=generator), []
    original = factors.summed
    for interrupted in range(-1, 4):
        model, calls = copy.deepcopy(base), []
        optimizer = optimizer_of(model, weight_decay=0.1)
        optimizer.state[model.weight]["low_rank"] = a.clone()
        optimizer.param_groups[0]["step"] = 3

        def summed(*args, calls=calls, interrupted=interrupted):
            calls.append(1)
            if len(calls) - 1 == interrupted:
                signal.raise_signal(signal.SIGINT)
            return original(*args)

        monkeypatch.setattr(factors, "summed", summed)
        if interrupted < 0:
            optimizer.write()
        else:
            with pytest.raises(KeyboardInterrupt):
                optimizer.write()
        assert optimizer.memory.written == 3
        found.append(model.weight.detach())
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert not torch.equal(found[0], base.weight)


def test_an_interrupt_within_a_step_leaves_what_the_log_says(tmp_path, monkeypatch):
    """Ctrl-C after any draw, that of an interval's end too: the run goes on, and replays."""
    names = ("apply_", "apply_all_")
    originals = {name: getattr(noise, name) for name in names}
    launches = fails_at = 0
    while fails_at <= launches:  # first without a signal, to count them
        model, base, calls = Regression(torch.float32), Regression(torch.float32), []
        optimizer = optimizer_of(model, interval=2, weight_decay=0.1, lr=1e-2)

        def interrupted(name, *args, calls=calls, fails_at=fails_at, **kwargs):
            found = originals[name](*args, **kwargs)
            calls.append(name)
            if len(calls) == fails_at:
                signal.raise_signal(signal.SIGINT)
            return found

        with trajectory.record(optimizer, tmp_path / "run.mezo"):
            optimizer.step(model)
            for name in names:
                monkeypatch.setattr(noise, name, partial(interrupted, name))
            with pytest.raises(KeyboardInterrupt) if fails_at else nullcontext():
                optimizer.step(model)
            monkeypatch.undo()
            optimizer.step(model)
        optimizer.write()
        trajectory.replay(tmp_path / "run.mezo", base)
        assert torch.equal(weights(base), weights(model))
        launches, fails_at = launches or len(calls), fails_at + 1
        if fails_at == 1:  # U in a forward pass, the update, V of matrices that are written
            assert {*names} <= {*calls}


def test_what_does_not_go_with_low_rank_is_refused_by_name():
    model = Regression(torch.bfloat16)
    for options, message in (
        ({"rank": 0}, "rank must be from 1 to 65535, got 0"),
        ({"interval": 0}, "interval must be from 1 to 4294967295, got 0"),
        ({"rank": 1.5}, "rank must be a whole number, got 1.5"),
        ({"rounding": "master"}, "rounding 'master' cannot be combined with low_rank"),
        ({"rounding": "compensated"}, "rounding 'compensated' cannot be combined with low_rank"),
    ):
        with pytest.raises(InputError, match=message):
            optimizer_of(model, **options)


def test_a_written_run_accumulates_and_refuses_as_others_do():
    """Two closures for one probe share z; write() between them changes nothing that they see."""
    models = [Regression(), Regression()]
    for model, writes in zip(models, (False, True), strict=True):
        optimizer = optimizer_of(model, lr=1e-2)
        for _ in range(10):
            for scale in (1.0, 3.0):
                optimizer.estimate(lambda m=model, s=scale: s * m())
                if writes:
                    optimizer.write()
            optimizer.step()
        optimizer.step(lambda: math.nan)
        optimizer.write()
    off = (weights(models[0]) - weights(models[1])).abs().max()
    assert off < 1e5 * 2.0**-53  # two orders of the same additions
