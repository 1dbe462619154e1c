"""Every block of code in the documents is executed, or parsed by the parser of its command.

Python runs in the order of the page, with the model of tests/standin in place of names on the hub.
A block marked `<!-- not run: why -->` is left out. The README's Python has its own tests in
test_examples.py, and extending.md's is what tests/test_extending.py is about.
"""

import argparse
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from documents import DOCUMENTS, ROOT, code_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

from mezo import MeZO, tasks
from mezo.cli import main as command_line
from mezo.cli import parsing
from mezo.tasks import Example

STANDIN = ROOT / "tests" / "standin"
ELSEWHERE = {"README.md", "extending.md"}


def blocks(language: str) -> dict[str, list[str]]:
    """The blocks of a language, by document."""
    found = {
        str(path.relative_to(ROOT)): [text for kind, text in code_blocks(path) if kind == language]
        for path in DOCUMENTS
    }
    return {name: texts for name, texts in found.items() if texts}


PYTHON = {n: found for n, found in blocks("python").items() if Path(n).name not in ELSEWHERE}


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the pages take as given: a model, its data, and a place to write."""
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(STANDIN, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(STANDIN)
    prompts = ["This film", "The plot"]
    batch = dict(tokenizer(prompts, return_tensors="pt", padding=True))
    batch["labels"] = batch["input_ids"].clone()
    biases = [(name, p) for name, p in model.named_parameters() if name.endswith("norm.bias")]
    return {
        "model": model,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "optimizer": MeZO(biases, lr=1e-6, seed=0),
        "mine": batch,
        "loader": [batch],
        "closure": lambda: model(**batch).loss,
        "steps": 3,
        "task": tasks.get("opinions"),
        "examples": [Example({"text": "It moved me."}, 1), Example({"text": "It bored me."}, 0)],
    }


@pytest.fixture
def alone(monkeypatch):
    """A process group of one process, if a page makes one, at any port that is free."""
    rank = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs(page, names, alone, monkeypatch):
    Path("mail.csv").write_text("subject,body,label\nhello,how are you?,ham\nwin,money,spam\n")
    monkeypatch.setattr("sys.stdin", io.StringIO('{"completion": "short"}\n'))
    for text in PYTHON[page]:
        exec(compile(text, page, "exec"), names)


@pytest.mark.parametrize("page", blocks("diff"))
def test_the_imports_that_a_page_puts_in_place_of_others_work(page):
    for text in blocks("diff")[page]:
        for line in re.findall(r"^\+(.*)$", text, re.MULTILINE):
            exec(line, {})


class Parsed(Exception):
    """The words of a command were understood: it need not be run."""


def understood(*_args, **_kwargs):
    raise Parsed


@pytest.fixture
def parsers(monkeypatch):
    """Commands stop once their words have been parsed."""
    from transformers import HfArgumentParser

    whole = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        whole(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(HfArgumentParser, "parse_dict", understood)  # after unknown words
    monkeypatch.setattr(parsing.Parser, "parse_args", parse_args)
    return parse_args


def commands(page: str) -> list[list[str]]:
    """The commands of a page's shell blocks, as words, without what sets the environment."""
    found = []
    for text in blocks("sh")[page]:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and (re.match(r"\w+=", words[0]) or words[0] == "sudo"):
                del words[0]
            found += [words] if words else []
    return found


def launched(words: list[str], monkeypatch, parse_args) -> None:
    """What torchrun, accelerate launch or python is asked to start."""
    if words[0] == "-m":
        check(
            ["mezo", *words[2:]] if words[1] == "mezo" else ["python", *words],
            monkeypatch,
            parse_args,
        )
    else:
        assert (ROOT / words[0]).exists(), words[0]


def check(words: list[str], monkeypatch, parse_args) -> None:
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "mezo":
        try:
            assert command_line.main(rest) == 0  # --help prints, and ends
        except Parsed:
            return
        assert "--help" in rest, f"{words} was run"
    elif rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest if "/" in word), rest
    elif program == "python" and rest[0] == "-m":
        module = importlib.import_module(rest[1])
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", rest[1:])
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            if "ArgumentParser" in Path(module.__file__).read_text():
                with pytest.raises(Parsed):
                    module.main()
    elif program == "python":
        launched(rest, monkeypatch, parse_args)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(rest)
        start = ["-m"] if found.module else []
        launched(
            [*start, found.training_script, *found.training_script_args], monkeypatch, parse_args
        )
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        found = launch_command_parser().parse_args(rest[1:])
        launched([found.training_script, *found.training_script_args], monkeypatch, parse_args)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    else:
        assert program in ("pip", "git", "cd"), f"no parser for {words}"
        extras = ",".join(re.findall(r"(?:mezo-lm|\.)\[([\w,-]+)\]", " ".join(rest))).split(",")
        known = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert set(extras) - {""} <= set(known)


@pytest.mark.parametrize("page", blocks("sh"))
def test_the_commands_of_a_page_are_understood(page, parsers, monkeypatch, tmp_path):
    """An option that no parser knows, a script that is not there."""
    if any(words[0] == "mezo" and words[1] in ("sft", "dpo") for words in commands(page)):
        pytest.importorskip("trl")
    found = commands(page)
    monkeypatch.chdir(tmp_path)
    for words in found:
        check(words, monkeypatch, parsers)


def test_the_consoles_of_the_tasks_page_show_what_is_printed(capsys):
    """Commands that need no data of the reader's."""
    (tables, mistakes, _) = blocks("console")["docs/tasks.md"]
    shown = re.findall(r"^\$ mezo (.*)\n((?:(?!\$ ).*\n)*)", tables + mistakes, re.MULTILINE)
    compared = 0
    for line, expected in shown:
        if "DATA" not in line:
            command_line.main(shlex.split(line))
            out, err = capsys.readouterr()
            assert expected.rstrip() in (out.rstrip(), err.rstrip()), line
            compared += 1
    assert compared == 3


def test_the_yaml_of_the_comparison_page_is_what_its_readers_take(tmp_path, monkeypatch):
    from mezo.compare.compare import Settings, plan
    from mezo.models.arguments import ModelArguments
    from mezo.rules import RULES, rule_class
    from mezo.runs.arguments import TrainArguments
    from mezo.runs.data_arguments import DataArguments

    *grids, films = blocks("yaml")["docs/compare.md"]
    args, path = TrainArguments(output_dir=str(tmp_path / "out")), tmp_path / "grid.yaml"
    for grid in grids:
        path.write_text(grid)
        settings = Settings(methods=list(yaml.safe_load(grid)), seeds=(1,), grid=str(path))
        cells = plan(ModelArguments(), DataArguments(), args, settings, 10**7)
        assert {cell.method for cell in cells} == set(settings.methods)
        for cell in cells:
            assert cell.args.rule in RULES or rule_class(cell.args.rule)  # or InputError
    monkeypatch.chdir(tmp_path)
    Path("films.yaml").write_text(films)
    assert tasks.get("films.yaml").candidates == (" terrible", " great")
