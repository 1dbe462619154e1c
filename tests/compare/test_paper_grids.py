"""The names of the paper's tables run the paper's settings: every value against a literal.

The sources are Tables 4 to 10, 15 and 16 and Sections E.4 and E.6 of arXiv:2305.17333, and for what
these leave open mezo.sh, finetune.sh and lora.py of the published code.
"""

import json
import shlex

import pytest
from folders import mezo
from models import tiny_model
from tiny_tokenizers import byte_bpe

from mezo import tasks
from mezo.compare import grids, paper_grids
from mezo.compare.paper_grids import Asked
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
TABLE4 = ROBERTA | {"per_device_train_batch_size": [16, 64], "learning_rate": [1e-5, 1e-6, 1e-7]}
TABLE4 |= {"mezo_eps": [1e-3, 1e-5], "weight_decay": [0.0, 0.1], "max_steps": 5000}
TABLE6 = TABLE4 | {"scale_lr_with_samples": True}
ROBERTA_FT = EVERY_TENTH | {"method": "adam", "max_steps": 1000, "lr_scheduler_type": "linear"}
ADAM = ROBERTA_FT | {"learning_rate": [1e-5, 3e-5, 5e-5]}
SGD = ROBERTA_FT | {"learning_rate": [1e-4, 5e-4, 1e-3, 5e-3, 1e-2], "optim": "sgd"}
K16 = {"per_device_train_batch_size": [2, 4, 8]}
K512 = {"per_device_train_batch_size": [8, 16, 32]}
OPT = EVERY_FIFTH | DATA | {"method": "mezo", "per_device_train_batch_size": 16}
OPT |= {"max_steps": 20_000, "lr_scheduler_type": "constant"}
OPT_FT = EVERY_FIFTH | DATA | {"method": "adam", "per_device_train_batch_size": 8}
OPT_FT |= {"max_steps": -1, "num_train_epochs": 5, "lr_scheduler_type": "linear"}
F1 = OPT | {"objective": "f1"}


def at(rates: list[float], eps: float) -> dict:
    return {"learning_rate": rates, "mezo_eps": eps}


PAPER = {
    "table4-mezo": TABLE4,
    "table6-n4": TABLE6 | {"num_samples": 4, "max_steps": 1250},
    "table6-n4-linear": TABLE6 | {"num_samples_end": 4, "max_steps": 2000},
    "table6-n16": TABLE6 | {"num_samples": 16, "max_steps": 312},
    "table6-n16-linear": TABLE6 | {"num_samples_end": 16, "max_steps": 588},
    "table7-mezo-adam": ROBERTA | {"rule": "adam"} | at([1e-6, 1e-5, 1e-4, 5e-4, 1e-3], 1e-3),
    "table8-mezo": TABLE4 | {"modified": "variance", "modified_norms": "gradients"},
    "table9-mezo": TABLE4 | {"modified": "variance", "modified_norms": "parameters"},
    "table10-mezo": TABLE4 | {"modified": "expectation", "modified_norms": "gradients"},
    "table15-mezo": ROBERTA | at([1e-7, 1e-6, 1e-5], 1e-3),
    "table15-mezo-prefix": ROBERTA | PREFIX | at([1e-2, 5e-3, 1e-3], 1e-1),
    "table15-mezo-lora": ROBERTA | LORA | at([1e-5, 5e-5, 1e-4], 1e-3) | {"weight_decay": 0.1},
    "table15-ft-k16": ADAM | K16,
    "table15-ft-k512": ADAM | K512,
    "table15-sgd-k16": SGD | K16,
    "table15-sgd-k512": SGD | K512,
    "table15-ft-prefix": ROBERTA_FT | PREFIX | K512 | {"learning_rate": [1e-2, 3e-2, 5e-2]},
    "table15-ft-lora": ROBERTA_FT
    | LORA
    | {"learning_rate": [1e-4, 3e-4, 5e-4], "per_device_train_batch_size": [4, 8, 16]},
    "table16-mezo": OPT | at([1e-6, 1e-7], 1e-3),
    "table16-mezo-generation": OPT | at([1e-6, 5e-7, 1e-7], 1e-3),
    "table16-mezo-prefix": OPT | PREFIX | at([1e-2, 1e-3], 1e-1),
    "table16-mezo-prefix-generation": OPT | PREFIX | at([5e-2, 1e-2, 5e-3], 1e-1),
    "table16-mezo-lora": OPT | LORA | at([1e-4, 5e-5], 1e-2),
    "table16-mezo-lora-generation": OPT | LORA | at([1e-4, 5e-5, 1e-5], 1e-2),
    "table16-ft": OPT_FT | {"learning_rate": [1e-5, 5e-5, 8e-5]},
    "e4-head": OPT_FT | {"learning_rate": [1e-4, 5e-4], "trainable": "head"},
    "e6-f1": F1 | at([1e-6, 5e-6, 1e-5], 1e-3),
    "e6-f1-prefix": F1 | PREFIX | at([1e-1, 5e-2, 1e-2], 1e-1),
}


