"""Methods of other papers, in experiments/rules: each to its closed form, replayed, trained."""

import copy
import sys

import pytest
import torch
from models import Line, Regression, Rows, weights

from experiments.rules import experts, subspaces
from experiments.rules.addax import Addax
from experiments.rules.anchored import Anchored
from experiments.rules.muon import ZOMuon, msign
from mezo import MeZO, MeZOConfig, MeZOTrainer, noise, trajectory
from mezo.errors import InputError
from mezo.rules import name_of, options, rule_class, rule_of

LOW = {"perturbation": "low_rank", "rank": 2, "interval": 3, "num_samples": 4}
RULES = [(Anchored(3.0), {}), (ZOMuon(), {}), (ZOMuon(vectors=0.1), LOW)]
FORMS = [
    (torch.float32, {}),
    (torch.float64, {"num_samples": 2}),
    (torch.float32, {"perturbation": "scratch", "weight_decay": 0.1}),
    (torch.bfloat16, {"rounding": "stochastic"}),
    (torch.bfloat16, {"rounding": "compensated"}),
]


class Matrix(torch.nn.Module):
    """Two layers and a loss, of matrices as thin as those that low rank is for."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = torch.nn.Linear(6, 5, dtype=dtype)
        self.last = torch.nn.Linear(5, 1, dtype=dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.x = torch.randn(16, 6, generator=generator).to(dtype)

    def forward(self):
        return self.last(self.first(self.x).tanh()).float().square().mean()


def run(model, path, steps=5, **given):
    optimizer = MeZO(model.named_parameters(), **{"lr": 1e-3, "seed": 5} | given)
    with trajectory.record(optimizer, path):
        for _ in range(steps):
            optimizer.step(model)
        optimizer.write()
    return optimizer


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("at", range(len(RULES)))
def test_every_rule_replays_and_resumes_to_the_bit(at, form, tmp_path):
    """The battery of test_extending.py, on matrices."""
    (rule, own), (dtype, given) = RULES[at], FORMS[form]
    if own and given.get("rounding") == "compensated":
        pytest.skip("low rank does not keep buffers of 16-bit weights")
    given = {"rule": rule} | given | own
    model, log = Matrix(dtype), tmp_path / "run.mezo"
    run(model, log, **given)
    base = trajectory.replay(log, Matrix(dtype), rules=[type(rule)])
    assert torch.equal(weights(base), weights(model))
    assert not torch.equal(weights(base), weights(Matrix(dtype)))

    half, rest = Matrix(dtype), Matrix(dtype)
    before = MeZO(half.named_parameters(), **{"lr": 1e-3, "seed": 5} | given)
    for _ in range(3):
        before.step(half)
    rest.load_state_dict(half.state_dict())
    after = MeZO(rest.named_parameters(), **{"lr": 1e-3, "seed": 5} | given)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for _ in range(2):
        after.step(rest)
    after.write()
    assert torch.equal(weights(rest), weights(model))


@pytest.mark.parametrize("at", range(len(RULES)))
def test_every_rule_is_its_options_and_trains_under_the_trainer(at, tmp_path):
    rule = RULES[at][0]
    known = {name_of(type(rule)): type(rule)}
    assert rule_of(options(rule, known), known) == rule
    given = f"{sys.modules[type(rule).__module__].__file__}:{type(rule).__name__}"
    args = MeZOConfig(
        str(tmp_path / "run"),
        rule=given,
        learning_rate=1e-3,
        max_steps=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = Line()
    MeZOTrainer(model, args, train_dataset=Rows()).train()
    log = tmp_path / "run" / "run.mezo"
    assert trajectory.read(log).header["rule"].endswith(f":{type(rule).__name__}")
    base = trajectory.replay(log, Line(), rules=[rule_class(given)])
    assert torch.equal(weights(base), weights(model))


@pytest.mark.parametrize("shape", [(40, 3), (3, 40), (7, 7), (9, 1)])
def test_msign_is_muons_newton_schulz_iteration(shape):
    """As of the published code: five quintic steps on X / |X|, with matrix products."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = g if shape[0] <= shape[1] else g.t()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.t()
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    expected = x if shape[0] <= shape[1] else x.t()
    assert (msign(g, 5) - expected).abs().max() < 1e-9
    assert torch.linalg.svdvals(msign(g, 5)).sub(0.95).abs().max() < 0.3


def test_a_step_of_zo_muon_is_the_sign_of_the_factor_times_v():
    """W - lr msign(mean of g_i U_i) V' / sqrt(rank), with U and V drawn here."""
    from mezo.forms import factors

    model, records = Matrix(), []
    before = model.first.weight.detach().clone()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, seed=5, rule=ZOMuon(), **LOW)
    optimizer.observers.append(records.append)
    optimizer.step(model)
    optimizer.write()
    settings, total = optimizer.settings | {"step": 0}, torch.zeros(5, 2, dtype=torch.float64)
    for i, g in enumerate(records[0].projected_grads):
        u = torch.zeros(5, 2, dtype=torch.float64)
        noise.apply_(u, factors.key_of("first.weight", "U", settings), [noise.Move(0, i, 1.0, 1.0)])
        total += g * u / 4
    v = factors.right_of(model.first.weight, "first.weight", settings, 0)
    expected = before - 1e-2 * msign(total, 5) @ v.t() / 2**0.5
    assert (model.first.weight - expected).abs().max() < 1e-12


