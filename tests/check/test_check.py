"""`mezo check`: its statistics on closed forms, its warnings where each is due, its words."""

import itertools
import json
import math
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from folders import OWN, mezo, model_folder, reviews
from torch.nn import functional as F

from mezo import objectives
from mezo.check import measure as check
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.objectives import progress
from mezo.runs.data_arguments import DataArguments
from mezo.runs.examiner import Examiner

UNIT = 2.0**-24  # rounding of float32, half a unit in the last place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("my files")
    for kind in ("opt", "encoder"):
        model_folder(folder / kind, kind)
    reviews(folder / "reviews.jsonl")
    return folder


def data(place, **changes):
    file = str(place / "reviews.jsonl")
    options = {"train_file": file, "dev_file": file, "prompt": OWN[1], "candidates": OWN[3:]}
    return DataArguments(**(options | changes))


def checked(place, kind="opt", model=None, task=None, **options):
    """Of a random model of two layers; 4 directions, so that a check takes a second."""
    model = ModelArguments(str(place / kind), **(model or {}))
    options = {"batch_size": 4, "directions": 4} | options
    return check.check(model, data(place, **(task or {})), **options)


@pytest.fixture(scope="module")
def found(place):
    return checked(place)


def said(found, word, **changes):
    """(level, text) of the finding that holds a word, the numbers changed."""
    told = check.findings(check.Measurements.of(found | changes))
    return next((f["level"], f["text"]) for f in told if word in f["text"])


def test_changes_are_relative_and_say_nothing_of_infinite_losses():
    grads = np.array([[1.1, 1.0, 3.0], [-1.1, -1.0, -1.0]])
    assert check.changes(grads) == pytest.approx((0.1, math.sqrt(2)))
    assert all(map(math.isnan, check.changes(np.zeros((2, 3)))))
    assert check.changes(np.array([[1.0, 1.0, math.inf]])) == (0.0, math.inf)
    assert math.isnan(check.changes(np.array([[1.0, math.inf, 1.0]]))[0])


def test_a_step_goes_as_far_as_a_cubic_keeps_its_slope():
    """Its slope changes as eps^2: by 1 at 10 eps, so by 1/4 at 5 eps. Not beyond 10 eps, unseen."""
    assert check.reach(1e-3, 1.0) == pytest.approx(5e-3)
    assert check.reach(1e-3, 0.25) == check.reach(1e-3, 1e-6) == pytest.approx(1e-2)
    assert check.reach(1e-3, math.inf) == 0.0
    assert check.reach(1e-3, math.nan) == check.reach(1e-3, 0.0) == 1e-3


class Linear(torch.nn.Module):
    """Scores linear in the weights, in float64: H is G, and no more than smooth."""

    dtype = torch.float64

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        start = torch.randn(5, 3, dtype=self.dtype, generator=generator)
        self.weight = torch.nn.Parameter(start)


class OfLinear:
    """As much of a form as `measure` asks for."""

    def collate(self, features):
        x, labels = zip(*features, strict=True)
        return {"x": torch.stack(x), "labels": torch.tensor(labels)}

    def scores(self, model, batch):
        return batch["x"] @ model.weight

    def loss(self, model, batch):
        return F.cross_entropy(self.scores(model, batch), batch["labels"])


def test_measured_curvature_is_that_of_the_loss():
    """Second differences and the scores agree: to eps^2 / 12 times the fourth derivative along z,
    at most |x z|^4 < 1e4, and to 4 roundings of 2^-53 over eps^2; both under 1e-5 here."""
    generator, eps = torch.Generator().manual_seed(4), 1e-4
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    features = [(row, i % 3) for i, row in enumerate(x)]
    probe = Examiner(Linear(), OfLinear(), seed=1)
    with torch.no_grad():
        found = check.measure(probe, features, eps, 20, 6, 100)
        loss = probe.loss(probe.batch(features))
        seen = probe(probe.batch(features), 0, eps)
    ahead = 2 * (seen.loss - loss) / eps**2
    assert seen.curvature == pytest.approx(ahead, abs=1e-5)
    assert seen.grads.mean() == pytest.approx(seen.grad, abs=1e-11)  # 2^-53 over eps
    assert min(found["hessian"], found["trace"]) > 0


