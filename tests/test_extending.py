"""Rules and estimators of a user's own run wherever the built-in ones do, and replay to the bit."""

import copy
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from models import Line, Regression, Rows, weights

from mezo import MeZO, MeZOConfig, MeZOTrainer, trajectory
from mezo.cli.main import main
from mezo.errors import InputError
from mezo.rules import RULES, Rule, name_of, options, rule_of

PAGE = Path(__file__).parents[1] / "docs/extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The page's code, saved in a file as it says."""
    path = tmp_path_factory.mktemp("own") / "my_methods.py"
    path.write_text("\n\n".join(BLOCKS))
    spec = importlib.util.spec_from_file_location("my_methods", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rule(own, name) -> Rule:
    return own.Lion(beta2=0.95) if name == "Lion" else RULES[name]()


EVERY = [*RULES, "Lion"]
FORMS = [
    (torch.float32, {}),
    (torch.float64, {"perturbation": "in_place", "num_samples": 2}),
    (torch.float32, {"perturbation": "scratch", "weight_decay": 0.1}),
    (torch.bfloat16, {"rounding": "compensated"}),
    (torch.bfloat16, {"rounding": "stochastic", "num_samples": 2}),
]


def run(model, rule, path, steps=5, **given):
    optimizer = MeZO(model.named_parameters(), **{"lr": 1e-3, "seed": 5, "rule": rule} | given)
    with trajectory.record(optimizer, path):
        for _ in range(steps):
            optimizer.step(model)
    return optimizer


def test_each_example_of_the_page_is_short():
    """Under 30 lines, imports included."""
    assert len(BLOCKS) == 2
    assert all(block.count("\n") < 30 for block in BLOCKS)


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("name", EVERY)
def test_every_rule_replays_and_resumes_to_the_bit(name, form, own, tmp_path):
    dtype, given = FORMS[form]
    model, log, made = Regression(dtype), tmp_path / "run.mezo", rule(own, name)
    run(model, made, log, **given)
    base = trajectory.replay(log, Regression(dtype), rules=[type(made)])
    assert torch.equal(weights(base), weights(model))
    assert not torch.equal(weights(base), weights(Regression(dtype)))

    half, rest = Regression(dtype), Regression(dtype)
    before = run(half, made, tmp_path / "half.mezo", steps=3, **given)
    rest.load_state_dict(half.state_dict())
    after = MeZO(rest.named_parameters(), lr=1e-3, seed=5, rule=made, **given)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for _ in range(2):
        after.step(rest)
    assert torch.equal(weights(rest), weights(model))


@pytest.mark.parametrize("name", EVERY)
def test_every_rule_is_its_options_and_keeps_the_buffers_that_it_names(name, own):
    made = rule(own, name)
    known = RULES | {name_of(type(made)): type(made)}
    assert rule_of(options(made), known) == made
    model = Regression()
    optimizer = MeZO(model.named_parameters(), lr=1e-3, seed=5, rule=made)
    optimizer.step(model)
    for p in model.parameters():
        assert set(optimizer.state.get(p, {})) == set(made.kept)


@pytest.mark.parametrize("name", EVERY)
def test_every_rule_moves_downhill(name, own):
    """The loss of a small regression falls over 200 steps: from 20 at the start to the last 20."""
    model = Regression()
    lr = {"sgd": 1e-2, "momentum": 1e-3, "scalar_adam": 1e-2}.get(name, 2e-3)
    optimizer = MeZO(model.named_parameters(), lr=lr, seed=5, rule=rule(own, name))
    losses = [optimizer.step(model) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20])