def test_anchored_decay_shrinks_the_way_from_the_start():
    """On a flat loss nothing but the decay moves weights, back to where they began."""
    model, records = Regression(), []
    start = weights(Regression()).clone()
    given = {"lr": 1e-3, "seed": 5, "perturbation": "scratch"}
    optimizer = MeZO(model.named_parameters(), rule=Anchored(10.0), **given)
    optimizer.observers.append(records.append)
    for _ in range(3):
        optimizer.step(model)
    gone = weights(model) - start
    optimizer.step(lambda: torch.zeros(()))
    assert records[-1].projected_grads == (0.0,)
    assert (weights(model) - start - gone * (1 - 1e-3 * 10.0)).abs().max() < 1e-15
    with pytest.raises(InputError, match="decay must not be negative"):
        MeZO(model.named_parameters(), rule=Anchored(-1.0))


@pytest.mark.parametrize("kind", ["activations", "sensitive"])
def test_a_subspace_is_trained_and_replayed(kind, tmp_path):
    """A run in a subspace leaves what is outside of it, and replays where it is installed again."""
    model = Matrix()
    given = (2,) if kind == "activations" else (0.2,)
    found = getattr(subspaces, kind)(model, model, *given)
    bits = {name: t.clone() for name, t in Matrix().state_dict().items()}
    loss = float(model())
    subspaces.install(model, found)
    assert abs(float(model()) - loss) < 1e-12
    run(model, tmp_path / "run.mezo", lr=1e-2)
    other = Matrix()
    subspaces.install(other, found)
    trajectory.replay(tmp_path / "run.mezo", other)
    assert torch.equal(other.first.weight, model.first.weight)
    moved = model.first.weight.detach() - bits["first.weight"]
    assert moved.abs().max() > 0
    if kind == "activations":
        basis = found["first.weight"]
        assert (moved - moved @ basis @ basis.t()).abs().max() < 1e-12
        singular = torch.linalg.svd(model.x)[2][:2].t()  # the span of the largest inputs
        assert (basis @ basis.t() - singular @ singular.t()).abs().max() < 1e-9
    else:
        still = torch.ones(30, dtype=torch.bool)
        still[found["first.weight"]] = False
        assert moved.flatten()[still].abs().max() == 0
        assert sum(map(len, found.values())) == 7  # a fifth of the 35 elements of matrices


def test_the_most_sensitive_weights_are_those_of_the_largest_gradients():
    model = Matrix()
    found = subspaces.sensitive(model, model, 0.2)
    model().backward()
    grads = {n: p.grad.abs().flatten() for n, p in model.named_parameters() if p.dim() == 2}
    inside = torch.cat([grads[n][i] for n, i in found.items()])
    assert inside.min() == torch.cat([*grads.values()]).sort().values[-7]


def test_experts_are_the_directions_of_lowest_loss_and_vote(tmp_path):
    model, seen = Matrix(), []
    given = {"lr": 0.0, "eps": 0.1, "seed": 5, "estimator": experts.scored, "num_samples": 7}
    optimizer = MeZO(model.named_parameters(), perturbation="scratch", **given)
    start = weights(model).clone()
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        optimizer.step(lambda: seen.append(float(model())) or torch.tensor(seen[-1]))
    assert torch.equal(weights(model), start)
    del seen[:2]  # the first step looks at the loss twice
    record = trajectory.read(tmp_path / "run.mezo").steps[0].record
    chosen = experts.best(record, 3)
    assert [seen[i] for i in chosen] == sorted(seen)[:3]

    losses = []

    def predict():
        losses.append(float(model()))
        return torch.tensor([int(losses[-1] > sorted(seen)[1]), 0])

    votes = experts.vote(model, chosen, predict, seed=5, sigma=0.1)
    assert losses == pytest.approx(sorted(seen)[:3])
    assert votes.tolist() == [0, 0]  # two of three say 0 of the first example
    assert torch.equal(weights(model), start)


def test_a_step_of_addax_is_a_share_of_either_gradient():
    """theta - lr (alpha g0 z + (1 - alpha) g1), both at theta; no gradient is kept."""
    model, twin, records = Matrix(), Matrix(), []
    optimizer = MeZO(model.named_parameters(), seed=5, perturbation="scratch")
    optimizer.observers.append(records.append)
    twin().backward()
    Addax(optimizer, lr=1e-2, alpha=0.3).step(model, model)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        z = noise.draw(noise.tensor_key(5, name), 0, p.numel(), step=0).double().view(p.shape)
        g0 = records[0].projected_grads[0] * z
        expected = q - 1e-2 * (0.3 * g0 + 0.7 * q.grad)
        assert (p - expected).abs().max() < 1e-12
        assert p.grad is None
