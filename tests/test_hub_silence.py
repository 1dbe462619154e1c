"""Without a network a wrong name ends at once: the hub is asked one time, not six times a file."""

import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest
import transformers
from folders import model_folder
from huggingface_hub import constants

from mezo import foreign, tasks
from mezo.errors import InputError
from mezo.models import loading
from mezo.models.arguments import ModelArguments


@pytest.fixture
def silent(monkeypatch, tmp_path):
    """A hub at a port that is taken and where nobody listens; empty caches."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        yield url


@contextmanager
def answering():
    """A hub that knows nothing, and the list of what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def forbidden(*args, **kwargs):
    raise AssertionError("the hub's client would ask again and again")


def test_any_answer_will_do_and_one_question(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with answering() as (url, asked):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert foreign.hub_silence() is None
    assert len(asked) == 1


def test_offline_nothing_is_asked(silent, monkeypatch):
    """HF_HUB_OFFLINE: the hub's clients know, and say so themselves."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert foreign.hub_silence() is None


@pytest.mark.parametrize(
    ("name", "more"),
    [("facebook/opt-125x", ""), ("casual-lm", "; did you mean causal-lm?")],
)
def test_a_model_that_is_nowhere_is_one_line(silent, monkeypatch, name, more):
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", forbidden)
    with pytest.raises(InputError) as refused:
        loading.load(ModelArguments(name))
    told = str(refused.value)
    start = f"model {name}: no such folder, no copy in the cache, and no answer from {silent} ("
    assert told.startswith(start)
    assert told.endswith(f"){more}")


def test_a_model_in_the_cache_is_read_from_there_alone(silent, monkeypatch, tmp_path):
    """In the folders that huggingface_hub makes: a revision names a commit, a commit has files."""
    place = tmp_path / "hub" / "models--me--tiny"
    model_folder(place / "snapshots" / ("1" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr(time, "sleep", forbidden)  # as between two questions
    model, tokenizer = loading.load(ModelArguments("me/tiny"))
    here = next(Path(place, "snapshots").iterdir())
    assert len(tokenizer) == len(transformers.AutoTokenizer.from_pretrained(here))
    assert loading.parameters_of(ModelArguments("me/tiny")) == model.num_parameters()


def test_a_data_set_that_is_nowhere_is_one_line(silent, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", forbidden)
    with pytest.raises(InputError) as refused:
        tasks.load_examples(tasks.get("sst2"), "train")
    told = str(refused.value)
    assert told.startswith(f"cannot load nyu-mll/glue sst2 from the hub (no answer from {silent} (")
    assert told.endswith("); give data_dir")


def test_a_data_set_in_the_cache_is_left_to_its_own_library(silent, tmp_path):
    (tmp_path / "datasets" / "nyu-mll___glue").mkdir(parents=True)
    assert foreign.check_dataset_reach("nyu-mll/glue") is None
    with pytest.raises(InputError, match="no answer from"):
        foreign.check_dataset_reach("nyu-mll/glues")
