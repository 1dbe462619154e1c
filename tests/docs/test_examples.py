"""What the README and examples/ say is run, offline: names on the hub become tests/standin.

Loops take fewer steps, as many as show the loss fall; the model of tests/standin is a sixth of the
embedded one.
"""

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mezo import MeZO, trajectory
from mezo.models.loading import causal_lm

ROOT = Path(__file__).parents[2]
STANDIN = str(ROOT / "tests" / "standin")
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]


def test_the_python_of_the_readme_runs(capsys):
    loop, reward, _, rules = PYTHON
    assert '"facebook/opt-125m"' in loop
    found = {"prompts": ["This film", "The plot"]}
    exec(loop.replace('"facebook/opt-125m"', repr(STANDIN)), found)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5
    assert losses[-1] < losses[0]  # the reader sees it learn
    exec(reward, found)
    assert found["optimizer"].param_groups[0]["step"] == 51
    exec(rules, found)


def test_the_run_of_the_readme_is_rebuilt(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(causal_lm()).eval()
    optimizer = MeZO(model.named_parameters(), lr=1e-4, seed=1)
    with trajectory.record(optimizer, tmp_path / "run.mezo", model=model):
        optimizer.step(lambda: model(input_ids=torch.arange(9).view(1, 9)).logits.mean())
    code = PYTHON[2].replace('"facebook/opt-1.3b"', repr(str(causal_lm())))
    found = {}
    exec(code.replace('"runs/sst2/run.mezo"', repr(str(tmp_path / "run.mezo"))), found)
    rebuilt = dict(found["model"].named_parameters())
    assert all(torch.equal(p, rebuilt[name]) for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "name",
    [
        "plain_loop",
        "hf_trainer",
        pytest.param("instruct", marks=pytest.mark.slow),
        pytest.param("nondifferentiable", marks=pytest.mark.slow),
        pytest.param("rewards", marks=pytest.mark.slow),
    ],
)
def test_the_example_learns(name, capsys):
    """Each prints a figure at the start and at the end; it must have gone the right way."""
    if name == "instruct":
        pytest.importorskip("trl")
    path = ROOT / "examples" / f"{name}.py"
    source = path.read_text()
    if name == "plain_loop":
        for written, quick in (("causal_lm()", repr(STANDIN)), ("range(201)", "range(41)")):
            assert written in source
            source = source.replace(written, quick)
    exec(compile(source, path, "exec"), {"__name__": "__main__", "__file__": str(path)})
    lines = capsys.readouterr().out.splitlines()
    if name == "hf_trainer":
        assert "eval_accuracy" in lines[-1]
        return
    told = [line for line in lines if not line.startswith("{")]  # the Trainer's
    first, last = (float(line.split()[-1]) for line in (told[0], told[-1]))
    assert last > first if name in ("nondifferentiable", "rewards") else last < first


def test_the_example_of_several_processes_goes_on(tmp_path, monkeypatch, capsys):
    """Alone, and interrupted after 60 of its steps, it ends as without the interruption."""
    for log, steps in (("whole", 100), ("part", 60), ("part", 100)):
        script = str(ROOT / "examples/two_processes.py")
        options = ["--steps", str(steps), "--log", str(tmp_path / log)]
        monkeypatch.setattr("sys.argv", [script, *options])
        runpy.run_path(script, run_name="__main__")
    whole, part, again = capsys.readouterr().out.splitlines()
    assert whole == again != part
    assert whole.startswith("rank 0 of 1: loss 0.5")


def test_the_package_is_a_command_too(monkeypatch, capsys):
    """As `torchrun -m mezo train` starts it."""
    monkeypatch.setattr("sys.argv", ["mezo", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("mezo", run_name="__main__")
    assert capsys.readouterr().out.startswith("mezo ")