def test_there_is_a_literal_for_every_grid():
    assert PAPER.keys() == paper_grids.GRIDS.keys()


@pytest.mark.parametrize("name", PAPER)
def test_a_grid_is_the_paper_s_to_the_letter(name):
    assert grids.load(name) == PAPER[name]


K = {"k": 16}
ROWS = [
    ("table4", "snli", K, "table4-mezo"),
    ("table6", "sst2", K | {"num_samples": 4}, "table6-n4"),
    ("table6", "trec", K | {"num_samples_end": 16}, "table6-n16-linear"),
    ("table7", "mnli", {"k": 512}, "table7-mezo-adam"),
    ("table8", "sst2", K, "table8-mezo"),
    ("table9", "sst2", K, "table9-mezo"),
    ("table10", "sst2", K, "table10-mezo"),
    ("table15", "trec", K, "table15-mezo"),
    ("table15", "trec", K | {"objective": "accuracy"}, "table15-mezo"),  # E.6: the same grid
    ("table15", "rte", {"k": 512, "part": "lora"}, "table15-mezo-lora"),
    ("table15", "snli", K | {"part": "prefix"}, "table15-mezo-prefix"),
    ("table15", "snli", K | {"rule": "adam"}, "table7-mezo-adam"),
    ("table15", "sst5", K | {"method": "adam"}, "table15-ft-k16"),
    ("table15", "sst5", {"k": 127, "method": "adam"}, "table15-ft-k16"),
    ("table15", "sst5", {"k": 128, "method": "adam"}, "table15-ft-k512"),
    ("table15", "mnli", {"k": 512, "method": "adam"}, "table15-ft-k512"),
    ("table15", "mnli", {"k": 512, "method": "adam", "optim": "sgd"}, "table15-sgd-k512"),
    ("table15", "mnli", K | {"method": "adam", "part": "lora"}, "table15-ft-lora"),
    ("table15", "mnli", K | {"method": "adam", "part": "prefix"}, "table15-ft-prefix"),
    ("table16", "cb", {}, "table16-mezo"),
    ("table16", "squad", {}, "table16-mezo-generation"),
    ("table16", "drop", {}, "table16-mezo-generation"),
    ("table16", "record", {"part": "prefix"}, "table16-mezo-prefix"),
    ("table16", "squad", {"part": "prefix"}, "table16-mezo-prefix-generation"),
    ("table16", "copa", {"part": "lora"}, "table16-mezo-lora"),
    ("table16", "drop", {"part": "lora"}, "table16-mezo-lora-generation"),
    ("table16", "drop", {"method": "adam"}, "table16-ft"),
    ("table16", "record", {"method": "adam", "part": "head"}, "e4-head"),
    ("table16", "squad", {"objective": "f1"}, "e6-f1"),
    ("table16", "squad", {"objective": "f1", "part": "prefix"}, "e6-f1-prefix"),
]


@pytest.mark.parametrize(("table", "task", "options", "name"), ROWS)
def test_a_table_has_a_row_for_method_and_task(table, task, options, name):
    assert paper_grids.name_of(table, Asked(task, **options)) == name


def test_every_row_is_found_by_its_options():
    """But n = 4 growing and n = 16 constant, which are found as their likes are."""
    missed = paper_grids.GRIDS.keys() - {name for *_, name in ROWS}
    assert missed == {"table6-n4-linear", "table6-n16", "table15-sgd-k16"}


