"""The names of the paper's tables run the paper's settings: every value against a literal.

The sources are Tables 15 and 16 of arXiv:2305.17333, and mezo.sh, finetune.sh and lora.py of the
published code for what the tables leave open.
"""

import json
import shlex

import pytest
from folders import mezo
from models import tiny_model
from tiny_tokenizers import byte_bpe

from mezo import tasks
from mezo.compare import grids, paper_grids
from mezo.errors import InputError
from mezo.models import adapters
from mezo.models.arguments import ModelArguments
from mezo.runs.data import load_splits
from mezo.runs.data_arguments import DataArguments

EVERY_TENTH = {"eval_steps": 0.1, "save_steps": 0.1}
EVERY_FIFTH = {"eval_steps": 0.2, "save_steps": 0.2}
DATA = {"num_train": 1000, "num_dev": 500, "num_test": 1000, "split_seed": 0}
LORA = {"use_peft": True, "peft_type": "lora", "lora_r": 8, "lora_alpha": 16}
LORA |= {"lora_target_modules": ["query_value"]}
PREFIX = {"use_peft": True, "peft_type": "prefix", "num_virtual_tokens": 5}
ROBERTA = EVERY_TENTH | {"method": "mezo", "per_device_train_batch_size": 64}
ROBERTA |= {"max_steps": 100_000, "lr_scheduler_type": "constant"}
ROBERTA_FT = EVERY_TENTH | {"method": "adam", "learning_rate": [1e-5, 3e-5, 5e-5]}
ROBERTA_FT |= {"max_steps": 1000, "lr_scheduler_type": "linear"}
OPT = EVERY_FIFTH | DATA | {"method": "mezo", "per_device_train_batch_size": 16}
OPT |= {"max_steps": 20_000, "lr_scheduler_type": "constant"}
PAPER = {
    "table15-mezo": ROBERTA | {"learning_rate": [1e-7, 1e-6, 1e-5], "mezo_eps": 1e-3},
    "table15-mezo-prefix": ROBERTA
    | PREFIX
    | {"learning_rate": [1e-2, 5e-3, 1e-3], "mezo_eps": 1e-1},
    "table15-mezo-lora": ROBERTA
    | LORA
    | {"learning_rate": [1e-5, 5e-5, 1e-4], "mezo_eps": 1e-3, "weight_decay": 0.1},
    "table15-ft-k16": ROBERTA_FT | {"per_device_train_batch_size": [2, 4, 8]},
    "table15-ft-k512": ROBERTA_FT | {"per_device_train_batch_size": [8, 16, 32]},
    "table16-mezo": OPT | {"learning_rate": [1e-6, 1e-7], "mezo_eps": 1e-3},
    "table16-mezo-generation": OPT | {"learning_rate": [1e-6, 5e-7, 1e-7], "mezo_eps": 1e-3},
    "table16-mezo-prefix": OPT | PREFIX | {"learning_rate": [1e-2, 1e-3], "mezo_eps": 1e-1},
    "table16-mezo-lora": OPT | LORA | {"learning_rate": [1e-4, 5e-5], "mezo_eps": 1e-2},
    "table16-ft": EVERY_FIFTH
    | DATA
    | {"method": "adam", "learning_rate": [1e-5, 5e-5, 8e-5], "per_device_train_batch_size": 8}
    | {"max_steps": -1, "num_train_epochs": 5, "lr_scheduler_type": "linear"},
}


def test_there_is_a_literal_for_every_grid():
    assert PAPER.keys() == paper_grids.GRIDS.keys()


@pytest.mark.parametrize("name", PAPER)
def test_a_grid_is_the_paper_s_to_the_letter(name):
    assert grids.load(name) == PAPER[name]


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (("table15", "mezo", "", "trec", 16), "table15-mezo"),
        (("table15", "mezo", "lora", "rte", 512), "table15-mezo-lora"),
        (("table15", "mezo", "prefix", "snli", 16), "table15-mezo-prefix"),
        (("table15", "adam", "", "sst5", 16), "table15-ft-k16"),
        (("table15", "adam", "", "mnli", 512), "table15-ft-k512"),
        (("table16", "mezo", "", "cb", None), "table16-mezo"),
        (("table16", "mezo", "", "squad", None), "table16-mezo-generation"),
        (("table16", "mezo", "", "drop", None), "table16-mezo-generation"),
        (("table16", "mezo", "prefix", "record", None), "table16-mezo-prefix"),
        (("table16", "mezo", "lora", "copa", None), "table16-mezo-lora"),
        (("table16", "adam", "", "drop", None), "table16-ft"),
    ],
)
def test_a_table_has_a_row_for_method_and_task(asked, name):
    assert paper_grids.name_of(*asked) == name


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("table17", "mezo", "", "sst2", 16), "paper 'table17' is unknown: table15 or table16"),
        (("table15", "mezo", "", "copa", 16), "table15 has the tasks sst2, sst5, .*, not copa"),
        (("table16", "mezo", "", "trec", None), "table16 has the tasks .*, not trec"),
        (("table15", "mezo", "", "sst2", None), "add --k 16 or --k 512"),
        (("table16", "lp", "", "sst2", None), "no hyperparameters of the method lp"),
        (("table16", "mezo", "prefix", "squad", None), "not recorded in this package"),
        (("table16", "mezo", "lora", "drop", None), "no grid table16-mezo-lora-generation: its"),
        (("table15", "adam", "lora", "sst2", 16), "no grid table15-ft-lora: its values are not"),
        (("table16", "mezo", "ia3", "sst2", None), "table16 has no such row"),
    ],
)
def test_what_the_tables_do_not_have_is_refused_in_a_line(asked, message):
    with pytest.raises(InputError, match=message):
        paper_grids.name_of(*asked)


