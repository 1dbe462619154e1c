"""The learning rate where none is given: found, told, and in the run's records."""

import json
import re
from dataclasses import replace

import pytest
import torch
from folders import OWN, mezo, model_folder, reviews, training

from mezo import MeZO, MeZOConfig, tasks, trajectory
from mezo.errors import InputError
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives import form_for
from mezo.runs import plan, rates
from mezo.runs.arguments import RewardTrainArguments, TrainArguments
from mezo.runs.data import task_of
from mezo.runs.data_arguments import DataArguments
from mezo.runs.examiner import Horizon, Landscape
from mezo.runs.text import DPOArguments, SFTArguments


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rates")
    model_folder(folder / "tiny")
    reviews(folder / "reviews.jsonl")
    return folder


def without_rate(place, output_dir, *more):
    argv = training(place, place / "tiny", output_dir=output_dir, max_steps=2, eval_steps=1)
    return ["train", *(word for word in argv if not word.startswith("--learning_rate")), *more]


def taken(model=None, **options):
    """(learning rate, eps) for causal-lm, which has 19.1 million weights."""
    model = ModelArguments(**({"model_name_or_path": "causal-lm"} | (model or {})))
    found = rates.resolved(model, TrainArguments("x", use_cpu=True, **options))
    return found.learning_rate, found.mezo_eps


def test_it_follows_what_is_trained_and_how_large_the_model_is():
    number = models.parameters_of(ModelArguments("causal-lm"))
    assert number == 19_112_448
    assert taken() == taken({"trainable": "bias|norm"}) == rates.mezo(number, "") == (3e-5, 1e-3)
    assert taken({"trainable": "head"}) == rates.mezo(number, "head")
    assert taken({"use_peft": True}) == rates.mezo(number, "lora") == (1.2e-3, 1e-2)
    assert taken({"use_peft": True, "peft_type": "prefix"}) == rates.mezo(number, "prefix")
    assert taken({"use_peft": True, "peft_type": "ia3"}) == rates.mezo(number, "lora")
    assert taken({"use_peft": True}, method="adam")[0] == rates.adam(number, "lora")
    large = rates.mezo(13_000_000_000, "")[0]
    assert large == 3.1e-7  # Table 16: 1e-7 to 1e-6


def test_a_saved_adapter_is_told_by_its_config(place, tmp_path):
    model, _ = models.load(ModelArguments(str(place / "tiny"), use_peft=True, peft_type="prefix"))
    model.save_pretrained(tmp_path)
    given = {"use_peft": True, "peft_type": "prefix", "model_name_or_path": str(place / "tiny")}
    assert taken({"model_name_or_path": str(tmp_path)}) == taken(given)
    assert taken(given) != taken(given | {"peft_type": "lora"})


def test_what_is_given_wins_and_other_faces_keep_their_defaults():
    assert taken(learning_rate=5e-4) == (5e-4, 1e-3)
    assert taken({"use_peft": True}, mezo_eps=0.5) == (1.2e-3, 0.5)
    assert taken(learning_rate=5e-4, method="adam") == (5e-4, None)
    assert taken(method="lp") == (None, None)
    assert (MeZOConfig.learning_rate, MeZOConfig.mezo_eps) == (1e-6, 1e-3)


@pytest.mark.parametrize("arguments", [RewardTrainArguments, SFTArguments, DPOArguments])
def test_rewards_and_text_take_the_rates_of_tasks(arguments):
    """`mezo sft --use_peft` trained at 1e-6, which changes next to nothing, and did not say so."""
    model = ModelArguments("causal-lm", use_peft=True)
    found = rates.resolved(model, arguments("x", use_cpu=True))
    assert (found.learning_rate, found.mezo_eps) == (1.2e-3, 1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adam"}, "rule adam needs a --learning_rate"),
        ({"shaping": "ranks"}, "shaping ranks needs"),
        ({"estimator": "one_point"}, "estimator one_point needs"),
        ({"modified": "expectation"}, "modified expectation needs"),
    ],
)
def test_a_step_of_another_scale_needs_a_rate_of_its_own(options, message):
    """Adam's and sign's rate is the size of a weight's step; momentum's adds up over steps."""
    with pytest.raises(InputError, match=message):
        taken(**options)
    assert taken(**options, learning_rate=1e-5) == (1e-5, 1e-3)


def test_the_rate_is_told_in_a_line_and_is_in_every_record(place, tmp_path, capsys):
    lora = without_rate(place, tmp_path / "run", "--use_peft", "--json")
    code, out, err = mezo(capsys, *lora)
    assert code == 0, err
    number = models.parameters_of(ModelArguments(str(place / "tiny")))
    rate, eps = rates.mezo(number, "lora")
    measured = re.search(f"learning_rate (.+), mezo_eps {eps:g}: the rate was measured", err)
    by_size = f"learning_rate {rate:g}, mezo_eps {eps:g}: chosen for lora and a model of this size"
    assert (measured is None) == (err.count(by_size) == 1)  # one line, whichever it is
    assert (measured is None) == ("the estimates on this model tell no learning rate" in err)
    rate = rate if measured is None else float(measured[1])
    log = trajectory.read(tmp_path / "run" / "run.mezo")
    for config in (json.loads(out)["config"], log.header["config"]):
        assert (config["learning_rate"], config["mezo_eps"]) == (rate, eps)
    assert {(step.eps, *step.lrs) for step in log.steps} == {(eps, rate)}
    given = without_rate(place, tmp_path / "given", "--learning_rate=1e-3")
    _, _, err = mezo(capsys, *given)
    assert "for all weights" not in err


