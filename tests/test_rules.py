"""Rules: buffered, rebuilt from the history, and as torch.optim has them of the dense gradient."""

import contextlib
import copy
import math
import signal

import pytest
import reference
import torch
from models import ROUNDING, Regression, weights

from mezo import MeZO, noise, trajectory
from mezo.errors import InputError
from mezo.estimators import Estimate
from mezo.rules import RULES, SGD, Adam, Momentum, ScalarAdam, Sign, options

STEPS = 12
COUPLED = {"decoupled_weight_decay": False}
# A rule, and the torch optimizer that it is; (momentum, betas) with which a step is far from sgd's
TWINS = {
    "momentum": (Momentum(0.8), lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.8)),
    "dampened": (
        Momentum(0.8, dampening=0.3),
        lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.8, dampening=0.3),
    ),
    "nesterov": (
        Momentum(0.8, nesterov=True),
        lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.8, nesterov=True),
    ),
    "momentum, coupled": (
        Momentum(0.8, **COUPLED),
        lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.8, weight_decay=wd),
    ),
    "adam, decoupled": (
        Adam((0.7, 0.9)),
        lambda p, lr, wd: torch.optim.AdamW(p, lr, betas=(0.7, 0.9), weight_decay=wd),
    ),
    "adam, coupled": (
        Adam((0.7, 0.9), **COUPLED),
        lambda p, lr, wd: torch.optim.Adam(p, lr, betas=(0.7, 0.9), weight_decay=wd),
    ),
    "sgd": (SGD(), lambda p, lr, wd: torch.optim.SGD(p, lr)),
}


def run(rule, *, dtype=torch.float64, log=None, steps=STEPS, **options):
    model = Regression(dtype)
    settings = {"lr": 1e-2, "seed": 5, "rule": rule} | options
    optimizer = MeZO(model.named_parameters(), **settings)
    records = []
    optimizer.observers.append(records.append)
    if log is not None:
        with trajectory.record(optimizer, log):
            for _ in range(steps):
                optimizer.step(model)
    else:
        for _ in range(steps):
            optimizer.step(model)
    optimizer.write()
    return model, optimizer, records


def dense(name, shape, record, distribution="gaussian"):
    """projected_grad * z, averaged over the record's directions, as a tensor."""
    numel, n = math.prod(shape), len(record.projected_grads)
    total = torch.zeros(numel, dtype=torch.float64)
    for probe, g in enumerate(record.projected_grads):
        where = {"step": record.step, "probe": probe, "distribution": distribution}
        total += g / n * noise.draw(noise.tensor_key(5, name), 0, numel, **where).double()
    return total.view(shape)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_rule_is_torch_optim_fed_the_dense_gradient(twin, num_samples):
    rule, make = TWINS[twin]
    decay = 0.1 if "coupled" in twin else 0.0  # decoupled too
    settings = {"num_samples": num_samples, "weight_decay": decay, "perturbation": "scratch"}
    model, _, records = run(rule, **settings)
    other = Regression()
    torch_optimizer = make(other.parameters(), 1e-2, decay)
    for record in records:
        for name, p in other.named_parameters():
            p.grad = dense(name, p.shape, record)
        torch_optimizer.step()
    # in float64 some hundred roundings of numbers below 100; adam divides them by roots over 1e-6
    assert (weights(model) - weights(other)).abs().max() < 1e-9
    assert (weights(model) - weights(Regression())).abs().max() > 1e-3


@pytest.mark.parametrize(("window", "distribution"), [("all", "gaussian"), (STEPS, "rademacher")])
@pytest.mark.parametrize(
    "rule",
    [Momentum(0.8), Momentum(0.8, 0.3), Momentum(0.8, nesterov=True), Adam((0.7, 0.9))],
    ids=["momentum", "dampened", "nesterov", "adam"],
)
def test_a_full_window_is_the_buffers(rule, window, distribution):
    """The same numbers, added in another order; nothing of a tensor's size is kept."""
    settings = {"distribution": distribution, "num_samples": 2, "weight_decay": 0.1}
    buffered, optimizer, _ = run(rule, perturbation="scratch", **settings)
    rebuilt, without, _ = run(
        type(rule)(**{**vars(rule), "window": window}), perturbation="scratch", **settings
    )
    assert (weights(buffered) - weights(rebuilt)).abs().max() < 1e-9
    assert any(len(state) for state in optimizer.state.values())
    assert not any(len(state) for state in without.state.values())


