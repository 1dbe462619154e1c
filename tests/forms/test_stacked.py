"""Full rank in one pass: each half of the rows sees its own perturbed weights."""

import copy

import pytest
import torch
from buffers import Largest
from models import ARCHITECTURES, Counted, architecture, tiny_model
from recording import Recording

from mezo import MeZO, noise, trajectory
from mezo.closures import Paired, double
from mezo.forms.graphs import Graphs
from mezo.forms.one_pass import Unpaired
from mezo.noise import Move

EPS, SEED = 1e-2, 3
WORDS = torch.randint(5, 90, (3, 20), generator=torch.Generator().manual_seed(0))
MODELS = ["opt", "llama", "qwen2", "gpt2", "bert", "roberta"]


def optimizer_of(model, **options):
    options = {"eps": EPS, "seed": SEED, "perturbation": "scratch"} | options
    return MeZO(model.named_parameters(), **options)


def two_and_one(model, call, rows, **options):
    """Outputs of two passes, one behind the other, and of one pass."""
    direction, halves = optimizer_of(model, **options).direction(0), []
    with torch.no_grad():
        plain = model(**call).logits  # first: rwkv rescales its weights in its first pass
        for sign in (+1, -1):
            with direction.at(sign):
                halves.append(model(**call).logits)
        read, direction.read = set(direction.read), set()
        with direction.both(rows):
            found = model(**double(call)).logits
        assert direction.read == read
        assert (halves[0] - plain).abs().max() > 0
    return torch.cat(halves), found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_one_pass_gives_the_numbers_of_two_up_to_their_rounding(name):
    """Tied embeddings, Conv1D, norms and positions; float64, some 10^4 of its roundings."""
    two, one = two_and_one(tiny_model(name), {"input_ids": WORDS}, len(WORDS))
    assert (one - two).abs().max() <= 1e4 * 2.0**-53 * two.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_is_stacked_rightly_or_refused(name):
    """float32, as experts want it: 2^11 of its roundings at most, of the largest logit."""
    call = {"input_ids": WORDS[:2, :11], "use_cache": False}
    call |= {"decoder_input_ids": WORDS[:2, :11]} if name == "t5" else {}
    try:
        two, one = two_and_one(architecture(name, torch.float32), call, 2)
    except Unpaired:
        return
    assert (one - two).abs().max() <= 2.0**-13 * two.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_rounded_as_in_two_passes(dtype):
    """The products' inputs have the same bits, so that only their own rounding differs."""
    model = tiny_model("llama").to(dtype)
    two, one = two_and_one(model, {"input_ids": WORDS}, len(WORDS))
    direction = optimizer_of(model).direction(0)
    with torch.no_grad():
        halves = []
        for sign in (+1, -1):
            with direction.at(sign):
                halves.append(model.lm_head(torch.eye(16, dtype=dtype)))
        with direction.both(16):
            found = model.lm_head(torch.eye(16, dtype=dtype).repeat(2, 1))
    assert torch.equal(found, torch.cat(halves))  # x is the identity: the weights themselves
    assert (one - two).float().abs().mean() <= 16 * torch.finfo(
        dtype
    ).eps * two.float().abs().mean()


def test_scales_and_masks_hold_in_one_pass():
    model = tiny_model("opt")
    name = "model.decoder.layers.0.fc1.weight"
    layers = {"scales": {name: 3.0}, "thresholds": {name: 0.2, "lm_head.weight": 0.1}}
    layers["thresholds"].pop("lm_head.weight")
    two, one = two_and_one(model, {"input_ids": WORDS}, len(WORDS), layers=layers)
    assert (one - two).abs().max() <= 1e4 * 2.0**-53 * two.abs().max()


def test_no_step_makes_a_thing_of_more_than_two_matrices():
    model = torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.Linear(300, 2))
    x = torch.ones(2, 40)

    def halves(both):
        with both(2):
            plus, minus = model(torch.cat([x, x])).chunk(2)
        return plus.sum(), minus.sum()

    optimizer = optimizer_of(model, lr=1e-3)
    for _ in range(2):
        with Largest() as largest:
            optimizer.step(Paired(lambda: model(x).sum(), halves, full_rank=True))
        assert largest.elements == 2 * 40 * 300
    assert optimizer.memory.paired is True


def paired(model, full_rank):
    closure = model.paired()
    return Paired(closure.alone, closure.halves, full_rank)


def test_a_step_is_one_forward_pass_that_replays_and_the_log_says_so(tmp_path, caplog):
    """The first step makes four more, to see that it is the same."""
    caplog.set_level("INFO", "mezo")
    model, base, twin, counts = Counted(), Counted(), Counted(), []
    optimizer, plain = optimizer_of(model, lr=1e-3), optimizer_of(twin, lr=1e-3)
    with trajectory.record(optimizer, tmp_path / "run.mezo"):
        for _ in range(6):
            before = model.calls
            optimizer.step(paired(model, True))
            counts.append(model.calls - before)
            plain.step(paired(twin, False))
    assert counts == [2 + 5] + [1] * 5  # the first step looks at the loss, too
    assert caplog.text.count("both losses come from one forward pass") == 1
    trajectory.replay(tmp_path / "run.mezo", base)
    assert all(map(torch.equal, base.parameters(), model.parameters()))
    # a loss near 4 is off by 8 roundings of float32, a projected_grad by 1 / eps of that
    slack = 6 * 1e-3 * 8 * 4 * 2.0**-24 / EPS * 5
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() <= slack