@pytest.mark.parametrize("task", paper_grids.TABLES["table16"][1])
def test_a_task_is_validated_on_as_many_examples_as_in_the_paper(task):
    """mezo.sh: 500, and 100 for CB and COPA, which have fewer than 1,000 training examples."""
    assert tasks.get(task).num_dev == (100 if task in ("cb", "copa") else 500)
    cells = grids.chosen_cells(DataArguments(task), "table16-mezo", ())
    assert {options["num_dev"] for _, options in cells} == {tasks.get(task).num_dev}


@pytest.mark.parametrize(("rows", "dev"), [(250, 100), (400, 100), (200, 100), (199, 39)])
def test_cb_and_copa_take_a_hundred_dev_examples_without_a_grid(tmp_path, rows, dev):
    """CB has 250 training examples and COPA 400; a file of few rows keeps most of them."""
    row = {"premise": "It was.", "hypothesis": "It was.", "label": "entailment"}
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps(row) + "\n") * rows)
    splits = load_splits(tasks.get("cb"), DataArguments("cb", train_file=str(path)))
    assert (len(splits["train"]), len(splits["dev"])) == (rows - dev, dev)


@pytest.mark.parametrize(
    ("kind", "names"), [("opt", {"q_proj", "v_proj"}), ("roberta", {"query", "value"})]
)
def test_the_paper_s_lora_has_factors_on_queries_and_values_alone(kind, names):
    """lora.py of the published code; --use_peft alone takes all linear layers."""
    asked = ModelArguments(use_peft=True, lora_target_modules=["query_value"])
    made = adapters.with_adapter(tiny_model(kind, 300), asked, 0)
    trained = [name for name, p in made.named_parameters() if p.requires_grad]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == names
    assert len(trained) == 2 * 2 * 2  # layers, modules, factors


def test_a_model_without_such_projections_is_told_so():
    asked = ModelArguments(use_peft=True, lora_target_modules=["query_value"])
    with pytest.raises(InputError, match="GPT2LMHeadModel has no separate projections"):
        adapters.with_adapter(tiny_model("gpt2", len(byte_bpe())), asked, 0)


def test_one_line_shows_what_the_paper_s_table_runs(capsys):
    """`mezo train --paper table16 --task squad --dry_run`: nothing is loaded."""
    code, out, _ = mezo(capsys, "train", "--paper", "table16", "--task", "squad", "--dry_run")
    assert code == 0
    commands = [shlex.split(line) for line in out.splitlines()]
    assert [c[:3] for c in commands] == [
        ["mezo", "train", "--model_name_or_path=facebook/opt-13b"]
    ] * 3
    rates = [word for c in commands for word in c if word.startswith("--learning_rate")]
    assert rates == [f"--learning_rate={rate}" for rate in ("1e-06", "5e-07", "1e-07")]
    for command in commands:
        assert {"--num_train=1000", "--num_dev=500", "--split_seed=0"} < set(command)


def test_what_is_shown_runs_the_cells_of_the_grid(capsys):
    """The words, parsed as the command line parses them, give each cell's options."""
    argv = ["--paper", "table15", "--task", "rte", "--k", "16", "--use_peft", "--dry_run"]
    _, out, _ = mezo(capsys, "train", *argv)
    _, again, _ = mezo(capsys, "train", *shlex.split(out.splitlines()[0])[2:], "--dry_run")
    assert again == out.splitlines()[0] + "\n"
    argv += ["--method", "adam", "--model", "x", "--json"]
    code, _, err = mezo(capsys, "train", *argv)
    assert (code, "no grid table15-ft-lora" in err) == (2, True)
    code, out, _ = mezo(capsys, "train", *argv[:6], "--method", "adam", "--dry_run", "--json")
    assert len(json.loads(out)["commands"]) == 9
    code, _, err = mezo(capsys, "train", *argv[:6], "--trainable", "head", "--dry_run")
    assert (code, "table15 has no grid for trainable head" in err) == (2, True)


def test_a_run_is_shown_with_the_rate_it_would_take(capsys):
    code, out, _ = mezo(capsys, "train", "--model", "causal-lm", "--dry_run")
    assert code == 0
    assert "--learning_rate=3e-05 " in out  # rates.py, for 19.1 M weights
    code, _, err = mezo(capsys, "train", "--paper", "table16", "--grid", "table16-ft")
    assert (code, "both name a grid" in err) == (2, True)