def form_and_examples(place):
    """The tiny model, its form on the reviews, and these."""
    model, tokenizer = models.load(ModelArguments(str(place / "tiny")))
    data = DataArguments(train_file=str(place / "reviews.jsonl"), prompt=OWN[1], candidates=OWN[3:])
    task = task_of(data)
    examples = tasks.load_examples(task, "train", files=data.train_file)
    return model, form_for(model, tokenizer, task), examples


def test_measuring_a_rate_moves_no_weight_and_is_the_horizon_of_its_estimates(place, monkeypatch):
    """A log begins with the fingerprints of the base: in place they would have been off."""
    model, form, examples = form_and_examples(place)
    before = {name: p.clone() for name, p in model.named_parameters()}
    args = TrainArguments("x", use_cpu=True, learning_rate=1.0, mezo_eps=1e-3)
    land = Landscape(signal=115.0, pull=4.2e5, loss=0.85, size=11.0, clear=True, gradient={})
    seen = []
    monkeypatch.setattr(rates.Landscape, "of", lambda pairs, size: seen.append(pairs) or land)
    rate = rates.measured(model, form, examples, args, 500)
    assert rate == float(f"{Horizon(115.0, 4.2e5, 0.85, 500).best_rate():.2g}")
    assert len(seen[0]) == rates.DIRECTIONS
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    unclear = replace(land, clear=False)
    monkeypatch.setattr(rates.Landscape, "of", lambda pairs, size: unclear)
    assert rates.measured(model, form, examples, args, 500) is None
    assert rates.measured(model, form, examples[:1], args, 500) is None


def test_a_rate_is_measured_where_none_is_given_and_not_when_a_run_goes_on(place, tmp_path):
    """A run that goes on has the rate that its log has."""

    def settled(**options):
        args = TrainArguments(str(tmp_path), use_cpu=True, **options)
        return plan.resolve(ModelArguments(str(place / "tiny")), DataArguments(), args)

    assert settled().measures
    assert not settled(learning_rate=1e-3).measures
    assert not settled(method="adam").measures
    assert not settled(offload=True).measures
    net = torch.nn.Linear(2, 1)
    optimizer = MeZO(net.named_parameters(), lr=0.125)
    config = {"learning_rate": 0.125, "mezo_eps": 0.25}
    with trajectory.record(optimizer, tmp_path / "run.mezo", config=config):
        optimizer.step(lambda: net(torch.ones(2)).sum())
    going_on = settled(resume_from_checkpoint="true")
    assert not going_on.measures
    assert (going_on.args.learning_rate, going_on.args.mezo_eps) == (0.125, 0.25)


def test_a_mistake_is_still_one_line(place, tmp_path, capsys):
    code, _, err = mezo(capsys, *without_rate(place, tmp_path / "run", "--peft_type=prefix"))
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = mezo(capsys, *without_rate(place, tmp_path / "run", "--model=./none"))
    assert (code, err) == (2, "mezo: model ./none: no such folder\n")


def test_a_cell_without_a_rate_of_its_own_is_found_again(place, tmp_path, capsys):
    """And one that had another is not taken for it."""
    (tmp_path / "grid.yaml").write_text("seed: [1]\n")
    argv = without_rate(place, tmp_path / "grid", f"--grid={tmp_path / 'grid.yaml'}")
    argv = [word for word in argv if not word.startswith("--seed")]
    assert "run: seed=1" in mezo(capsys, *argv)[2]
    code, _, err = mezo(capsys, *argv)
    assert (code, "found: seed=1" in err) == (0, True)
    code, _, err = mezo(capsys, *argv, "--learning_rate=1e-30")
    assert (code, "with learning_rate" in err) == (2, True)


@pytest.mark.parametrize(
    ("parameters", "part", "rate", "eps"),
    [
        (19.1e6, "", 3e-5, 1e-3),  # causal-lm, as it was found
        (355e6, "", 3.9e-6, 1e-3),  # RoBERTa-large: Table 15 has 1e-7 to 1e-5
        (1.316e9, "", 1e-6, 1e-3),  # opt-1.3b, which the README names: Table 16 ends at 1e-6
        (12.85e9, "", 3.1e-7, 1e-3),
        (65.72e9, "", 1e-7, 1e-3),  # opt-66b: and begins at 1e-7
        (1.316e9, "head", 1e-6, 1e-3),
        (3_009_024, "lora", 3e-3, 1e-2),
        (1.316e9, "lora", 1e-4, 1e-2),  # Table 16: 5e-5 to 1e-4
        (65.72e9, "lora", 5e-5, 1e-2),
        (12.85e9, "ia3", 5e-5, 1e-2),  # what is not listed is as LoRA
        (3_009_024, "prefix", 9.8e-2, 1e-1),
        (1.316e9, "prefix", 4.7e-3, 1e-1),  # Table 16: 1e-3 to 1e-2
        (65.72e9, "prompt", 1e-3, 1e-1),
    ],
)
def test_the_rates_by_size_are_these(parameters, part, rate, eps):
    """Literals, so that a change of the table is seen; the large ones lie in the paper's grids."""
    assert rates.mezo(int(parameters), part) == (rate, eps)


@pytest.mark.parametrize(
    ("parameters", "part", "rate"),
    [
        (3_009_024, "", 2.9e-4),
        (12.85e9, "", 1e-5),  # Table 16: 1e-5 to 8e-5
        (3_009_024, "lora", 9.8e-4),
        (12.85e9, "head", 1e-4),
        (3_009_024, "prefix", 9.8e-3),
        (12.85e9, "prompt", 1e-3),
    ],
)
def test_the_rates_of_adam_by_size_are_these(parameters, part, rate):
    assert rates.adam(int(parameters), part) == rate
