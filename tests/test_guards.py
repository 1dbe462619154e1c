"""What MeZO refuses at the door, warns of once, and stops."""

import math

import numpy as np
import pytest
import torch
from models import Regression, weights

from mezo import MeZO, rules, trajectory
from mezo.errors import InputError
from mezo.watch import last_place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"eps": -1e-3}, "eps must be positive, got -0.001"),
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"num_samples": 0}, "num_samples must be from 1 to 16777215, got 0"),
        ({"seed": 2**64}, "seed must be in"),
        (
            {"distribution": "normal"},
            "distribution must be gaussian, rademacher or gaussian16, got 'normal'",
        ),
        ({"perturbation": "low"}, "perturbation must be in_place, scratch or low_rank, got 'low'"),
        ({"rounding": "up"}, "rounding must be stochastic, .* or nearest, got 'up'"),
        ({"rounding": "master", "perturbation": "in_place"}, "'master' keeps a buffer"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"clip_quantile": 1.0}, "clip_quantile must be between 0 and 1, got 1.0"),
        ({"max_refused": 0}, "max_refused must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_by_value(options, message):
    with pytest.raises(InputError, match=message):
        MeZO(Regression().named_parameters(), **options)


def test_tensors_that_cannot_be_trained_are_refused_by_name():
    def refused(tensor, message, **options):
        with pytest.raises(InputError, match=message):
            MeZO([("w", torch.nn.Parameter(tensor))], **options)

    refused(torch.zeros(3, device="meta"), "parameter w is on the meta device")
    refused(torch.zeros(3, dtype=torch.complex64), "parameter w is complex64")
    refused(torch.eye(3).to_sparse(), "parameter w is sparse")
    MeZO([("w", torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))])


def test_a_lazy_module_is_told_to_be_called_first():
    """It was said to be quantised, or ended in torch's own error."""
    with pytest.raises(InputError, match="parameter weight has no shape yet"):
        MeZO(torch.nn.LazyLinear(3).named_parameters())


@pytest.mark.parametrize(
    ("values", "told"),
    [(torch.eye(3).to_sparse(), "sparse"), (torch.zeros(1, 3).expand(3, 3), "expanded")],
)
def test_a_frozen_tensor_that_cannot_be_trained_is_refused_once_it_is_not_frozen(values, told):
    """Only what had requires_grad at first was looked at; a sparse one ended in a traceback."""
    w, b = torch.nn.Parameter(values, requires_grad=False), torch.nn.Parameter(torch.ones(3))
    optimizer = MeZO([("w", w), ("b", b)], seed=1)
    optimizer.step(lambda: (w @ b).sum())
    w.requires_grad_(True)
    for _ in range(2):
        with pytest.raises(InputError, match=f"parameter w is {told}"):
            optimizer.step(lambda: (w @ b).sum())


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (3, "layers must be a dict with numbers by name, .* got 3"),
        ({"scales": 2.0}, "layers must be a dict with numbers by name"),
        ({"scales": {"last": "2"}}, "layers must be a dict with numbers by name"),
        ({"scale": {}}, "layers has scales, modified and thresholds, not scale"),
        ({"scales": {"other": 2.0}}, "layers: scales names other, which is not trained"),
    ],
)
def test_layers_of_a_group_are_checked_as_those_of_the_optimizer(layers, told):
    """A number was an AttributeError, and an unknown name was ignored."""
    model = Regression()
    group = {"params": list(model.named_parameters())}
    optimizer = MeZO([group], seed=1)
    optimizer.step(model)
    optimizer.param_groups[0]["layers"] = layers
    with pytest.raises(InputError, match=told):
        optimizer.step(model)
    with pytest.raises(InputError, match=told):
        MeZO([group | {"layers": layers}], seed=1)


def test_two_parameters_on_one_memory_are_refused():
    """Each walk would move it twice (tied weights are one parameter, and fine)."""
    w = torch.zeros(3)
    with pytest.raises(InputError, match="parameters a and b share memory"):
        MeZO([("a", torch.nn.Parameter(w)), ("b", torch.nn.Parameter(w))])