def test_a_short_window_leaves_out_what_its_docstring_says():
    """One step from the same weights: the truncation alone, within beta^window / (1 - beta)."""
    beta, window = 0.8, 5
    found = {}
    for kept in ("all", window):
        model = Regression()
        before = weights(model)
        optimizer = MeZO(
            model.named_parameters(),
            1e-2,
            seed=5,
            rule=Momentum(beta, window=kept),
            perturbation="scratch",
        )
        past = [(t, (1.0 + t / 10,)) for t in range(20)][-(20 if kept == "all" else window) :]
        optimizer.memory.past, optimizer.memory.number = past[:-1], 19
        optimizer.param_groups[0]["step"] = 19
        optimizer.direction(0).add(Estimate(2.9, 1.0, (1.0, 1.0)))
        optimizer.step()
        found[kept] = weights(model) - before
    largest = max(
        float(noise.draw(noise.tensor_key(5, name), 0, p.numel(), step=t).abs().max()) * 2.9
        for name, p in Regression().named_parameters()
        for t in range(20)
    )
    off = (found["all"] - found[window]).abs().max()
    assert 0 < off <= 1e-2 * beta**window / (1 - beta) * largest


def test_sign_moves_every_weight_by_lr():
    model, _, _ = run(Sign(), steps=1, perturbation="scratch")
    moved = (weights(model) - weights(Regression())).abs()
    assert (moved - 1e-2).abs().max() < 1e-15


def test_one_second_moment_for_all_scales_the_step():
    """v is the bias-corrected mean square of the projected gradients measured up to now."""
    closure = iter(range(1, 100))
    x = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    rule = ScalarAdam(0.5, 1e-3)
    optimizer = MeZO([("x", x)], 0.1, seed=5, rule=rule, eps=0.5)
    optimizer.watch.looks = False  # each loss can be had once
    records, mean, weight = [], 0.0, 0.0
    optimizer.observers.append(records.append)
    for k in range(4):
        losses = iter([10.0 * (k + 1), 0.0])
        optimizer.step(lambda losses=losses: next(losses))
        g = 10.0 * (k + 1)
        mean, weight = 0.5 * mean + 0.5 * g * g, 0.5 * weight + 0.5
        expected = g / (math.sqrt(mean / weight) + 1e-3)
        assert records[-1].projected_grads[0] == pytest.approx(expected, rel=1e-15)
    assert next(closure) == 1


ALL = {
    "sgd": "sgd",
    "momentum": "momentum",
    "momentum, history": Momentum(window=3),
    "nesterov, all": Momentum(nesterov=True, window="all"),
    "adam": "adam",
    "adam, history": Adam((0.5, 0.7), window=4),
    "sign": "sign",
    "scalar_adam": "scalar_adam",
}


FORMS = [
    (torch.float32, "in_place", "stochastic"),
    (torch.float64, "in_place", "stochastic"),
    (torch.float32, "scratch", "stochastic"),
    (torch.bfloat16, "scratch", "stochastic"),
    (torch.float16, "scratch", "nearest"),
    (torch.bfloat16, "scratch", "compensated"),
    (torch.bfloat16, "scratch", "master"),
    (torch.float32, "low_rank", "stochastic"),
    (torch.bfloat16, "low_rank", "stochastic"),
]
RUNS = [  # low rank refuses the others: test_what_cannot_work_is_refused_by_name
    (name, *form, "rademacher" if i % 3 == 1 else "gaussian")
    for name in ALL
    for i, form in enumerate(FORMS)
    if form[1] != "low_rank" or name in ("sgd", "momentum", "scalar_adam")
]


