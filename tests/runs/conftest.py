"""The folder that runs of tests/runs start from."""

import pytest
from folders import model_folder, reviews


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models and a file of reviews."""
    folder = tmp_path_factory.mktemp("run")
    model_folder(folder / "tiny")
    model_folder(folder / "encoder", "encoder")
    reviews(folder / "reviews.jsonl")
    return folder
