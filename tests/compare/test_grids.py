"""The paper's grids as data, and the search over a grid: every cell once, best by dev."""

import json

import pytest
from folders import mezo, model_folder, reviews, training

from mezo.check import measure as check
from mezo.compare import grids
from mezo.errors import InputError
from mezo.models.arguments import ModelArguments
from mezo.runs.arguments import TrainArguments
from mezo.runs.data_arguments import DataArguments


@pytest.fixture
def place(tmp_path):
    model_folder(tmp_path / "tiny")
    reviews(tmp_path / "reviews.jsonl")
    return tmp_path


def options(place, *without):
    """Those of a short run, without what the grid is to set."""
    changes = {"output_dir": place / "grid", "eval_steps": 0.5, "save_steps": 0.5}
    argv = training(place, place / "tiny", disable_tqdm=True, **changes)
    return [word for word in argv if word.split("=")[0][2:] not in without]


def test_mezo_check_names_the_rates_of_these_tables():
    """And none for what the paper did not train."""
    every = "1e-7 to 1e-5 for RoBERTa-large, 1e-7 to 1e-6 for OPT (Tables 15, 16)"
    assert check.of_paper("all weights") == (every, "1e-3")
    lora = "1e-5 to 1e-4 for RoBERTa-large, 5e-5 to 1e-4 for OPT (Tables 15, 16)"
    assert check.of_paper("LORA") == (lora, "1e-3 or 1e-2")
    prefix = "1e-3 to 1e-2 for RoBERTa-large, 1e-3 to 1e-2 for OPT (Tables 15, 16)"
    assert check.of_paper("PREFIX_TUNING") == (prefix, "1e-1")
    assert check.of_paper("PROMPT_TUNING") is None


@pytest.mark.parametrize("name", grids.GRIDS)
def test_every_cell_is_a_run_that_could_begin(name, tmp_path):
    """Its options exist and go together."""
    found = list(grids.cells(grids.load(name)))
    assert len({cell for cell, _ in found}) == len(found) > 1
    for _, chosen in found:
        known = [grids.with_options(kind, chosen) for kind in (ModelArguments(), DataArguments())]
        args = grids.with_options(TrainArguments(str(tmp_path), use_cpu=True), chosen)
        asked = vars(known[0]) | vars(known[1]) | vars(args)
        assert {option: asked[option] for option in chosen} == chosen


def test_a_search_runs_every_cell_and_takes_the_best(place, capsys):
    (place / "mine.yaml").write_text("learning_rate: [1e-3, 1e-2]\nseed: [1, 2]\nmezo_eps: 1e-3\n")
    argv = options(place, "learning_rate", "seed")
    code, out, _ = mezo(capsys, "train", *argv, "--grid", place / "mine.yaml", "--json")
    found = json.loads(out)
    assert code == 0
    assert found == json.loads((place / "grid" / "grid.json").read_text())
    assert [cell["name"] for cell in found["cells"]] == [
        f"learning_rate={rate},seed={seed}" for rate in (0.001, 0.01) for seed in (1, 2)
    ]
    for cell in found["cells"]:
        result = json.loads((place / "grid" / cell["name"] / "result.json").read_text())
        assert (result["config"]["seed"], result["dev"]) == (cell["options"]["seed"], cell["dev"])
        assert result["config"]["learning_rate"] == cell["options"]["learning_rate"]
    top = max(cell["dev"] for cell in found["cells"])
    first = next(cell for cell in found["cells"] if cell["dev"] == top)
    assert (found["best"], found["dev"]) == (str(place / "grid" / first["name"]), top)

    # again: nothing is run twice; a cell that was cut off goes on; another setting is refused
    cut = place / "grid" / first["name"]
    (cut / "result.json").unlink()
    others = {path: path.stat().st_mtime_ns for path in place.glob("grid/*/result.json")}
    code, out, err = mezo(capsys, "train", *argv, "--grid", place / "mine.yaml", "--json")
    assert code == 0
    assert err.count("found: ") == 3
    assert f"resumed: {first['name']}" in err
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())
    again = json.loads(out)["cells"]
    assert [cell["test"] for cell in again] == [cell["test"] for cell in found["cells"]]
    more = [*argv, "--grid", place / "mine.yaml", "--max_steps=5"]
    code, _, err = mezo(capsys, "train", *more)
    assert code == 2
    assert "is of a run with max_steps 4, not 5: take another --output_dir" in err


def test_an_option_by_hand_takes_the_place_of_the_grid_s(place, capsys):
    more = ["--grid=table16-mezo", "--learning_rate=1e-3", "--num_train=8", "--num-test=4"]
    code, out, _ = mezo(capsys, "train", *options(place), *more, "--json")
    (cell,) = json.loads(out)["cells"]
    assert code == 0
    assert (cell["name"], cell["steps"]) == ("cell", 4)
    config = json.loads((place / "grid" / "cell" / "result.json").read_text())["config"]
    assert (config["learning_rate"], config["num_train"], config["num_test"]) == (1e-3, 8, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: [1e-6]", "no option 'learning_rte' of mezo train; did you mean learning_"),
        ("output_dir: x", "no option 'output_dir'"),
        ("learning_rate: []", "learning_rate is an empty list"),
        ("learning_rate: [1e-6, big]", "learning_rate must be a number, got 'big'"),
        ("max_steps: [1.5]", "max_steps must be of type int, got 1.5"),
        ("- 1", "expected lines 'option: value'"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_grid_is_one_line(tmp_path, text, message):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        grids.load(str(tmp_path / "g.yaml"))
    assert message in str(caught.value)


def test_an_unknown_grid_names_the_nearest():
    for name, message in (
        ("table15-mez", "did you mean table15-mezo"),
        ("zzz", "known: table4-mezo, "),
        ("none.yaml", "none.yaml: No such file"),
    ):
        with pytest.raises(InputError, match=message):
            grids.load(name)