def test_settings_of_the_direction_are_one_for_all_groups():
    model = Regression()
    groups = [{"params": [("a", model.first)]}, {"params": [("b", model.last)], "eps": 1e-2}]
    with pytest.raises(
        InputError, match=r"eps is one for all parameter groups, got 0.001 and 0.01"
    ):
        MeZO(groups)


def steps_of(optimizer, losses, model):
    """One step for each of `losses`: None is the model's own."""
    for loss in losses:
        optimizer.step(model if loss is None else lambda loss=loss: loss)


def test_losses_that_are_not_finite_stop_the_run_after_some_in_a_row(caplog):
    model = Regression()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, max_refused=3)
    steps_of(optimizer, [math.nan, math.inf, None, math.nan, math.nan], model)
    with pytest.raises(InputError, match=r"not finite in 3 steps in a row, the last one step 5"):
        optimizer.step(lambda: math.nan)
    assert caplog.text.count("update refused") == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_refused_update_leaves_scratch_weights_as_they_were(dtype):
    model = Regression(dtype)
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=1, perturbation="scratch")
    before = weights(model)
    optimizer.step(lambda: math.nan)
    assert torch.equal(weights(model), before)
    assert optimizer.param_groups[0]["step"] == 1


def test_a_bound_on_the_projected_gradient_keeps_its_sign():
    model, seen = Regression(), []
    optimizer = MeZO(model.named_parameters(), lr=0.0, seed=1, clip=0.5)
    optimizer.observers.append(lambda record: seen.append(record.projected_grads[0]))
    measured = []
    for _ in range(10):
        measured.append(optimizer.estimate(model).projected_grad)
        optimizer.step()
    assert seen == [max(-0.5, min(0.5, g)) for g in measured]
    assert any(abs(g) > 0.5 for g in measured)


def test_a_quantile_bounds_what_stands_out_from_the_last_sizes(tmp_path):
    """The history is of what was measured: the bound of step 10 is the quantile of ten sizes."""
    model, base, seen = Regression(torch.float32), Regression(torch.float32), []
    optimizer = MeZO(model.named_parameters(), lr=1e-3, seed=1, clip_quantile=0.5)
    optimizer.observers.append(lambda record: seen.append(record.projected_grads[0]))
    measured = []
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        for i in range(12):
            scale = 100.0 if i == 10 else 1.0
            measured.append(optimizer.estimate(lambda s=scale: s * model()).projected_grad)
            optimizer.step()
    assert seen[:10] == measured[:10]
    assert abs(seen[10]) == pytest.approx(float(np.median(np.abs(measured[:10]))))
    assert optimizer.state_dict()["param_groups"][0]["history"] == tuple(map(abs, measured))
    trajectory.replay(tmp_path / "run.mezo", base)  # what was applied is what the log has
    assert torch.equal(weights(base), weights(model))


def test_an_eps_that_bfloat16_cannot_show_is_warned_of_once(caplog):
    """Weights of 0.5 to 2: a unit in the last place is 2^-8 at the least."""
    model = Regression(torch.bfloat16)
    for p in model.parameters():
        p.data.uniform_(1, 2, generator=torch.Generator().manual_seed(0))
    for eps, warned in ((1e-2, 0), (1e-3, 1)):
        caplog.clear()
        optimizer = MeZO(model.named_parameters(), lr=0.0, eps=eps, seed=1)
        steps_of(optimizer, [None] * 3, model)
        assert (
            caplog.text.count("half a unit in the last place (0.0078) of most bfloat16") == warned
        )


class InFloat32(Regression):
    """bfloat16 weights, the loss in float32, as language models compute it."""

    def forward(self):
        hidden = torch.tanh(self.x @ self.first.T + self.bias)
        return ((hidden.float() @ self.last.float().T - self.y.float()) ** 2).mean()


@pytest.mark.parametrize(("rounding", "warned"), [("nearest", 1), ("stochastic", 0)])
def test_updates_that_are_rounded_away_are_warned_of_once(rounding, warned, caplog):
    model = InFloat32(torch.bfloat16)
    optimizer = MeZO(model.named_parameters(), lr=1e-7, seed=1, rounding=rounding)
    steps_of(optimizer, [None] * 40, model)
    assert caplog.text.count("are rounded away") == warned
    assert "the same number" not in caplog.text


