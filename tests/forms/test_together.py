"""Several directions of a step, and both signs of an adapter, in one pass: a group of rows each."""

import copy

import pytest
import torch
from models import Counted, llama, tiny_model
from recording import Recording

from mezo import MeZO, trajectory
from mezo.closures import Paired, Stacking, copies, repeated
from mezo.forms.graphs import Graphs
from mezo.models.adapters import with_adapter
from mezo.models.arguments import ModelArguments

EPS, SEED, N = 1e-2, 3, 4
WORDS = torch.randint(5, 60, (3, 20), generator=torch.Generator().manual_seed(0))


def optimizer_of(model, **options):
    options = {"lr": 1e-3, "eps": EPS, "seed": SEED, "num_samples": N} | options
    return MeZO(model.named_parameters(), **options)


def closure_of(model, directions=N, full_rank=None, turn=None):
    """The loss of `Counted`; `turn` mixes up the losses of the copies."""

    def halves(both):
        with both(len(model.x)):
            found = model(torch.cat([model.x] * copies(both)))
        losses = [part.mean() for part in found.split(len(model.x))]
        return turn(losses) if turn and len(losses) > 2 else losses

    return Paired(lambda: model(model.x).mean(), halves, full_rank, directions)


def slack(steps):
    """A loss near 4 is off by 8 roundings of float32, a projected_grad by 1 / eps of that."""
    return steps * 1e-3 * 8 * 4 * 2.0**-24 / EPS * 5


FORMS = {"low_rank": None, "scratch": True, "in_place": True}  # and what they are asked


@pytest.mark.parametrize("perturbation", FORMS)
@pytest.mark.parametrize("most", [N, 3])
def test_a_step_of_several_directions_is_few_passes_and_replays(perturbation, most, tmp_path):
    """Its estimates are those of a pass for each sign, to rounding; the log is that of any run."""
    model, base, twin, counts = Counted(), Counted(), Counted(), []
    asked = {"perturbation": perturbation}
    optimizer, plain = optimizer_of(model, **asked), optimizer_of(twin, **asked)
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        for _ in range(6):
            before = model.calls
            optimizer.step(closure_of(model, most, FORMS[perturbation]))
            counts.append(model.calls - before)
            plain.step(closure_of(twin).alone)
    # the first step looks at the loss, and compares a pass with one for each sign, and one at theta
    first = 2 + (1 + 2 * most + 1) + 1
    first += 0 if most == N else 1 + 3 + 1  # the last direction is alone, and compared by itself
    assert counts == [first] + [1 if most == N else 2] * 5
    assert optimizer.memory.stacked is True
    if perturbation == "low_rank":
        optimizer.write()
        plain.write()
    trajectory.replay(tmp_path / "run.mezo", base)
    assert all(map(torch.equal, base.parameters(), model.parameters()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() <= slack(6)


@pytest.mark.parametrize("perturbation", FORMS)
def test_directions_that_are_mixed_up_take_a_pass_each_and_say_so_once(perturbation, caplog):
    """Two directions that change places would train on each other's losses."""
    model, twin = Counted(), Counted()
    asked, full = {"perturbation": perturbation}, FORMS[perturbation]
    optimizer, plain = optimizer_of(model, **asked), optimizer_of(twin, **asked)
    for _ in range(3):
        optimizer.step(closure_of(model, N, full, lambda losses: losses[2:] + losses[:2]))
        plain.step(closure_of(twin, 1, full))
    assert (optimizer.memory.stacked, optimizer.memory.paired) == (False, True)
    assert caplog.text.count("one direction a forward pass instead of several: one pass gives") == 1
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_copies_that_do_not_fit_in_memory_take_a_pass_for_each_direction(caplog):
    """At first, or later, when a batch is longer: the run goes on."""
    model, full = Counted(), []

    def turn(losses):
        if full:
            raise torch.OutOfMemoryError("8 copies")
        return losses

    optimizer = optimizer_of(model, perturbation="low_rank")
    optimizer.step(closure_of(model, turn=turn))
    assert optimizer.memory.stacked is True
    full.append(True)
    for _ in range(2):
        before = model.calls
        optimizer.step(closure_of(model, turn=turn))
    assert model.calls - before == N
    assert optimizer.memory.stacked is False
    assert caplog.text.count("instead of several: 8 copies") == 1


def test_a_closure_that_returns_two_losses_for_more_copies_is_told_and_takes_pairs(caplog):
    model = Counted()
    closure = closure_of(model, turn=lambda losses: losses[:2])
    optimizer = optimizer_of(model, perturbation="low_rank")
    optimizer.step(closure)
    assert "the closure's halves returned 2 losses for 8 copies" in caplog.text
    assert optimizer.memory.paired is True


def test_matrices_of_a_large_model_are_not_multiplied_at_full_rank():
    """Each direction would take two copies of the largest; low rank takes two small factors."""
    model = torch.nn.Linear(2000, 1000, bias=False)
    directions = {
        form: optimizer_of(model, perturbation=form).direction(0)
        for form in ("scratch", "low_rank")
    }
    assert directions["scratch"].most() == 1
    assert directions["low_rank"].most() > N


def test_a_captured_pass_of_several_directions_draws_those_of_its_step():
    """Full rank: one graph for directions 0 and 1, and for 2 and 3."""
    found = {}
    for graphs in (None, Graphs(backend=Recording(twice=True))):
        for form in ("low_rank", "scratch"):
            model = Counted()
            optimizer = optimizer_of(model, perturbation=form, interval=50)

            def squares(x, model=model):
                return model(x)

            def halves(both, model=model, graphs=graphs, squares=squares):
                with both(len(model.x)):
                    x = torch.cat([model.x] * copies(both))
                    out = graphs(squares, x) if graphs else squares(x)
                return [part.mean() for part in out.split(len(model.x))]

            closure = Paired(lambda m=model: m(m.x).mean(), halves, True, directions=2)
            losses = [optimizer.step(closure) for _ in range(8)]
            found[form, graphs is None] = losses, copy.deepcopy(model.state_dict())
        if graphs:
            assert graphs.backend.replays >= 10
    for form in ("low_rank", "scratch"):
        (losses, theta), (same, other) = found[form, True], found[form, False]
        assert losses == same
        assert all(torch.equal(theta[name], other[name]) for name in theta)


# ---- adapters

STACKED = ["lora", "prefix", "prompt", "p_tuning", "ia3", "ln_tuning", "vera", "lokr", "miss"]
APART = ["hra", "oft", "trainable_tokens"]  # matrices of the base computed anew, or rows reordered


def adapted(peft_type, dtype=None):
    options = '{"save_projection": false}' if peft_type == "vera" else '{"r": 4}'
    options = options if peft_type in ("vera", "miss") else "{}"
    if peft_type == "trainable_tokens":
        options = '{"token_indices": [6, 7, 8]}'
    asked = ModelArguments(use_peft=True, peft_type=peft_type, peft_options=options)
    return with_adapter(llama(), asked, 5).to(dtype).eval()


def losses_of(model, ids, times=1):
    logits = model(**repeated({"input_ids": ids}, times)).logits[:, -ids.shape[1] :].float()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].mT, ids.repeat(times, 1)[:, 1:], reduction="none"
    ).mean(1)