def test_lion_is_lion_of_the_dense_gradient(own):
    """Two steps by hand, with all of z stored."""
    from mezo import noise

    model, records = Regression(), []
    twin = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: torch.zeros_like(p) for name, p in twin.items()}
    given = {"lr": 1e-3, "seed": 5, "perturbation": "scratch"}
    optimizer = MeZO(model.named_parameters(), rule=own.Lion(beta2=0.95), **given)
    optimizer.observers.append(records.append)
    for step in range(2):
        optimizer.step(model)
        for name, p in twin.items():
            z = noise.draw(noise.tensor_key(5, name), 0, p.numel(), step=step).double()
            g, m = records[step].projected_grads[0] * z.view(p.shape), moments[name]
            twin[name] = p - 1e-3 * (m * 0.9 + g * (1 - 0.9)).sign()
            moments[name] = m * 0.95 + g * (1 - 0.95)
    for name, p in model.named_parameters():
        assert (p - twin[name]).abs().max() < 1e-15


@pytest.mark.parametrize("perturbation", ["in_place", "scratch", "low_rank"])
@pytest.mark.parametrize("kind", ["three_points", "stp"])
def test_an_estimator_of_ones_own_replays_without_its_code(kind, perturbation, own, tmp_path):
    model, log = Regression(torch.float32), tmp_path / "run.mezo"
    given = {"estimator": getattr(own, kind), "perturbation": perturbation, "num_samples": 2}
    optimizer = run(model, "sgd", log, **given)
    optimizer.write()
    assert trajectory.read(log).header["estimator"] == "my_methods:three_points"
    grads = {g for s in trajectory.read(log).steps for g in s.record.projected_grads}
    assert grads <= {-1.0, 0.0, 1.0}
    base = trajectory.replay(log, Regression(torch.float32))
    assert torch.equal(weights(base), weights(model))


def test_three_points_cost_what_the_estimator_says(own):
    model, calls = Regression(), []

    def closure():
        calls.append(1)
        return model()

    optimizer = MeZO(model.named_parameters(), estimator=own.stp, num_samples=3)
    optimizer.step(closure)
    assert len(calls) == 3 * 2 + 1 + 2  # and the first step's look


def test_a_replay_imports_nothing_that_a_log_names(own, tmp_path, monkeypatch):
    """The module is there to be imported, and is not: the message says how to give the rule."""
    model, log = Regression(torch.float32), tmp_path / "run.mezo"
    run(model, own.Lion(), log)
    monkeypatch.syspath_prepend(str(Path(own.__file__).parent))
    with pytest.raises(InputError, match=r"rule my_methods:Lion is not.*rules=\[Lion\], or --rule"):
        trajectory.replay(log, Regression(torch.float32))
    other = MeZO(Regression(torch.float32).named_parameters(), lr=1e-3, seed=5)
    with pytest.raises(InputError, match="another run: its rule is my_methods:Lion, not sgd"):
        trajectory.catch_up(log, other)
    assert "my_methods" not in sys.modules


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("my.module:Name", "rule must be one of sgd"),
        (type("Open", (Rule,), {})(), "is not a frozen dataclass"),
    ],
)
def test_what_is_no_rule_is_refused_by_name(made, message):
    with pytest.raises(InputError, match=message):
        MeZO(Regression().named_parameters(), rule=made)


def test_both_run_under_the_trainer_by_name(own, tmp_path):
    model = Line()
    args = MeZOConfig(
        str(tmp_path / "run"),
        rule=f"{own.__file__}:Lion",
        rule_options='{"beta2": 0.95}',
        estimator=f"{own.__file__}:stp",
        learning_rate=1e-2,
        max_steps=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    MeZOTrainer(model, args, train_dataset=Rows()).train()
    log = tmp_path / "run" / "run.mezo"
    header = trajectory.read(log).header
    assert (header["rule"], header["rule_options"]["beta2"]) == ("my_methods:Lion", 0.95)
    base = trajectory.replay(log, Line(), rules=[own.Lion])
    assert torch.equal(weights(base), weights(model))


def test_the_command_line_says_what_it_cannot_find(capsys):
    assert main(["replay", "--log", "x", "--output_dir", "y", "--rule", "nowhere.py:Lion"]) == 2
    assert "rule file not found: nowhere.py" in capsys.readouterr().err