def test_losses_that_cannot_be_told_apart_are_warned_of_once(caplog):
    """As a loss in 16 bits has them, or an accuracy on few examples."""
    model = Regression()
    optimizer = MeZO(model.named_parameters(), lr=1e-7, seed=1)
    for _ in range(40):
        optimizer.step(lambda: torch.round(model(), decimals=1))
    assert caplog.text.count("both losses were the same number") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_unit_in_the_last_place_is_the_spacing_of_numbers(dtype):
    """Of 2^k to 2^(k+1) it is 2^(k - bits); the median goes by elements, and 16 bits come first."""
    bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}[dtype]
    few, many = torch.full((10,), 1.5), torch.full((90_000,), 0.3)
    unit, found = last_place([few.to(dtype), many.to(dtype), torch.zeros(5, dtype=dtype)])
    assert (unit, found) == (2.0 ** (-2 - bits), dtype)


@pytest.mark.parametrize("option", ["eps", "lr", "weight_decay"])
def test_an_infinite_option_is_refused(option):
    """It would turn every weight into NaN at the first step."""
    with pytest.raises(InputError, match=f"^{option} must be finite, got inf$"):
        MeZO(torch.nn.Linear(2, 2).named_parameters(), **{option: float("inf")})


def test_views_that_share_elements_are_refused_and_others_are_not():
    """Rows within a matrix move twice; two halves of its columns are neighbours in memory alone."""
    matrix = torch.randn(6, 4)
    with pytest.raises(InputError, match="parameters all and some share memory"):
        MeZO([("all", torch.nn.Parameter(matrix)), ("some", torch.nn.Parameter(matrix[2:4]))])
    columns = [(str(i), torch.nn.Parameter(matrix[:, i : i + 2])) for i in (0, 2)]
    assert len(MeZO(columns).trained()) == 2
    with pytest.raises(InputError, match="parameters 0 and even share memory"):
        MeZO([columns[0], ("even", torch.nn.Parameter(matrix[:, ::2]))])
    with pytest.raises(InputError, match="parameter w is expanded"):
        MeZO([("w", torch.nn.Parameter(torch.randn(1, 4).expand(3, 4)))])


CHANGED = [
    ("lr", math.nan, "lr must be at least 0, got nan"),
    ("lr", math.inf, "lr must be finite, got inf"),
    ("lr", "0.1", "lr must be a number"),
    ("weight_decay", None, "weight_decay must be a number, got None"),
    ("eps", 0, "eps must be positive, got 0"),
    ("num_samples", 1.5, "num_samples must be a whole number, got 1.5"),
    ("clip", "x", "clip must be a number"),
    ("distribution", "normal", "distribution must be gaussian"),
    ("perturbation", "zebra", "perturbation must be in_place"),
    ("estimator", "three_point", "estimator must be two_point"),
    ("rule", "adamw", "rule must be one of"),
]


@pytest.mark.parametrize(("name", "value", "words"), CHANGED)
def test_an_option_that_a_schedule_makes_impossible_is_refused_before_anything_moves(
    name, value, words
):
    """A rate of nan went on into the weights: options were looked at when the run began, only."""
    model = Regression()
    optimizer = MeZO(model.named_parameters(), seed=1)
    optimizer.step(model)
    before = weights(model).clone()
    optimizer.param_groups[0][name] = value
    with pytest.raises(InputError, match=words):
        optimizer.step(model)
    assert torch.equal(weights(model), before)


