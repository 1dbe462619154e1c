"""A log and a base model give the tuned model, in one line; an adapter alone; by the terminal."""

import json
import os
import subprocess
import sys

import pytest
import torch
from folders import mezo, reviews, same_weights, training
from models import tiny_model
from peft import PeftModel
from safetensors.torch import load_file
from tiny_tokenizers import byte_bpe
from transformers import AutoModelForCausalLM

from mezo import MeZO, load, trajectory
from mezo.cli import main as cli
from mezo.errors import InputError
from mezo.models import adapters as tuners
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.runs import rebuild as adapter

LORA = ["--use_peft", "--lora_r=3", "--lora_target_modules", "q_proj", "v_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in bfloat16, and runs through the command line: full (in float32) and lora."""
    folder = tmp_path_factory.mktemp("adapter")
    tokenizer = byte_bpe()
    tiny_model("opt", len(tokenizer)).bfloat16().save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    reviews(folder / "reviews.jsonl")
    short = {"max_steps": 2, "load_best_model_at_end": False, "disable_tqdm": True}
    for name, options in (("full", ["--dtype=float32"]), ("lora", LORA)):
        short["output_dir"] = folder / name
        assert cli.main(["train", *training(folder, folder / "tiny", **short), *options]) == 0
    return folder


def base(place, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(place / "tiny", dtype=dtype)


def same(model, folder):
    """The model has the weights that were saved."""
    name = "adapter_model" if isinstance(model, PeftModel) else "model"
    saved = load_file(folder / f"{name}.safetensors")
    own = {key.replace(".default.", "."): tensor for key, tensor in model.state_dict().items()}
    return all(torch.equal(tensor, own[key]) for key, tensor in saved.items())


def test_one_line_gives_the_tuned_model(place):
    """From a folder's name, or a model; in the dtype of the run, not of the files."""
    log = place / "full" / "run.mezo"
    for given in (str(place / "tiny"), base(place, torch.float32)):
        model = load(given, log)
        assert not model.training
        assert same(model, place / "full")
    start = load(place / "tiny", str(log), until=0)
    assert not same(start, place / "full")
    assert same(start.bfloat16(), place / "tiny")


def test_one_line_gives_the_adapter_too(place):
    """As the run's config says, on a base by name or a model that has none; the seed's start."""
    log = place / "lora" / "run.mezo"
    before = torch.get_rng_state()
    for given in (str(place / "tiny"), base(place)):
        model = load(given, log)
        assert isinstance(model, PeftModel)
        assert not model.training
        assert same(model, place / "lora")
    assert torch.equal(torch.get_rng_state(), before)
    args = adapter.arguments_of(ModelArguments(), log, trajectory.read(log).header)
    own = tuners.with_adapter(base(place), args, trajectory.read(log).header["seed"])
    assert load(own, log) is own
    assert same(own, place / "lora")


def test_the_wrong_base_and_no_log_are_refused(place):
    with pytest.raises(InputError, match=r"dtype of .* is bfloat16, the log has float32"):
        load(base(place), place / "full" / "run.mezo")
    with pytest.raises(InputError, match=r"none\.mezo: No such file"):
        load(base(place), "runs/none.mezo")
    with pytest.raises(InputError, match=r"\./none: no such folder"):
        load("./none", place / "full" / "run.mezo")


def test_a_log_says_how_the_adapter_is_made_and_nothing_else():
    """It comes from elsewhere: no other base, no code to run."""
    assert "trust_remote_code" not in adapter.ADAPTER
    assert "model_name_or_path" not in adapter.ADAPTER
    assert "trainable" not in adapter.ADAPTER


@pytest.mark.parametrize(
    "config",
    [
        {"use_peft": "yes"},
        {"use_peft": True, "lora_r": 0},
        {"use_peft": True, "lora_r": "8"},
        {"use_peft": True, "lora_alpha": None},
        {"use_peft": True, "lora_target_modules": "(a+)+$"},
        {"use_peft": True, "lora_target_modules": [1]},
        {"dtype": "load"},
        {"dtype": []},
    ],
)
def test_a_config_that_no_run_writes_is_one_line(place, config):
    header = {"config": config, "tensors": [], "seed": 0}
    with pytest.raises(InputError, match=f"^x: its config's {list(config)[-1]} cannot be "):
        adapter.arguments_of(ModelArguments(), "x", header)


def test_the_dtype_of_the_run_is_taken_unless_one_is_asked_for(place):
    """Of the config; without one, of the tensors, if they have one in common."""
    auto, half = ModelArguments(), ModelArguments(dtype="float16")

    def dtype(args, config, *dtypes):
        tensors = [{"dtype": name} for name in dtypes]
        return adapter.arguments_of(args, "x", {"config": config, "tensors": tensors}).dtype

    assert dtype(auto, {"dtype": "bfloat16"}, "float32") == "bfloat16"
    assert dtype(auto, {}, "float32", "float32") == "float32"
    assert dtype(auto, {}, "float32", "bfloat16") == "auto"
    assert dtype(auto, {}, "float64") == "auto"
    assert dtype(half, {"dtype": "bfloat16"}, "float32") == "float16"


def test_onto_adapter_writes_the_adapter_alone(place, tmp_path, capsys):
    """Peft's two files, either spelling of the option, loaded as any adapter is."""
    argv = ["--model", place / "tiny", "--log", place / "lora" / "run.mezo", "--json"]
    for option in ("--onto_adapter", "--onto-adapter"):
        out = tmp_path / option
        code, stdout, err = mezo(capsys, "replay", *argv, "--output_dir", out, option)
        assert (code, json.loads(stdout)["steps"]) == (0, 2)
        assert err.startswith("next: mezo eval --model ")
        assert sorted(os.listdir(out)) == ["adapter_config.json", "adapter_model.safetensors"]
        assert same_weights(out, place / "lora")
    assert same(models.load(ModelArguments(str(out)))[0], place / "lora")
    code, _, _ = mezo(capsys, "replay", *argv, "--output_dir", out, option, "--until=0")
    assert not same_weights(out, place / "lora")


def test_a_base_weight_in_an_adapter_s_run_is_no_adapter(place, tmp_path):
    """--use_peft with --trainable may train weights of the base."""
    model = tuners.with_adapter(base(place), ModelArguments(lora_target_modules=["q_proj"]), 0)
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name)
    optimizer = MeZO(model.named_parameters(), seed=1, perturbation="scratch")
    trajectory.record(optimizer, tmp_path / "run.mezo", config={"use_peft": True}).close()
    with pytest.raises(InputError, match=r"own weights \(.*q_proj\.base_layer\.weight\)"):
        adapter.save_adapter(ModelArguments(), tmp_path / "run.mezo", str(tmp_path))


REFUSED = [
    (["full", "--onto_adapter"], "run.mezo: the run trained the model's own weights (model."),
    (["lora", "--by_tensor"], "the run trained an adapter (base_model."),
    (["full", "--by_tensor", "--onto_adapter"], "give one"),
    (["full", "--by_tensor", "--dtype=float32"], "leave out --dtype"),
    (["full", "--by_tensor", "--model=a/b"], "model a/b: no such folder; hf download a/b"),
    (["full", "--by_tensor", "--until=3"], "until must be from 0 to 2, got 3"),
    (["full", "--until=-1"], "until must be from 0 to 2, got -1"),
    (["lora", "--onto_adapter", "--output_dir=reviews.jsonl"], "reviews.jsonl: File exists"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_a_replay_that_cannot_be_is_one_line(place, argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    run, *options = argv
    given = ["--model=tiny", f"--log={run}/run.mezo", f"--output_dir={tmp_path / 'out'}"]
    code, out, err = mezo(capsys, "replay", *given, *options)
    assert (code, out) == (2, "")
    assert err.startswith("mezo: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_by_tensor_from_the_terminal_is_the_replay_of_the_model(place, tmp_path, capsys):
    """Of bfloat16 files that were trained in float32."""
    argv = ["--model", place / "tiny", "--log", place / "full" / "run.mezo", "--output_dir"]
    code, out, err = mezo(capsys, "replay", *argv, tmp_path, "--by_tensor", "--json")
    assert code == 0
    assert json.loads(out) == {
        "log": str(place / "full" / "run.mezo"),
        "steps": 2,
        "output_dir": str(tmp_path),
    }
    assert err.startswith("next: mezo eval --model ")
    assert same_weights(tmp_path, place / "full")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_importing_the_adapter_is_light():
    """transformers' Trainer takes seconds, and a rebuilt model needs none of it."""
    code = "import sys, mezo; mezo.load; print('transformers.trainer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
