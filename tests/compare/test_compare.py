"""`mezo compare`: many methods, each cell once, a table, plots and a report of one file."""

import base64
import json
import math
import re
import shlex
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib.backends.backend_agg  # noqa: F401  # with the next, what quick_collection skips
import pytest
import sklearn.linear_model  # noqa: F401
import yaml
from folders import OWN, mezo, model_folder, reviews

from mezo.cli import compare as cli_compare
from mezo.cli.parsing import JSON, hf_parser, parse
from mezo.cli.train import SEARCH
from mezo.compare import compare, grids, page, recipes
from mezo.compare import plots as report
from mezo.compare.compare import Settings
from mezo.errors import InputError
from mezo.memory import sizes
from mezo.models import loading as models
from mezo.models.arguments import ModelArguments
from mezo.objectives import progress
from mezo.runs.arguments import TrainArguments
from mezo.runs.data_arguments import DataArguments
from mezo.runs.plan import config_of

METHODS = ("zero-shot", "icl", "lp", "ft", "mezo", "mezo-prefix")
SHORT = {"--max_steps": 10, "--adam_steps": 10, "--eval_steps": 0.5, "--save_steps": 0.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    model_folder(folder / "tiny")
    reviews(folder / "reviews.jsonl")
    return folder


def asked(place, out, methods, *more, seeds=("1",)):
    files = [f"--{split}_file={place / 'reviews.jsonl'}" for split in ("train", "dev")]
    argv = ["compare", "--model", place / "tiny", *files, *OWN, "--output_dir", out]
    argv += ["--methods", *methods, "--seeds", *seeds, "--num_train", 12, "--use_cpu", "true"]
    argv += [word for pair in SHORT.items() for word in pair]
    return [*argv, "--per_device_train_batch_size", 4, "--num_test", 8, *more]


@pytest.fixture(scope="module")
def done(place):
    """A comparison: exit code, output, and its folder."""
    from mezo.cli import main as cli

    out = place / "out"
    code = cli.main([str(word) for word in asked(place, out, METHODS)])
    return code, out, json.loads((out / "compare.json").read_text())


@pytest.fixture
def no_report(monkeypatch):
    """`mezo compare` without plots and page, which `done` has: a second and a half."""
    monkeypatch.setattr(cli_compare, "write", lambda found, folder: folder / "report.html")


def test_every_method_has_a_row(done):
    code, _, found = done
    assert code == 0
    assert [row["method"] for row in found["rows"]] == list(METHODS)
    assert all((row["n"], row["std"]) == (1, None) for row in found["rows"])
    assert found["refused"] == {}
    passes = {row["method"]: row["forward_passes"] for row in found["rows"]}
    assert (passes["mezo"], passes["ft"], passes["icl"]) == (20, 30, 0)


def test_a_row_is_over_its_seeds(place, done, tmp_path, capsys, no_report):
    """Mean and deviation of two, and curves of two are drawn; what knows no seed runs once."""
    argv = asked(place, tmp_path / "out", ["zero-shot", "icl"], "--json", seeds=("1", "2"))
    found = json.loads(mezo(capsys, *argv)[1])
    assert {row["method"]: row["n"] for row in found["rows"]} == {"zero-shot": 1, "icl": 2}
    assert [(c["method"], c["seed"]) for c in found["cells"]] == [
        ("zero-shot", 1), ("icl", 1), ("icl", 2),
    ]  # fmt: skip
    one, other = found["rows"][1]["values"]
    assert found["rows"][1]["mean"] == pytest.approx((one + other) / 2)
    assert found["rows"][1]["std"] == pytest.approx(abs(one - other) / math.sqrt(2))
    cells = [cell | {"seed": 2} for cell in done[2]["cells"]]
    plots = report.of_comparison(done[2] | {"cells": [*done[2]["cells"], *cells]}, tmp_path)
    assert len(plots) == 3


def test_a_cell_is_its_config_its_result_and_its_log(done):
    """And nothing as large as weights."""
    _, _, found = done
    assert len(found["cells"]) == 6
    for cell in found["cells"]:
        folder = compare.Path(cell["folder"])
        names = {path.name for path in folder.iterdir()}
        own = {"mezo": {"run.mezo"}, "mezo-prefix": {"run.mezo"}}
        own["lp"] = {"probe.safetensors"}
        assert names == {"config.yaml", "result.json"} | own.get(cell["method"], set())
        assert yaml.safe_load((folder / "config.yaml").read_text())["split_seed"] == cell["seed"]
        assert bool(cell["curve"]) == (cell["method"] in ("ft", "mezo", "mezo-prefix"))


def test_done_again_it_only_reads(place, done, monkeypatch, capsys, no_report):
    """Also with fewer methods; the numbers stay, to the last digit."""
    monkeypatch.setattr(grids, "train", None)
    code, out, err = mezo(capsys, *asked(place, done[1], METHODS[:5], "--json"))
    assert code == 0
    assert err.count("found:") == 5
    assert json.loads(out)["rows"] == done[2]["rows"][:5]


def test_the_commands_of_a_cell_give_its_numbers(done, tmp_path, capsys):
    """`mezo train` with its options, which are those of its config file; a replay of its log."""
    _, _, found = done
    cell = next(c for c in found["cells"] if c["method"] == "mezo")
    command = shlex.split(cell["command"])
    assert command[-2:] == ["--output_dir", f"{cell['folder']}-again"]
    config = yaml.safe_load(compare.Path(cell["folder"], "config.yaml").read_text())
    assert compare.train_command(config) == command[:-2]
    again = [*command[1:-2], "--output_dir", tmp_path / "again", "--json"]
    result = json.loads(mezo(capsys, *again)[1])
    assert (result["test"], result["dev"]) == (cell["test"], cell["dev"])
    replayed = json.loads(mezo(capsys, *shlex.split(cell["replay"])[1:], "--json")[1])
    assert (replayed["accuracy"], replayed["n"]) == (cell["test"]["accuracy"], 8)
    assert replayed["loss"] == pytest.approx(cell["test"]["loss"], rel=1e-6)


def test_every_cell_s_command_is_one_that_mezo_train_takes(done):
    """The report's command named the folder of the cell, which has a run: it could only fail."""
    kinds = (ModelArguments, DataArguments, TrainArguments)
    for cell in done[2]["cells"]:
        words = shlex.split(cell["command"])
        assert words[:2] == ["mezo", "train"]
        parser = hf_parser("mezo train", kinds, json=JSON, **SEARCH)
        model, data, args, _ = parse(words[2:], parser, kinds)
        config = yaml.safe_load(compare.Path(cell["folder"], "config.yaml").read_text())
        asked = config_of(model, data, args)
        assert {name: asked[name] for name in config} == config
        assert not compare.Path(args.output_dir).exists()


def test_an_option_that_begins_with_a_dash_or_has_no_value_stays_whole():
    """`--prompt "- {text}"` in two words is an unknown option."""
    command = compare.train_command({"prompt": "- {text}", "k": None, "labels": ["a", "b"]})
    assert command == ["mezo", "train", "--prompt=- {text}", "--labels", "a", "b"]


def test_the_report_is_read_on_a_phone_and_in_the_dark(done):
    """Without a viewport a phone shows the page of a desk, in letters of a millimetre."""
    text = (done[1] / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert '<div class="wide"><table>' in text


def test_the_plots_are_what_their_names_say(done):
    _, out, _ = done
    for name in ("curves", "memory", "sizes"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert ElementTree.parse(out / f"{name}.svg").getroot().tag.endswith("svg")


def test_the_report_needs_nothing_else(done):
    """No address in it, and every image is in it whole."""
    _, out, found = done
    text = (out / "report.html").read_text()
    assert not re.search(r"https?://", text)
    assert not re.search(r"<(script|link|iframe|object)\b", text)
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 3
    for source in sources:
        kind, data = source.split(",")
        assert kind == "data:image/svg+xml;base64"
        ElementTree.fromstring(base64.b64decode(data))
    assert text.count("<details>") == len(found["cells"])
    for cell in found["cells"]:
        assert page.escape(cell["command"]) in text


def test_what_the_data_say_is_text_in_the_report(done):
    """A name with tags in it makes no element."""
    found = done[2] | {"task": "<script>alert(1)</script>", "refused": {"lp": "<b>"}}
    text = page.html(found, {})
    assert "<script" not in text
    assert "<b>" not in text


def test_of_a_grid_the_best_on_dev_is_in_the_table(place, tmp_path, capsys, no_report, monkeypatch):
    """Three rates, two of which leave the model as it is: the first of equals.

    Without a terminal each run says how far it is, which nothing else does for hours.
    """
    monkeypatch.setattr(progress, "FIRST", 0.0)  # instead of after ten seconds
    monkeypatch.setattr(progress, "EVERY", 0.0)
    grid = tmp_path / "grid.yaml"
    grid.write_text("mezo:\n  learning_rate: [1e-30, 1e-29]\n  mezo_eps: 1e-2\n")
    argv = asked(place, tmp_path / "out", ["mezo"], "--grid", grid, "--json")
    _, out, err = mezo(capsys, *argv)
    for at, rate in ((1, "1e-30"), (2, "1e-29")):
        _, _, own = err.partition(f"[{at}/2, ")
        assert own.splitlines()[0].endswith(f" min] run: mezo seed 1 learning_rate={rate}")
        assert "training; the first step" in own
        assert [f"step {i}/10" in own for i in range(1, 11)] == [True] * 10
        assert "batch 1/" in own  # of an evaluation
    found = json.loads(out)
    cells = {cell["name"]: cell["chosen"] for cell in found["cells"]}
    assert cells == {"learning_rate=1e-30": True, "learning_rate=1e-29": False}
    row = {"method": "ft", "seed": 1, "dev": 0.5}
    rows = [row, row | {"dev": 0.7}, row | {"seed": 2}, row | {"dev": 0.7}]
    assert compare.best_of(rows) == [rows[1], rows[2]]
    assert compare.best_of(rows)[0] is rows[1]


def test_a_method_that_cannot_be_is_named_and_the_others_run(place, tmp_path, capsys, no_report):
    """LoRA on modules that are not there. If no method can, that is the mistake."""
    grid = tmp_path / "grid.yaml"
    grid.write_text("lora:\n  lora_target_modules: [nowhere]\n")
    more = ("--grid", grid)
    code, out, err = mezo(capsys, *asked(place, tmp_path / "a", ["zero-shot", "lora"], *more))
    assert (code, out.count("\n")) == (0, 2)
    assert "lora was refused: " in err
    assert "nowhere" in err
    code, _, err = mezo(capsys, *asked(place, tmp_path / "b", ["lora"], *more))
    assert code == 2
    assert err.splitlines()[-1].startswith("mezo: ")


def test_mistakes_are_one_line(place, tmp_path, capsys):
    def said(*more, methods=("mezo",)):
        code, _, err = mezo(capsys, *asked(place, tmp_path / "out", methods, *more))
        assert code == 2
        return err.splitlines()[-1]

    assert "method 'mezzo' is unknown; did you mean mezo?" in said(methods=("mezzo",))
    assert "cannot be combined with MeZO" in said(methods=("mezo-adalora",))
    assert "give --grid FILE.yaml" in said("--learning_rate", "1")
    assert "grid must be none, default, table15, table16" in said("--grid", "all")
    (tmp_path / "g.yaml").write_text("ft: {learning_rate: 1}")
    assert "ft is not one of the methods mezo" in said("--grid", tmp_path / "g.yaml")
    (tmp_path / "g.yaml").write_text("mezo: {learning_rat: 1}")
    assert "did you mean learning_rate?" in said("--grid", tmp_path / "g.yaml")
    (tmp_path / "g.yaml").write_text("mine: {rule: sign}")
    assert "add a line 'like: mezo'" in said("--grid", tmp_path / "g.yaml", methods=("mine",))
    (tmp_path / "g.yaml").write_text("mine: {like: mezzo}")
    assert "mine: method 'mezzo' is unknown" in said("--grid", tmp_path / "g.yaml")
    (tmp_path / "g.yaml").write_text("ft: {like: mezo}")
    assert "ft is a method already" in said("--grid", tmp_path / "g.yaml")
    (tmp_path / "g.yaml").write_text("../x: {like: mezo}")
    assert "'../x' cannot be the name of a folder" in said("--grid", tmp_path / "g.yaml")


def test_a_section_of_a_grid_file_may_be_a_method_of_its_own(tmp_path):
    """It begins with the recipe of a known method, and has its own name in tables and plots."""
    grid = tmp_path / "table.yaml"
    grid.write_text("signs: {like: lozo, rule: sign, learning_rate: 1e-4}")
    settings = Settings(methods=("mezo", "signs"), seeds=(1,), grid=str(grid))
    data = DataArguments(task="opinions", num_train=8, num_test=8)
    mezo, signs = compare.plan(
        ModelArguments(), data, TrainArguments(output_dir=str(tmp_path)), settings, 10**7
    )
    assert (mezo.args.rule, mezo.args.perturbation) == ("sgd", None)
    assert (signs.args.rule, signs.args.perturbation) == ("sign", "low_rank")
    assert (signs.args.learning_rate, signs.args.rank) == (1e-4, 2)
    assert signs.folder == tmp_path / "signs" / "seed-1"
    assert report.label("signs") == "signs"


def test_what_was_done_otherwise_is_not_mixed_in(place, done, capsys):
    argv = asked(place, done[1], ["mezo"], "--num_samples", "2")
    code, _, err = mezo(capsys, *argv)
    assert code == 2
    assert "num_samples" in err


def test_the_rates_of_mezo_meet_the_models_they_were_found_on():
    """causal-lm as it was found, Tables 15 and 16 within their grids."""

    def rate(parameters):
        return recipes.recipe("mezo", parameters, 100, 10)["learning_rate"][0]

    assert rate(19_112_448) == pytest.approx(3e-5, rel=0.1)
    assert min(grids.GRIDS["table15-mezo"]["learning_rate"]) <= rate(355e6)
    assert rate(355e6) <= max(grids.GRIDS["table15-mezo"]["learning_rate"])
    assert min(grids.GRIDS["table16-mezo"]["learning_rate"]) <= rate(13e9)
    assert rate(13e9) <= max(grids.GRIDS["table16-mezo"]["learning_rate"])


@pytest.mark.parametrize("grid", ["none", "default", "table15", "table16"])
def test_every_method_is_a_run_that_could_begin(grid, tmp_path):
    """Options exist and go together; the paper's grids are those of grids.py."""
    from mezo.runs import methods

    settings = Settings(methods=recipes.KNOWN, seeds=(13,), grid=grid)
    args = TrainArguments(str(tmp_path), use_cpu=True)
    data = DataArguments(data_dir="k/16-{seed}", k=16)
    cells = compare.plan(ModelArguments("causal-lm"), data, args, settings, 19_112_448)
    assert {cell.method for cell in cells} == set(recipes.KNOWN)
    assert len({cell.folder for cell in cells}) == len(cells)
    for cell in cells:
        methods.check(cell.args, cell.model)
        assert (cell.data.data_dir, cell.data.split_seed, cell.args.seed) == ("k/16-13", 13, 13)
    rates = {cell.args.learning_rate for cell in cells if cell.method == "mezo"}
    if grid.startswith("table"):
        assert rates == set(grids.GRIDS[f"{grid}-mezo"]["learning_rate"])
    else:
        assert len(rates) == {"none": 1, "default": 3}[grid]


def test_weights_are_counted_without_loading_them(place):
    for name in ("causal-lm", str(place / "tiny")):
        model, _ = models.load(ModelArguments(name))
        count = sum(p.numel() for p in model.parameters())
        assert models.parameters_of(ModelArguments(name)) == count
    with pytest.raises(InputError, match="model nowhere/at-all"):
        models.parameters_of(ModelArguments("nowhere/at-all"))


def test_estimates_grow_with_the_model_and_order_the_methods():
    """MeZO within a tenth of inference from 1.3B on; Adam's weights, gradients and two moments."""
    found = [dict(zip(sizes.COLUMNS, row[1:], strict=True)) for row in sizes.ESTIMATES.values()]
    for small, large in pairwise(found):
        assert all(large[name] > small[name] for name in sizes.COLUMNS)
    for row, (name, (weights, *_)) in zip(found, sizes.ESTIMATES.items(), strict=True):
        assert 2 * weights < row["inference"] < row["MeZO"] < row["prefix FT"] < row["Adam FT"]
        assert row["MeZO"] <= 1.1 * row["inference"] or name in ("125M", "350M")
        assert (row["Adam FT"], row["Adam FT, 32 bits"]) >= (8 * weights, 16 * weights)
        assert row["inference"] < row["MeZO prefix"] < row["prefix FT"]
    for name, measured in sizes.PAPER["MeZO"].items():
        own = dict(zip(sizes.COLUMNS, sizes.ESTIMATES[name][1:], strict=True))
        assert 0.7 <= own["MeZO"] / measured <= 1.05  # below: a process's own memory


def test_every_known_method_has_a_style_and_a_name_of_its_own():
    names = [report.label(method) for method in recipes.KNOWN]
    assert len(set(names)) == len(names)
    assert report.STYLES.keys() == set(recipes.KNOWN)
    assert len({report.STYLES[method] for method in recipes.KNOWN}) == len(names)


def test_numbers_are_readable():
    assert [page.size(x) for x in (0, 1023, 1536, 200 * 2**10, 3 * 2**30)] == [
        "0 B", "1023 B", "1.5 KiB", "200 KiB", "3.0 GiB",
    ]  # fmt: skip
    assert [page.duration(x) for x in (0.4, 99, 120, 7200)] == ["0 s", "99 s", "2.0 min", "2.0 h"]