def test_a_rate_is_looked_at_between_an_estimate_and_its_update_too():
    model = Regression()
    optimizer = MeZO(model.named_parameters(), seed=1, perturbation="scratch")
    before = weights(model).clone()
    optimizer.estimate(model)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(InputError, match="lr must be at least 0, got nan"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()  # the estimate is still there
    assert not torch.equal(weights(model), before)


def test_a_rule_may_be_put_into_a_group_as_a_name_or_a_value():
    """As the constructor takes it; it was a TypeError about mappings."""
    found = []
    for rule in (rules.Momentum(0.5), {"name": "momentum", "momentum": 0.5}):
        model = Regression()
        optimizer = MeZO(model.named_parameters(), seed=1, lr=1e-2)
        optimizer.param_groups[0]["rule"] = rule
        optimizer.step(model)
        optimizer.step(model)
        found.append(weights(model))
    assert torch.equal(*found)


def test_two_parameters_of_one_name_are_refused():
    """They would be perturbed by the same z, and a log could not tell them apart."""
    one, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    for params in ([("w", one), ("w", other)], [{"params": [("w", p)]} for p in (one, other)]):
        with pytest.raises(InputError, match="two parameters have the name w"):
            MeZO(params)


@pytest.mark.parametrize(
    ("key", "told"), [("learning_rate", "mean lr"), ("epsilon", "mean eps"), ("betas", "nothing")]
)
def test_a_key_of_a_group_that_is_no_option_is_named(key, told, caplog):
    """It was kept and ignored: a whole run at the default rate."""
    MeZO([{"params": list(Regression().named_parameters()), key: 0.1, "name": "all"}])
    assert len(caplog.records) == 1
    assert key in caplog.text
    assert told in caplog.text


@pytest.mark.parametrize(("name", "value"), [("eps", 0.5), ("num_samples", 3), ("seed", 5)])
def test_a_later_group_cannot_change_alone_what_is_one_for_all(name, value):
    """The first group's value counts, and the other was ignored."""
    model = Regression()
    params = list(model.named_parameters())
    optimizer = MeZO([{"params": params[:1]}, {"params": params[1:]}], seed=1)
    optimizer.step(model)
    optimizer.param_groups[0]["eps"] = 2e-3  # as a schedule that knows of one group does
    optimizer.step(model)
    optimizer.param_groups[1][name] = value
    with pytest.raises(InputError, match=f"{name} is one for all parameter groups"):
        optimizer.step(model)
    optimizer.param_groups[0][name] = value
    optimizer.step(model)


@pytest.mark.parametrize("made", [np.int64, torch.tensor])
def test_whole_numbers_of_numpy_and_torch_are_pythons_own(made, tmp_path):
    """A seed of numpy ended in an AttributeError, one of torch in an OverflowError."""
    model, again = Regression(), Regression()
    optimizer = MeZO(model.named_parameters(), seed=made(3), num_samples=made(2))
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        optimizer.step(model)
    trajectory.replay(tmp_path / "run.mezo", again)
    assert type(optimizer.settings["seed"]) is int
    assert torch.equal(weights(model), weights(again))
    with pytest.raises(InputError, match="rank must be a whole number"):
        MeZO(model.named_parameters(), rank=made(3) / 2)


def test_a_state_of_another_order_or_another_optimizer_is_refused():
    """torch gives buffers by order, and the loaded names would draw each parameter another's z."""
    model = Regression()
    params = list(model.named_parameters())
    saved = MeZO(params[::-1], seed=1).state_dict()
    with pytest.raises(InputError, match="the state has the parameters in another order"):
        MeZO(params, seed=1).load_state_dict(saved)
    with pytest.raises(InputError, match="the state is of another optimizer than MeZO"):
        MeZO(params, seed=1).load_state_dict(torch.optim.Adam(params).state_dict())


def test_a_closure_that_reads_no_trained_parameter_is_told(caplog):
    """A copy of the model was evaluated, and nothing was learned without a word."""
    model, copy = Regression(), Regression()
    MeZO(model.named_parameters(), seed=1).step(copy)
    assert "reads none of the trained parameters" in caplog.text


@pytest.mark.parametrize("until", [1.5, "1", True])
def test_a_replay_until_what_is_no_whole_number_is_refused(until, tmp_path):
    """A fraction or a text was torch's or Python's own error, and True was step 1."""
    model = Regression()
    optimizer = MeZO(model.named_parameters(), seed=1)
    with trajectory.record(optimizer, tmp_path / "run.mezo") as writer:
        optimizer.step(model)
    with pytest.raises(InputError, match="until must be from 0 to 1, got"):
        trajectory.replay(tmp_path / "run.mezo", Regression(), until=until)
    with pytest.raises(InputError, match="the log is closed"):
        writer.digest()