def test_the_weights_stay_where_they_are():
    """Scratch: to the bit. In place: 3 roundings of a number below 4, a call."""
    for dtype, calls in ((torch.bfloat16, 0), (torch.float32, 9)):
        model = Linear().to(dtype)
        model.dtype = dtype
        weight = model.weight.detach()
        before = weight.clone()
        probe = Examiner(model, OfLinear(), seed=1)
        x = torch.ones(4, 5, dtype=dtype)
        batch = {"x": x, "labels": torch.tensor([0, 1, 2, 0])}
        state = torch.get_rng_state()
        with torch.no_grad():
            for direction in range(9):
                probe(batch, direction, 1e-2)
        assert torch.equal(torch.get_rng_state(), state)
        assert float((weight - before).abs().max()) <= calls * 3 * 4 * UNIT


def test_what_is_measured_is_json_and_repeats(place, found):
    """But for time and memory."""
    again = checked(place)
    moving = ("seconds", "step_seconds", "forward_seconds", "bytes", "findings")
    assert {k: v for k, v in found.items() if k not in moving} == {
        k: v for k, v in again.items() if k not in moving
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["bytes"]["weights"] == 4 * found["trained"]["parameters"]
    assert found["trained"]["perturbation"] == "in_place"
    assert {f["level"] for f in found["findings"]} <= {"ok", "note", "warning"}


def test_a_random_model_is_warned_of(found):
    level, text = said(found, "zero-shot")
    assert level == "warning"
    assert "MeZO needs a model that nearly solves the task" in text
    good = found["prompt"] | {"accuracy": 0.9}
    assert said(found, "zero-shot", prompt=good)[0] == "ok"


def test_dropout_is_named_and_off(found):
    level, text = said(found, "The same estimate")
    assert (level, "dropout [0.1] is switched off, as MeZO runs in eval mode" in text) == (
        "ok",
        True,
    )


def test_a_model_that_is_not_deterministic_is_warned_of(place, monkeypatch):
    scores, calls = objectives.Causal._scores, itertools.count()

    def drifting(self, model, batch):
        return scores(self, model, batch) * (1 + 1e-4 * next(calls))

    monkeypatch.setattr(objectives.Causal, "_scores", drifting)
    level, text = said(checked(place, directions=2), "The same estimate")
    assert (level, ": the forward pass is not deterministic" in text) == ("warning", True)


def test_the_learning_rate_is_compared_with_the_best_of_the_run(place, found):
    """Not with that of a single step, which a run of thousands does not survive."""
    best = found["run_lr"]
    assert 0 < best < found["best_lr"]
    assert found["next"]["learning_rate"] == float(f"{best / (1 if found['clear'] else 3):.0e}")
    assert said(found, "best learning rate")[1].count("Tables 15, 16") == 1
    assert "20,000 steps" in said(found, "best learning rate")[1]
    assert said(found, "The learning rate", lr=best)[0] == "ok"
    for rate in (best / 20, 4 * best):
        assert said(found, "The learning rate", lr=rate)[0] == "note"
    level, text = said(found, "The learning rate", lr=1e-12)
    assert (level, "expected to lower the loss by about 0%" in text) == ("note", True)
    level, text = said(checked(place, lr=10.0, directions=2), "expected to")
    assert (level, "raise the loss, as the noise" in text) == ("warning", True)


def test_a_shorter_run_may_take_larger_steps(place, found):
    assert checked(place, steps=50)["run_lr"] > found["run_lr"]
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        checked(place, steps=0)


def test_a_gradient_in_the_noise_gives_a_bound(found):
    """And a negative share, which an unbiased estimate may give, is no share at all."""
    level, text = said(
        found, "distinguishable", clear=False, share=-0.2, share_error=0.2, share_at_most=0.2
    )
    assert level == "note"
    assert "not distinguishable from noise with 4 directions: it is at most 20%" in text
    assert "(-20% ± 20%)" in text
    assert "at most" in said(found, "best learning rate", clear=False)[1]
    _, text = said(found, "Of its square", clear=True, share=0.2)
    assert "a batch four times as large, one step is worth 2.5" in text  # 4 / (1 + 3 share)
    careful = check.advice(check.Measurements.of(found | {"clear": False}))["learning_rate"]
    assert careful == float(f"{found['run_lr'] / 3:.0e}")


def test_an_eps_of_rounding_in_bfloat16_is_warned_of(place):
    found = checked(place, model={"dtype": "bfloat16"}, eps=1e-6)
    assert found["trained"]["perturbation"] == "scratch"
    unit = found["last_place"]
    level, text = said(found, "eps 1e-06 is too small")
    assert (level, f"take {4 * unit:.0e}" in text) == ("warning", True)
    assert found["next"]["mezo_eps"] == float(f"{4 * unit:.0e}")
    assert said(found, "No learning rate can be derived")[0] == "warning"
    assert found["next"]["learning_rate"] is None
    assert (
        "stochastic rounding keeps such updates in the mean"
        in said(found, "lr * |projected_grad|")[1]
    )
    nearest = found["trained"] | {"rounding": "nearest"}
    assert said(found, "rounded away", trained=nearest, lr=1e-12)[0] == "warning"


def test_eps_is_steady_where_its_neighbours_agree(found):
    ends = {"eps": 1e-3, "eps_low": 0.01, "eps_high": 0.5}
    assert said(found, "eps 0.001", **ends)[1].endswith("steady from 0.0001 to 0.001.")
    assert said(found, "eps 0.001", **(ends | {"eps_high": 0.02}))[1].endswith("0.0001 to 0.01.")
    assert check.advice(check.Measurements.of(found | ends))["mezo_eps"] == 1e-3
    torn = {"eps": 1e-3, "eps_low": 0.3, "eps_high": None}
    assert said(found, "eps 0.001", **torn)[0] == "warning"
    assert check.advice(check.Measurements.of(found | torn))["mezo_eps"] == 3e-4
    assert check.advice(check.Measurements.of(found | torn | {"eps_high": 0.2}))["mezo_eps"] == 3e-3
    assert (
        check.advice(check.Measurements.of(found | torn | {"gap": 0.0}))["mezo_eps"] == 3e-3
    )  # rounding below


def test_losses_that_are_not_finite_are_counted_or_refused(place, found, monkeypatch):
    assert said(found, "not finite", lost=2)[0] == "warning"
    loss = objectives.Causal.loss
    monkeypatch.setattr(objectives.Causal, "loss", lambda *args: loss(*args) * math.nan)
    with pytest.raises(InputError, match="the loss is finite along 0 of 2 directions"):
        checked(place, directions=2)


def test_a_loss_that_does_not_change_is_said(place, monkeypatch):
    scores = objectives.Causal._scores
    monkeypatch.setattr(objectives.Causal, "_scores", lambda *args: 0 * scores(*args))
    found = checked(place, directions=2)
    assert found["share"] is None
    assert said(found, "changes along no direction")[0] == "warning"
    assert said(found, "The two losses")[0] == "warning"


def test_candidates_and_examples_are_as_they_are_found(place, found):
    level, text = said(found, "candidates")
    assert (level, text.endswith("' terrible' (Ġterrible), ' great' (Ġgreat).")) == ("ok", True)
    more = {"candidates": [" terrible movie", " great"]}
    longer = checked(place, task=more, directions=2, batch_size=64)
    level, text = said(longer, "candidates")
    assert (level, "' terrible movie' (Ġterrible Ġmovie)" in text) == ("note", True)
    assert longer["batch_size"] == 12  # of 24 examples, none of them in both
    assert said(longer, "two batches of 12, not 64")[0] == "note"


def test_what_is_trained_is_what_was_asked_for(place):
    lora = checked(place, model={"use_peft": True}, directions=2)
    assert lora["trained"]["kind"] == "LORA"
    assert "1e-5 to 1e-4 for RoBERTa-large, 5e-5 to" in said(lora, "best learning rate")[1]
    assert "the paper takes 1e-3 or 1e-2" in said(lora, "eps 0.01")[1]
    other = lora["trained"] | {"paper": None}
    assert "its own" not in said(lora, "best learning rate", trained=other)[1]
    part = checked(place, "encoder", model={"trainable": "bias"}, directions=2)
    assert part["trained"]["parameters"] < part["trained"]["of"]
    assert "descriptions" in said(part, "candidates")[1]
    upper = checked(place, model={"freeze_layers": 1}, directions=2)
    assert upper["trained"]["kind"] == "a part of the weights"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": math.nan}, "eps must be positive, got nan"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"directions": 1}, "directions must be at least 2, got 1"),
        ({"task": {"num_train": 1}}, "there is 1 training example: two batches need two"),
    ],
)
def test_bad_values_are_refused_before_the_model_is_loaded(options, message, place):
    with pytest.raises(InputError, match=message):
        checked(place, "no model", **options)


