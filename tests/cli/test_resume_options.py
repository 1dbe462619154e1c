"""`mezo train --output_dir DIR --resume_from_checkpoint true`: all else comes from the log."""

import json
import shutil

import pytest
from folders import OWN, mezo, model_folder, reviews, same_weights, training

from mezo import trajectory
from mezo.cli.going_on import with_log
from mezo.runs import task as run
from mezo.runs.arguments import TrainArguments
from mezo.trainers.task import MeZOTaskTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator:UserWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, data, a whole run, and one that was stopped at step 3, after its checkpoint."""
    folder = tmp_path_factory.mktemp("resume")
    model_folder(folder / "tiny")
    reviews(folder / "reviews.jsonl")
    reviews(folder / "others.jsonl", 20)
    return folder


@pytest.fixture(scope="module")
def stopped(place):
    step, seen = MeZOTaskTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    argv = training(place, place / "tiny", output_dir=place / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeZOTaskTrainer, "training_step", interrupted)
        seen.append(mezo_code(["train", *argv]))
    assert seen == [130]
    return place / "stopped"


def mezo_code(argv):
    from mezo.cli.main import main

    return main(argv)


@pytest.fixture
def copied(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def resumed(capsys, folder, *more):
    argv = ["--output_dir", folder, "--resume_from_checkpoint", "true", "--use_cpu", *more]
    return mezo(capsys, "train", *argv)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_the_readme_s_command_goes_on_with_model_data_and_options(
    place, copied, checkpoint, capsys, tmp_path
):
    """It loaded the default model, and ended in a traceback, or in another task."""
    if not checkpoint:
        shutil.rmtree(copied / "checkpoint-2")
    code, _, err = mezo(
        capsys, "train", *training(place, place / "tiny", output_dir=tmp_path / "w")
    )
    assert code == 0, err
    code, out, err = resumed(capsys, copied, "--json")
    assert code == 0, err
    assert "resuming the run of" in err
    result = json.loads(out.splitlines()[-1])
    whole = json.loads((tmp_path / "w" / "result.json").read_text())
    assert same_weights(copied, tmp_path / "w")
    for name in ("task", "model", "test", "steps", "kept_step", "curve"):
        assert result[name] == whole[name]
    assert result["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)  # float32's sums
    places = {"output_dir": None, "logging_dir": None, "resume_from_checkpoint": None}
    assert result["config"] | places == whole["config"] | places


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--task", "sst2"], "has task opinions, not sst2"),
        (["--seed", "6"], "has seed 5, not 6"),
        (["--train_file", "others.jsonl"], "has train_file .*reviews.jsonl, not .*others.jsonl"),
        (["--k", "2"], "has k None, not 2"),
        (["--use_peft"], "has use_peft False, not True"),
    ],
)
def test_another_run_s_option_is_refused_before_anything_is_loaded(
    place, copied, more, what, capsys, monkeypatch
):
    """With another data set the run went on and said nothing."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("mezo.trainers.placement.load", lambda *_: 1 / 0)
    before = (copied / "run.mezo").read_bytes()
    more = [*more, *OWN] if "--train_file" in more or "--k" in more else more
    code, out, err = resumed(capsys, copied, *more)
    assert (code, out) == (2, "")
    import re

    assert re.search(what, err), err
    assert (copied / "run.mezo").read_bytes() == before


def test_more_steps_and_another_rate_are_taken_and_reported(copied, capsys, caplog):
    code, out, err = resumed(
        capsys, copied, "--max_steps=5", "--learning_rate=5e-4", "--json", "--num_test=9"
    )
    assert code == 0, err
    assert "learning_rate is 0.0005 from here on" in caplog.text
    result = json.loads(out.splitlines()[-1])
    assert (result["steps"], result["config"]["learning_rate"]) == (5, 5e-4)
    assert result["test"]["n"] == 9
    lrs = [step.lrs[0] for step in trajectory.read(copied / "run.mezo").steps]
    assert lrs == [1e-3] * 3 + [5e-4] * 2


def test_a_log_names_no_code_to_run(tmp_path, capsys, place):
    """A log may come from somebody else: rewards and trust_remote_code are not taken from it."""
    from mezo.models.arguments import ModelArguments
    from mezo.runs.arguments import RewardTrainArguments
    from mezo.runs.data_arguments import RewardArguments

    config = {"seed": 1, "learning_rate": 1.0, "reward": ["evil.py:run"], "train_file": "p.jsonl"}
    config |= {"trust_remote_code": True, "hub_model_id": "x", "push_to_hub": True, "mezo_eps": 0.1}
    config |= {"rule": "evil:Rule", "estimator": "evil:estimate"}
    config |= {"deepspeed": "evil.json", "output_dir": "/elsewhere", "max_steps": 7}
    _log(tmp_path / "run.mezo", config)
    words = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "true"]
    kinds = (ModelArguments, RewardArguments, RewardTrainArguments)
    taken = with_log(words, kinds, "reward")[: -len(words)]
    names = {word.split("=")[0] for word in taken}
    assert names == {"--seed", "--learning_rate", "--train_file", "--mezo_eps", "--max_steps"}
    code, _, err = mezo(capsys, "train", *words)
    assert code == 2
    assert "is the log of a run of mezo train --reward: resume with that command" in err


def _log(path, config):
    import torch

    from mezo import MeZO

    optimizer = MeZO([("w", torch.nn.Parameter(torch.zeros(3)))])
    trajectory.record(optimizer, path, config=config).close()


def test_the_function_refuses_what_the_command_would_fill_in(place, copied):
    """A Python caller's defaults are as good as given: nothing goes on with another task."""
    from mezo.errors import InputError
    from mezo.models.arguments import ModelArguments
    from mezo.runs.data_arguments import DataArguments

    args = TrainArguments(str(copied), resume_from_checkpoint="true", use_cpu=True)
    with pytest.raises(InputError, match=r"has .*, not "):
        run.train(ModelArguments(str(place / "tiny")), DataArguments(), args)