def test_by_default_a_cpu_takes_two_passes():
    """One pass there is no faster, and its losses would have other last bits than before."""
    model = Counted()
    optimizer = optimizer_of(model, lr=1e-3)
    for _ in range(2):
        optimizer.step(paired(model, None))
    assert model.calls == 2 + 4  # the first step looks at the loss, too
    assert optimizer.memory.paired is None


@pytest.mark.parametrize("fault", ["turned", "transposed"])
def test_what_cannot_be_stacked_takes_two_passes_and_says_so_once(fault, caplog):
    model, twin = Counted(fault == "turned"), Counted(fault == "turned")
    closure = model.paired()

    def halves(both):
        if fault == "transposed":  # 6 rows are not those of the batch
            with both(batch_size=len(model.x)):
                model(model.x.view(2, 4, 6)[:, :3])
        return closure.halves(both)

    optimizer, plain = (optimizer_of(m, lr=1e-3) for m in (model, twin))
    for _ in range(3):
        optimizer.step(Paired(closure.alone, halves, full_rank=True))
        plain.step(twin.paired().alone)
    assert optimizer.memory.paired is False
    assert caplog.text.count("two forward passes a step instead of one") == 1
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


class Coarse(Counted):
    """A loss of about 12.5 in bfloat16, whose steps are 0.06; one pass is off by one of them."""

    def paired(self):
        closure = super().paired()

        def halves(both):
            plus, minus = closure.halves(both)
            return (12.5 + 0.01 * plus).bfloat16() + 0.0625, (12.5 + 0.01 * minus).bfloat16()

        return Paired(lambda: (12.5 + 0.01 * closure.alone()).bfloat16(), halves, True)


@pytest.mark.parametrize("perturbation", ["scratch", "low_rank"])
def test_one_pass_may_be_off_by_a_unit_of_the_losss_own_dtype(perturbation, caplog):
    """Such a step of a bfloat16 loss was taken for a fault of the model."""
    model = Coarse()
    optimizer = optimizer_of(model, lr=1e-3, perturbation=perturbation)
    optimizer.step(model.paired())
    assert optimizer.memory.paired is True
    assert "two forward passes" not in caplog.text


def test_one_draw_for_both_signs_has_the_bits_of_two():
    weights = torch.randn(40, 77).bfloat16()
    key, both = noise.tensor_key(1, "w"), torch.empty(2, 40, 77, dtype=torch.bfloat16)
    tables = [noise.table([Move(5, 2, 1.0, c, noise.ROUND_PERTURBED)]) for c in (1e-2, -1e-2)]
    noise.apply_both_(both, key, *tables, source=weights)
    for found, moves in zip(both, tables, strict=True):
        expected = weights.clone()
        noise.apply_(expected, key, moves)
        assert torch.equal(found, expected)


def test_a_stacked_pass_is_captured_and_replayed(tmp_path):
    """Loss, log and weights are those of stacked passes without graphs."""
    found = {}
    for graphs in (None, Graphs(backend=Recording(twice=True))):
        model = Counted()
        optimizer = optimizer_of(model, lr=1e-3)

        def squares(x, model=model):
            return model(x)

        def halves(both, model=model, graphs=graphs, squares=squares):
            with both(len(model.x)):
                x = torch.cat([model.x, model.x])
                plus, minus = (graphs(squares, x) if graphs else squares(x)).chunk(2)
            return plus.mean(), minus.mean()

        closure = Paired(lambda model=model: model(model.x).mean(), halves, full_rank=True)
        losses = [optimizer.step(closure) for _ in range(8)]
        found[graphs is None] = losses, copy.deepcopy(model.state_dict())
        if graphs:
            assert graphs.backend.replays >= 5
    assert found[True][0] == found[False][0]
    assert all(torch.equal(found[True][1][name], found[False][1][name]) for name in found[True][1])


@pytest.mark.gpu
def test_on_the_device_full_rank_takes_one_pass_that_agrees_with_two():
    """The first step compares; a model that could not be stacked would warn."""
    model = architecture("opt", torch.bfloat16).cuda()
    words = WORDS.cuda()

    def rows(ids):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.mT, ids, reduction="none").mean(1)

    def halves(both):
        with both(len(words)):
            plus, minus = rows(torch.cat([words, words])).chunk(2)
        return plus.mean(), minus.mean()

    optimizer = optimizer_of(model, lr=1e-4)
    for _ in range(3):
        optimizer.step(Paired(lambda: rows(words).mean(), halves))
    assert optimizer.memory.paired is True