def command(place, *more, model="opt"):
    file = place / "reviews.jsonl"
    argv = ["check", f"--model={place / model}", f"--train_file={file}", f"--dev_file={file}"]
    return [*argv, *OWN, "--per_device_train_batch_size=4", "--directions=2", *more]


def test_the_command_prints_findings_and_suggests_a_run(place, capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST", 0.0)  # instead of after ten seconds
    monkeypatch.setattr(progress, "EVERY", 0.0)
    code, out, err = mezo(capsys, *command(place, "--learning_rate", "10"))
    lines = out.splitlines()
    levels = [line[:5] for line in lines if line[:5].strip()]  # other lines continue a finding
    assert (code, len(levels), max(map(len, lines)) <= 100) == (0, 15, True)
    assert set(levels) <= {"ok   ", "note ", "WARN "}
    assert levels.count("WARN ") >= 2  # the model, the rate
    words = shlex.split(err.splitlines()[-1])
    assert words[:3] == ["next:", "mezo", "train"]
    assert words[-2:] == ["--output_dir", "runs/custom"]
    assert f"--model={place / 'opt'}" in words
    assert {"--candidates", " terrible", " great"} <= set(words)
    assert not {"--directions=2", "--json", "10"} & set(words)
    assert words.count("--learning_rate") == words.count("--mezo_eps") == 1
    assert "direction 1/2" in err  # without a terminal, a line says how far it is
    assert "direction 2/2" in err


def test_json_is_one_line(place, capsys):
    code, out, _ = mezo(capsys, *command(place, "--json", "--mezo_eps=1e-2"))
    assert (code, out.count("\n"), json.loads(out)["eps"]) == (0, 1, 1e-2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mezo_eps=0"], "eps must be positive, got 0.0"),
        (["--per_device_train_batch_size=0"], "batch_size must be at least 1, got 0"),
        (["--mezo_epz=1"], "unknown option --mezo_epz; did you mean --mezo_eps?"),
        (["--learning_rate=much"], "invalid float value: 'much'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(more, message, place, capsys):
    code, out, err = mezo(capsys, *command(place, *more))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_help_is_quick():
    code = (
        "import sys, mezo.cli.main as c; c.main(['check', '-h']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  --{name} " in done.stdout for name in ("mezo_eps", "learning_rate", "json"))
