"""Captured forward passes: replays see each step's batch and z, as plain runs do."""

import copy

import pytest
import torch
from models import llama
from recording import Recording
from torch import nn

from mezo import MeZO, noise, trajectory
from mezo.errors import InputError
from mezo.forms.graphs import Graphs
from mezo.noise import Move, live

SHAPES = [(2, 5), (3, 4)]  # of the batches, by turns


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        ids = torch.randint(64, SHAPES[step % 2], generator=generator)
        # with a mask of two dimensions, transformers looks at its values: a capture cannot
        past = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        yield {"input_ids": ids, "labels": ids, "attention_mask": past.expand(len(ids), 1, -1, -1)}


def trained(graphs, dtype, steps=16, log=None, device="cpu", **options):
    """Losses and weights of a run in which every call goes through `graphs`, or none."""
    model = llama().to(device, dtype).eval()

    def loss(batch):
        return model(**batch, use_cache=False).loss

    optimizer = MeZO(model.named_parameters(), lr=1e-2, eps=1e-2, seed=3, **options)
    writer = trajectory.record(optimizer, log, model=model) if log else None
    losses = []
    for batch in batches(steps):
        batch = {key: value.to(device) for key, value in batch.items()}
        call = (lambda b=batch: graphs(loss, b)) if graphs else (lambda b=batch: loss(b))
        losses.append(optimizer.step(call))
    optimizer.write()
    if writer is not None:
        writer.close()
    return losses, [p.detach().cpu() for p in model.parameters()]


LOW_RANK = {"perturbation": "low_rank", "interval": 8}
CASES = [
    (torch.float32, {"perturbation": "scratch"}),
    (torch.bfloat16, {"num_samples": 2}),
    (torch.bfloat16, {"distribution": "rademacher", "estimator": "one_sided"}),
    (torch.float32, {"perturbation": "in_place"}),
    (torch.float32, {"perturbation": "scratch", "layers": {"scales": {"lm_head.weight": 3.0}}}),
    (torch.float32, LOW_RANK),
    (torch.bfloat16, LOW_RANK | {"rank": 2, "num_samples": 2}),
]


@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_a_run_of_replays_has_the_bits_of_a_plain_run(dtype, options, tmp_path):
    """Two shapes of batches by turns; each sign of each is captured once, whatever the step."""
    backend = Recording(twice=True)
    graphs = Graphs(backend=backend)
    plain = trained(None, dtype, log=tmp_path / "plain.mezo", **options)
    found = trained(graphs, dtype, log=tmp_path / "graphs.mezo", **options)
    assert found[0] == plain[0]
    assert all(map(torch.equal, found[1], plain[1]))
    assert (tmp_path / "graphs.mezo").read_bytes() == (tmp_path / "plain.mezo").read_bytes()
    in_place = options.get("perturbation") == "in_place"
    kinds = 1 if in_place else 2  # in place, the weights themselves have the sign
    kinds *= options.get("num_samples", 1) if "interval" in options else 1
    assert len(backend.tapes) == 2 * kinds
    assert backend.replays > 8


@pytest.mark.parametrize("perturbation", ["scratch", "low_rank"])
def test_a_plain_pass_before_a_capture_lends_it_nothing(perturbation):
    """Micro-batches of one estimate share draws; a graph that reads them would repeat them."""
    found = []
    for graphs in (None, Graphs(backend=Recording())):
        model = llama().eval()

        def loss(batch, model=model):
            return model(**batch, use_cache=False).loss

        call = graphs or (lambda function, batch: function(batch))
        options = {"perturbation": perturbation, "interval": 4}
        optimizer = MeZO(model.named_parameters(), lr=1e-2, eps=1e-2, seed=3, **options)
        for step, (batch, other) in enumerate(zip(batches(14), batches(14), strict=True)):
            first = {"input_ids": batch["input_ids"][:, :1].repeat(1, step + 7)}
            first["attention_mask"] = torch.ones(1, 1, step + 7, step + 7, dtype=torch.bool).tril()
            first |= {"labels": first["input_ids"]}
            optimizer.step(lambda a=first, b=other, f=loss, c=call: c(f, a) + c(f, b))
        optimizer.write()
        found.append([p.detach() for p in model.parameters()])
    assert graphs.backend.replays > len(graphs.backend.tapes)
    assert all(map(torch.equal, *found))


