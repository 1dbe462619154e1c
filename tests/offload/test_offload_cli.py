"""--offload on the command line: `mezo train`, `sft`, `dpo`, `--reward` and `eval`, bit for bit."""

import json
import shlex
from importlib.util import find_spec

import pytest
from folders import OWN, mezo, model_folder, reviews, same_weights, training

from mezo import closures, trajectory
from mezo.trainers.task import MeZOTaskTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # of datasets
]
TEXTS = [("no wit , only", " labored gags"), ("a charming", " journey . It was great")] * 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    model_folder(folder / "tiny")
    model_folder(folder / "encoder", "encoder")
    reviews(folder / "reviews.jsonl")
    rows = [{"prompt": p, "chosen": c, "rejected": " dull boring"} for p, c in TEXTS]
    write(folder / "preferences.jsonl", rows)
    write(folder / "pairs.jsonl", [{"prompt": p, "completion": c} for p, c in TEXTS])
    write(folder / "prompts.jsonl", [{"prompt": p} for p, _ in TEXTS])
    (folder / "short.py").write_text(
        "def short(completions, **rest):\n    return [-len(c) for c in completions]\n"
    )
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(place, verb, *more, model="tiny"):
    """A run of a few steps; --output_dir is still to be given."""
    if verb == "train":
        return ["train", *training(place, place / model), *more]
    file = {"sft": "pairs", "dpo": "preferences", "reward": "prompts"}[verb]
    options = {"model": place / model, "train_file": place / f"{file}.jsonl", "max_steps": 3}
    options |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2}
    options |= {"use_cpu": True, "disable_tqdm": True, "seed": 5}
    words = [f"--{name}={value}" for name, value in options.items()]
    if verb == "reward":
        words += ["--reward", f"{place}/short.py:short", "--eval_steps=2"]
        words += ["--max_completion_length=4"]
    return ["train" if verb == "reward" else verb, *words, *more]


RUNS = {
    "train": ("train", ["--load_best_model_at_end=true", "--calibrate"]),
    "train, half": ("train", ["--dtype=bfloat16", "--num_samples=2"]),
    "train, frozen": ("train", ["--freeze_layers=1"]),
    "train, prefix": ("train", ["--use_peft", "--peft_type=prefix"]),
    "reward": ("reward", []),
    "sft": ("sft", []),
    "dpo": ("dpo", []),
}
SLOW = {
    "train, low rank": ("train", ["--perturbation=low_rank", "--interval=3"]),
    "train, LoRA": ("train", ["--use_peft"]),
    "sft, LoRA": ("sft", ["--use_peft"]),
    "dpo, references before": ("dpo", ["--precompute_ref_log_probs=true"]),
    "dpo, LoRA": ("dpo", ["--use_peft"]),
}
CASES = [pytest.param(*run, id=name) for name, run in RUNS.items()]
CASES += [pytest.param(*run, id=name, marks=pytest.mark.slow) for name, run in SLOW.items()]


@pytest.mark.parametrize(("verb", "more"), CASES)
def test_a_run_is_that_without_offload(place, tmp_path, capsys, monkeypatch, verb, more):
    """What is saved, logged and told; weights wait in the host's memory.

    Offload takes two passes for the signs of an adapter, and so does the other run here.
    """
    monkeypatch.setattr(closures, "_FEW", 0)
    if verb in ("sft", "dpo") and find_spec("trl") is None:
        pytest.skip("needs TRL")
    told = []
    for name, option in (("here", []), ("away", ["--offload"])):
        argv = command(place, verb, *more, *option, f"--output_dir={tmp_path / name}", "--json")
        code, out, err = mezo(capsys, *argv)
        assert code == 0, err
        told.append(json.loads(out))
    assert_the_same(tmp_path / "here", tmp_path / "away")
    for key in ("zero_shot", "test", "before", "after", "samples", "train_loss", "eval_loss"):
        if key in told[0]:
            assert told[1][key] == told[0][key]


def assert_the_same(here, away):
    assert same_weights(here, away)
    one, other = ([s.record for s in trajectory.read(d / "run.mezo").steps] for d in (here, away))
    assert one == other