@pytest.mark.parametrize(
    ("table", "task", "options", "message"),
    [
        ("table17", "sst2", K, "paper 'table17' is unknown: table4, .*table15, table16"),
        ("table15", "copa", K, "table15 has the tasks sst2, .*, not copa; --grid table15-mezo"),
        ("table8", "rte", K, "table8 has the tasks sst2, snli, trec, not rte"),
        ("table16", "trec", {}, "table16 has the tasks .*, not trec"),
        ("table15", "sst2", {}, "add --k 16 or --k 512"),
        ("table9", "sst2", {}, "add --k 16 or --k 512"),
        ("table16", "sst2", {"method": "lp"}, "no hyperparameters of the method lp"),
        ("table16", "sst2", {"part": "ia3"}, "table16 has no row table16-mezo-ia3"),
        ("table16", "sst2", {"method": "adam", "part": "lora"}, "no row table16-ft-lora"),
        ("table16", "sst2", {"method": "adam", "part": "head"}, "no row e4-head of sst2"),
        ("table16", "sst2", {"rule": "adam"}, "no row table16-mezo-adam"),
        ("table16", "drop", {"objective": "f1"}, "no row e6-f1 of drop"),
        ("table15", "sst2", K | {"part": "head"}, "no row table15-mezo-head"),
        ("table6", "sst2", K, "no row table6-n1"),
        ("table9", "sst2", K | {"part": "lora"}, "no row table9-mezo-lora"),
        ("table7", "sst2", K | {"method": "adam"}, "no row table7-adam"),
    ],
)
def test_what_the_tables_do_not_have_is_refused_in_a_line(table, task, options, message):
    with pytest.raises(InputError, match=message):
        paper_grids.name_of(table, Asked(task, **options))


def options_of(table: str, task: str) -> list[list[str]]:
    """The words that choose each of the paper's rows for a task."""
    lora, prefix = ["--use_peft"], ["--use_peft", "--peft_type", "prefix"]
    adam = ["--method", "adam"]
    rows: list[list[str]] = [[]]
    if table == "table6":
        rows = [["--num_samples", "4"], ["--num_samples_end", "16"]]
    if table == "table15":
        rows += [lora, prefix, ["--rule", "adam"], ["--objective", "accuracy"], adam]
        rows += [adam + lora, adam + prefix, [*adam, "--optim", "sgd"]]
    if table == "table16":
        head = [[*adam, "--trainable", "head"]] if task in paper_grids.HEAD_TUNED else []
        f1 = [["--objective", "f1"], ["--objective", "f1", *prefix]] if task == "squad" else []
        rows += [lora, prefix, adam, *head, *f1]
    return rows


@pytest.mark.parametrize("table", paper_grids.TABLES)
def test_no_row_of_the_paper_is_refused_for_a_task_that_it_has(table, capsys):
    """Every table with every task of it, method, adapter and k: a dry run prints commands."""
    for task in paper_grids.TABLES[table][1]:
        for k in ["16", "512"] if table == "table15" else [None if table == "table16" else "16"]:
            for words in options_of(table, task):
                argv = ["--paper", table, "--task", task, *words, *(["--k", k] if k else [])]
                code, out, err = mezo(capsys, "train", *argv, "--dry_run")
                assert (code, out.startswith("mezo train ")) == (0, True), (argv, err)


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
    code, out, _ = mezo(capsys, "train", *argv[:6], "--method", "adam", "--dry_run", "--json")
    assert len(json.loads(out)["commands"]) == 9
    code, _, err = mezo(capsys, "train", *argv[:6], "--trainable", "norms", "--dry_run")
    assert (code, "table15 has no grid for trainable norms" in err) == (2, True)


def test_a_run_is_shown_with_the_rate_it_would_take(capsys):
    code, out, _ = mezo(capsys, "train", "--model", "causal-lm", "--dry_run")
    assert code == 0
    assert "--learning_rate=3e-05 " in out  # rates.py, for 19.1 M weights
    code, _, err = mezo(capsys, "train", "--paper", "table16", "--grid", "table16-ft")
    assert (code, "both name a grid" in err) == (2, True)