def test_a_replay_draws_nothing_of_the_step_that_was_captured():
    """Else every step would move along one direction: the noise reads its step when it runs."""
    tables = live.Tables({"step": 4, "probe": 1, "first": 4})
    p, key = torch.zeros(3000), noise.tensor_key(0, "w")
    with live.using(tables):
        noise.apply_(p, key, [Move(4, 1, 1.0, 0.5)])
        with pytest.raises(live.Unrecordable, match=r"steps \[5\]"):
            noise.apply_(p, key, [Move(5, 1, 1.0, 0.5)])
        with pytest.raises(live.Unrecordable, match="has no kernel"):
            noise.apply_(p.double(), key, [Move(4, 1, 1.0, 0.5)])
    moves = tables.live(noise.table([Move(4, 1, 1.0, 0.5)]))
    tables.set_({"step": 7, "probe": 2, "first": 7})
    assert moves.tolist() == noise.table([Move(7, 2, 1.0, 0.5)]).tolist()


class Syncs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        y = self.layer(x).square().mean()
        return y * 2 if float(y) < 0 else y


@pytest.mark.parametrize("form", ["scratch", "low_rank"])
def test_a_model_that_waits_for_the_device_runs_plainly_and_the_line_says_where(form, caplog):
    """A warning for each step would hide all others. What half a capture drew is not used."""
    model, graphs = Syncs(), Graphs(backend=Recording())
    plain = copy.deepcopy(model)
    for net, call in ((plain, lambda f, b: f(b)), (model, graphs)):
        optimizer = MeZO(net.named_parameters(), lr=1e-2, seed=1, perturbation=form)
        for step in range(6):
            optimizer.step(lambda n=net, c=call, s=step: c(n, torch.full((3, 4), 1.0 + s)))
    assert torch.equal(model.layer.weight, plain.layer.weight)
    (line,) = [r.getMessage() for r in caplog.records if "no graph" in r.getMessage()]
    assert "not permitted when stream is capturing" in line
    assert "test_graphs.py" in line
    assert "in forward" in line


def test_a_graph_that_gives_another_result_is_never_used(caplog):
    """Python that changes its mind from call to call cannot be seen in a capture."""
    calls = []

    def fickle(x):
        calls.append(x)
        return x.sum() * len(calls)

    graphs = Graphs(backend=Recording())
    with torch.no_grad():
        found = [float(graphs(fickle, torch.ones(2))) for _ in range(5)]
    assert found == [2.0, 4.0, 6.0, 10.0, 12.0]  # the fourth call was the capture
    assert "another result than a plain run" in caplog.text


def test_another_kernel_is_no_fault_and_says_so(caplog):
    """Attention takes another kernel in a capture: logits near 0 are off by their size."""
    caplog.set_level("INFO", "mezo")
    calls, noise_of_16_bits = [], torch.tensor([0.01, -0.01, 0.02, 0.0])

    def rounded(x):
        calls.append(x)
        return torch.cat([x * 0.001, x, -torch.inf * x]) + (
            noise_of_16_bits.repeat(3) * (len(calls) % 2)
        )

    graphs, x = Graphs(after=1, backend=Recording()), torch.full((4,), 3.0)
    with torch.no_grad():
        for _ in range(3):
            graphs(rounded, x)
    assert graphs.backend.replays == 2
    assert "differ from a plain run's in their rounding" in caplog.text


def test_a_tensor_on_another_device_keeps_a_call_plain():
    """A kernel takes a number from the host when it is captured, and would keep it."""
    graphs = Graphs(after=0, backend=Recording())
    with torch.no_grad():
        for n in (2.0, 3.0):
            batch = torch.ones(2), torch.ones((), device="meta")
            assert float(graphs(lambda given, n=n: given[0].sum() * n, batch)) == 2 * n
    assert not graphs.captured