def test_an_interrupted_run_in_a_file_goes_on(place, tmp_path, capsys, monkeypatch):
    """Ctrl-C: exit code 130, and the same command goes on to the same end."""
    options = ["--offload", f"--offload_folder={tmp_path / 'disk'}", "--offload_write_every=3"]
    argv = command(place, "train", "--save_steps=4", "--load_best_model_at_end=false")
    mezo(capsys, *argv, f"--output_dir={tmp_path / 'here'}")
    argv += [*options, f"--output_dir={tmp_path / 'away'}"]
    steps, step = [], MeZOTaskTrainer.training_step

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as changed:
        changed.setattr(MeZOTaskTrainer, "training_step", interrupted)
        code, _, err = mezo(capsys, *argv)
    assert code == 130
    assert len(trajectory.read(tmp_path / "away/run.mezo").steps) == 2
    assert "--resume_from_checkpoint true" in err
    code, _, err = mezo(capsys, *argv, "--resume_from_checkpoint=true")
    assert code == 0, err
    assert_the_same(tmp_path / "here", tmp_path / "away")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize(
    "verb", ["train", *(pytest.param(verb, marks=pytest.mark.slow) for verb in ("sft", "reward"))]
)
def test_nothing_is_written_but_the_log(place, tmp_path, capsys, verb):
    """What was seen of the run is that of one that writes; the next command makes the model."""
    if verb == "sft" and find_spec("trl") is None:
        pytest.skip("needs TRL")
    here = command(place, verb, "--load_best_model_at_end=false")
    away = [*here, "--save_strategy=no", "--offload", "--offload_write_every=0"]
    mezo(capsys, *here, f"--output_dir={tmp_path / 'here'}")
    code, _, err = mezo(capsys, *away, f"--output_dir={tmp_path / 'away'}")
    assert code == 0, err
    assert not list((tmp_path / "away").glob("*.safetensors"))
    argv = shlex.split(err.splitlines()[-1].removeprefix("next: mezo "))
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "made")
    code, _, err = mezo(capsys, *argv)
    assert code == 0, err
    assert same_weights(tmp_path / "made", tmp_path / "here")


def test_evaluation_reads_a_model_block_by_block(place, capsys):
    argv = ["eval", f"--model={place / 'tiny'}", f"--test_file={place / 'reviews.jsonl'}", *OWN]
    argv += ["--calibrate", "--json"]
    code, here, _ = mezo(capsys, *argv)
    assert (code, mezo(capsys, *argv, "--offload")[:2]) == (0, (0, here))


@pytest.mark.parametrize(
    ("verb", "more", "words"),
    [
        ("train", ["--method=adam", "--learning_rate=1e-5"], "not for adam"),
        ("train", ["--method=lp"], "not for lp"),
        ("train", ["--rule=adam"], "rule adam cannot be combined with offload"),
        ("train", ["--load_in_4bit"], "offload cannot be combined with load_in_4bit"),
        ("train", ["--offload_write_every=0"], "set save_strategy no"),
        ("reward", ["--rule=momentum"], "rule momentum cannot be combined with offload"),
        ("eval", ["--replay=x"], "mezo replay --by_tensor"),
        ("eval", ["--tasks=x"], "--offload cannot be used with --tasks"),
    ],
)
def test_refused_in_one_line(place, tmp_path, capsys, verb, more, words):
    argv = ["eval", f"--model={place / 'tiny'}", f"--test_file={place / 'reviews.jsonl'}", *OWN]
    if verb != "eval":
        argv = [*command(place, verb), f"--output_dir={tmp_path}"]
    code, _, err = mezo(capsys, *argv, *more, "--offload")
    assert code == 2
    assert words in err.splitlines()[-1]


def test_a_model_is_not_saved_over_the_files_it_is_read_from(place, capsys):
    argv = [*command(place, "train"), f"--output_dir={place / 'tiny'}", "--offload"]
    code, _, err = mezo(capsys, *argv)
    assert code == 2
    assert "is the model's own folder" in err