@pytest.mark.parametrize(
    ("name", "dtype", "perturbation", "rounding", "distribution"),
    RUNS,
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_run_replays_and_resumes_to_the_bit(
    name, dtype, perturbation, rounding, distribution, tmp_path
):
    """Replay, replay of a part, state_dict, and catching up from the log, for every rule."""
    rule, log = ALL[name], tmp_path / "run.mezo"
    settings = {"perturbation": perturbation, "rounding": rounding, "weight_decay": 0.1}
    settings |= {"distribution": distribution, "num_samples": 2, "interval": 4, "eps": 1e-2}
    settings |= {"lr": 1e-3}
    model, _, _ = run(rule, dtype=dtype, log=log, steps=7, **settings)
    replayed = trajectory.replay(log, Regression(dtype))
    assert torch.equal(weights(replayed), weights(model))
    assert not torch.equal(weights(replayed), weights(Regression(dtype)))

    again = Regression(dtype)
    other = MeZO(again.named_parameters(), seed=5, rule=rule, **settings)
    for _ in range(3):
        other.step(again)
    third = Regression(dtype)
    third.load_state_dict(again.state_dict())
    resumed = MeZO(third.named_parameters(), seed=5, rule=rule, **settings)
    resumed.load_state_dict(copy.deepcopy(other.state_dict()))
    if name == "scalar_adam":  # what it remembers is in no log
        with pytest.raises(InputError, match="a run with rule scalar_adam can only resume"):
            trajectory.catch_up(log, resumed, until=5)
    else:
        assert trajectory.catch_up(log, resumed, until=5) == 2
    while resumed.param_groups[0]["step"] < 7:
        resumed.step(third)
    resumed.write()
    assert torch.equal(weights(third), weights(model))


def test_a_log_that_begins_late_has_no_buffers(tmp_path):
    model = Regression(torch.float32)
    optimizer = MeZO(model.named_parameters(), seed=5, rule="momentum")
    optimizer.step(model)
    base = copy.deepcopy(model)
    with trajectory.record(optimizer, tmp_path / "run.mezo", resume=True):
        optimizer.step(model)
    with pytest.raises(InputError, match="starts at step 1, without the buffers of rule momentum"):
        trajectory.replay(tmp_path / "run.mezo", base)


def test_another_rule_is_another_run(tmp_path):
    log = tmp_path / "run.mezo"
    run(Momentum(0.8), log=log, steps=2)
    model = Regression()
    optimizer = MeZO(model.named_parameters(), 1e-2, seed=5, rule=Momentum(0.7))
    with pytest.raises(InputError, match=r"another run: its rule_options is .*0\.8.* not .*0\.7"):
        trajectory.catch_up(log, optimizer)


def test_a_refused_step_leaves_the_moments_as_they_were():
    """As if torch's step had not been called: neither decayed nor counted."""
    losses = []
    for refused in (False, True):
        model = Regression()
        optimizer = MeZO(model.named_parameters(), 1e-2, seed=5, rule="momentum")
        optimizer.step(model)
        kept = {k: v["momentum_buffer"].clone() for k, v in optimizer.state.items()}
        if refused:
            optimizer.step(lambda: math.nan)
            assert all(torch.equal(kept[k], v["momentum_buffer"]) for k, v in
                       optimizer.state.items())  # fmt: skip
            assert optimizer.memory.number == 1
        losses.append(len(optimizer.memory.past))
    assert losses == [1, 1]


@pytest.mark.parametrize("rule", [Momentum(), Adam(), Adam(window=3), Sign()])
def test_an_interrupt_within_an_update_comes_when_it_is_whole(rule, monkeypatch):
    """Ctrl-C after any draw or copy: every tensor is moved, once."""
    whole, _, _ = run(rule, steps=3)
    apply_ = noise.apply_
    for fails_at in range(1, 30, 4):
        model, calls = Regression(), []
        optimizer = MeZO(model.named_parameters(), 1e-2, seed=5, rule=rule)
        optimizer.step(model)
        optimizer.step(model)

        def interrupted(*args, calls=calls, fails_at=fails_at, **kwargs):
            apply_(*args, **kwargs)
            calls.append(1)
            if len(calls) == fails_at:
                signal.raise_signal(signal.SIGINT)

        optimizer.estimate(model)
        monkeypatch.setattr(noise, "apply_", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            optimizer.step()
        monkeypatch.setattr(noise, "apply_", apply_)
        assert torch.equal(weights(model), weights(whole))
        if len(calls) < fails_at:
            break
    else:
        raise AssertionError("more draws than expected")


def test_what_cannot_work_is_refused_by_name():
    model = Regression(torch.float32)
    cases = [
        ({"rule": "adagrad"}, "rule must be one of sgd, momentum"),
        ({"rule": 3}, "rule must be one of"),
        ({"rule": {"name": "momentum", "beta": 0.5}}, "rule momentum has no option beta"),
        ({"rule": Momentum(1.0)}, "betas must be in"),
        ({"rule": Momentum("0.9")}, "betas must be in"),
        ({"rule": Adam((0.9,))}, "betas must be in"),
        ({"rule": Momentum(dampening=1.0)}, "dampening must be in"),
        ({"rule": Momentum(nesterov=True, dampening=0.1)}, "nesterov needs momentum and no damp"),
        ({"rule": Adam(eps=0.0)}, "eps must be positive, got 0.0"),
        ({"rule": Momentum(window=0)}, "window must be a number of steps"),
        ({"rule": Momentum(window=9, **COUPLED)}, "needs buffers"),
        ({"rule": "adam", "perturbation": "low_rank"}, "adam cannot be combined with low_rank"),
        ({"rule": "sign", "perturbation": "low_rank"}, "sign cannot be combined with low_rank"),
        (
            {"rule": Momentum(window=9), "perturbation": "low_rank"},
            "a window cannot be combined with low_rank",
        ),
        (
            {"rule": Momentum(**COUPLED), "perturbation": "low_rank"},
            "coupled weight decay cannot be combined",
        ),
        ({"rule": "scalar_adam", "shaping": "ranks"}, "both scale the step"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            MeZO(model.named_parameters(), **given)


def test_a_rule_is_the_same_however_it_is_given():
    for name, kind in RULES.items():
        assert options(name) == options(kind()) == options({"name": name}) == options(options(name))


def test_low_rank_momentum_is_momentum_of_the_factor():
    """A <- A - lr buf, buf <- beta buf + g U; both begin anew with another V."""
    settings = {"perturbation": "low_rank", "interval": 3, "rank": 2}
    model, _, records = run(Momentum(0.8), steps=5, **settings)
    base, (name, shape) = Regression(), ("first", (16, 6))
    w = dict(base.named_parameters())[name].detach().clone()
    for start in (0, 3):
        a = buf = torch.zeros(16, 2, dtype=torch.float64)
        v = noise.draw(noise.tensor_key(5, f"{name}\0V"), 0, 12, step=start).double().view(6, 2)
        for record in records[start : start + 3]:
            key = noise.tensor_key(5, f"{name}\0U")
            u = noise.draw(key, 0, 32, step=record.step).double().view(16, 2)
            buf = 0.8 * buf + record.projected_grads[0] * u
            a = a - 1e-2 * buf
        w = w + a @ v.T / math.sqrt(2)
    found = dict(model.named_parameters())[name].detach()
    assert found.shape == shape
    assert (found - w).abs().max() < 1e3 * ROUNDING[torch.float64]


def test_the_quadratic_is_solved_faster_with_momentum():
    """At a quarter of the rate, as theory says of beta = 0.75: the same speed, to a fifth."""
    found = {}
    for rule, lr in (("sgd", 8e-3), (Momentum(0.75), 2e-3)):
        _, _, loss = reference.quadratic(10)
        x = torch.nn.Parameter(torch.ones(10, dtype=torch.float64))
        optimizer = MeZO([("x", x)], lr, seed=1, rule=rule, num_samples=4)
        for _ in range(60):
            optimizer.step(lambda x=x, loss=loss: loss(x.detach()))
        found[lr] = loss(x.detach())
    start = reference.quadratic(10)[2](torch.ones(10, dtype=torch.float64))
    assert max(found.values()) < start
    assert abs(found[8e-3] - found[2e-3]) < 0.2 * (start - min(found.values()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_a_run_on_the_device_replays_on_the_cpu_to_the_bit(name, tmp_path):
    """Sums, roots and quotients are rounded alike on both; only forward passes are not."""
    model = Regression(torch.float32).to("cuda")
    model.x, model.y = model.x.to("cuda"), model.y.to("cuda")
    optimizer = MeZO(model.named_parameters(), 1e-3, seed=5, rule=ALL[name], num_samples=2)
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        for _ in range(6):
            optimizer.step(model)
    base = trajectory.replay(tmp_path / "run.mezo", Regression(torch.float32))
    assert torch.equal(weights(base), weights(model).cpu())