def test_no_more_graphs_are_kept_than_asked_for(caplog):
    """Each holds the memory of a forward pass."""
    graphs = Graphs(most=1, after=0, backend=Recording())
    with torch.no_grad():
        for n in (2, 3, 4, 2, 3):
            assert float(graphs(torch.sum, torch.ones(n))) == n
    assert len(graphs.backend.tapes) == 1
    assert graphs.backend.replays == 2
    assert caplog.text.count("1 graphs are kept") == 1


def test_an_error_of_the_model_is_the_models_own():
    """It is raised as it would be without graphs, and theta is what it was."""

    def broken(x):
        raise InputError("no such batch")

    with torch.no_grad(), pytest.raises(InputError, match="no such batch"):
        Graphs(after=0, backend=Recording())(broken, torch.ones(2))


def test_without_a_device_and_with_gradients_functions_are_called_plainly():
    """Adam on a GPU needs its backward pass."""
    graphs = Graphs()
    for _ in range(4):
        with torch.no_grad():
            assert float(graphs(torch.sum, torch.ones(2))) == 2
    assert not graphs.captured
    backend = Recording()
    x = torch.ones(2, requires_grad=True)
    for _ in range(4):
        Graphs(after=0, backend=backend)(torch.sum, x).backward()
    assert not backend.tapes


# What needs a device: python -m pytest -m gpu tests/forms/test_graphs.py


def test_around_a_model_its_calls_are_replayed_and_its_forward_is_its_own_again():
    """A loop needs no other closures; outputs are of the model's own class."""
    model, backend = llama().eval(), Recording()
    graphs, (batch, *_) = Graphs(backend=backend), batches(1)
    with torch.no_grad():
        plain = model(**batch)
        with graphs.around(model):
            for _ in range(5):
                found = model(**batch)
            assert backend.replays == 3
            assert type(found) is type(plain)
            assert torch.equal(found.logits, plain.logits)
            assert "past_key_values" not in found
            kept = model.forward
        with graphs.around(model):  # once more: what was captured serves again
            model(**batch)
        assert backend.replays == 4
    assert "forward" not in vars(model)
    assert kept(**batch).loss.requires_grad  # somebody who kept it gets the model's own


def test_autocast_casts_are_a_part_of_the_graph():
    """A cast of a weight that was made before the capture would be read after it is freed."""
    backend = Recording()
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        graphs = Graphs(backend=backend, after=0)
        graphs(layer, x)
        layer.weight.fill_(2.0)
        torch.clear_autocast_cache()
        assert torch.equal(graphs(layer, x), layer(x))
    assert backend.replays == 2


def test_shapes_that_never_come_again_are_told_once(caplog):
    graphs = Graphs(most=1, backend=Recording())
    with torch.no_grad():
        for n in range(1, 200):
            assert float(graphs(torch.sum, torch.ones(n))) == n
    assert caplog.text.count("pad them to few lengths") == 1
    assert len(graphs.captured) <= 64


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "options"), CASES)
def test_on_the_device_a_run_of_graphs_has_the_bits_of_a_plain_run(dtype, options):
    graphs = Graphs()
    plain = trained(None, dtype, device="cuda", **options)
    found = trained(graphs, dtype, device="cuda", **options)
    assert sum(known.replay is not None for known in graphs.captured.values()) >= 2
    assert found[0] == plain[0]
    assert all(map(torch.equal, found[1], plain[1]))


@pytest.mark.gpu
def test_on_the_device_a_failed_capture_leaves_a_run_that_goes_on(caplog):
    """The allocator and the current stream are what they were; later captures succeed."""
    model, graphs = Syncs().cuda(), Graphs()
    stream = torch.cuda.current_stream()
    with torch.no_grad():
        for step in range(5):
            x = torch.full((3, 4), 1.0 + step, device="cuda")
            assert float(graphs(model, x)) == float(model(x))
        assert torch.cuda.current_stream() == stream
        assert "in forward" in caplog.text
        big = torch.empty(2**26, device="cuda")
        del big
        torch.cuda.empty_cache()
        for n in range(5):
            x = torch.full((4,), float(n), device="cuda")
            assert float(graphs(torch.sum, x)) == 4 * n
    assert any(known.replay is not None for known in graphs.captured.values())