def words_of(model, ids, full_rank=True, directions=1):
    def halves(both):
        with both(len(ids)):
            return [x.mean() for x in losses_of(model, ids, copies(both)).split(len(ids))]

    return Paired(lambda: losses_of(model, ids).mean(), halves, full_rank, directions)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("peft_type", [*STACKED, *APART])
def test_both_signs_of_an_adapter_take_one_pass_or_two_and_a_line(peft_type, tmp_path, caplog):
    """The losses agree with those of two passes; the log replays to the bit either way."""
    model = adapted(peft_type)
    optimizer = optimizer_of(model, num_samples=1)
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        for _ in range(3):
            optimizer.step(words_of(model, WORDS[:, :9]))
    assert optimizer.perturbation == "in_place"
    assert optimizer.memory.paired is (peft_type in STACKED)
    told = caplog.text.count("two forward passes a step instead of one")
    assert told == (peft_type in APART)
    rebuilt = dict(trajectory.replay(tmp_path / "run.mezo", adapted(peft_type)).named_parameters())
    assert all(torch.equal(p, rebuilt[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapters_pass_gives_the_losses_of_two(dtype):
    """In place (float32) and in scratch, four directions."""
    found = {}
    for full_rank in (True, False):
        model = adapted("lora", dtype)
        start = [p.clone() for p in model.parameters()]
        optimizer = optimizer_of(model, lr=0.0)
        optimizer.watch.looks = False
        closure = words_of(model, WORDS[:, :9], full_rank, N)
        with torch.no_grad():
            losses = [optimizer.estimate(closure, probe).losses for probe in range(N)]
        if full_rank and dtype == torch.bfloat16:  # in place, a walk rounds theta
            assert all(map(torch.equal, model.parameters(), start))
        found[full_rank] = torch.tensor(losses, dtype=torch.float64)
    unit = torch.finfo(dtype).eps
    assert (found[True] - found[False]).abs().max() <= 16 * unit * 4.2
    assert (found[True][:, 0] - found[True][:, 1]).abs().min() > 0


def test_a_parameter_that_torchs_functions_do_not_read_takes_two_passes(caplog):
    """In place it is perturbed all the same; aside it would not be."""
    model = Counted()
    scripted = torch.jit.trace(model.first, model.x)

    class Traced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.x = scripted, model.last, model.x
            self.calls = 0

        def forward(self, x):
            return self.last(torch.tanh(self.first(x))).squeeze(-1) ** 2

    traced = Traced()
    optimizer = optimizer_of(traced, num_samples=1, perturbation="in_place")
    for _ in range(2):
        optimizer.step(closure_of(traced, 1, True))
    assert optimizer.memory.paired is False
    assert caplog.text.count("two forward passes a step instead of one") == 1


def test_what_pays_is_decided_by_the_batch_and_the_adapter():
    """Measured on a CPU: 1 x 32 tokens pay for an adapter's signs, 16 x 50 do not."""
    model, plain = adapted("lora"), llama()
    assert Stacking.of(model, 32) == (True, 16)
    assert Stacking.of(model, 800) == (None, 1)
    assert Stacking.of(plain, 32) == (None, 16)
    assert Stacking.of(model, 32).and_of(Stacking.of(model, 100)) == (True, 5)
    assert Stacking.of(model, 32).and_of(Stacking.of(model, 800)) == (None, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("perturbation", FORMS)
def test_on_the_device_several_directions_share_a_pass(perturbation, caplog):
    """Of all weights in low rank, of an adapter's otherwise; the first step compares."""
    model = tiny_model("opt") if perturbation == "low_rank" else adapted("lora")
    model, words = model.float().cuda(), WORDS.cuda()
    optimizer = optimizer_of(model, perturbation=perturbation, lr=1e-5)
    for _ in range(3):
        optimizer.step(words_of(model, words, True, N))
    assert optimizer.memory.stacked is True
    assert "instead of" not in caplog.text
