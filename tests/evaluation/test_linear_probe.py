"""The linear probe is the published code's: LogisticRegressionCV with its ten strengths."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch import distributed as dist

from mezo.evaluation.linear_probe import LinearProbe, fit_probe

pytest.importorskip("sklearn")


def test_the_strength_is_chosen_among_ten_from_1e_minus_4_to_1e4():
    """Against scikit-learn on the strengths themselves; other ones give other weights."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import StratifiedKFold

    drawn = np.random.default_rng(3)
    labels = np.arange(60) % 3
    features = drawn.normal(size=(60, 5)) + labels[:, None] * np.linspace(0.0, 0.8, 5)
    shared = {"cv": StratifiedKFold(5), "max_iter": 5000, "tol": 1e-4, "random_state": 0}
    shared |= {"l1_ratios": (0.0,), "use_legacy_attributes": False, "scoring": "accuracy"}
    expected = LogisticRegressionCV(Cs=np.logspace(-4, 4, 10), **shared).fit(features, labels)
    probe = fit_probe(features, labels)
    assert np.array_equal(probe.weight, expected.coef_)
    assert np.array_equal(probe.bias, expected.intercept_)
    few = LogisticRegressionCV(Cs=np.logspace(-4, 4, 2), **shared).fit(features, labels)
    assert not np.allclose(few.coef_, probe.weight)
    assert np.array_equal(fit_probe(features, labels, bias=False).bias, np.zeros(3))


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_alone_writes_the_probe(tmp_path, monkeypatch, rank):
    """Two that write one file at once could leave a part of it; both know its size."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    probe = LinearProbe(np.ones((2, 3)), np.zeros(2), (0, 1))
    size = probe.save(tmp_path)
    path = tmp_path / "probe.safetensors"
    assert path.exists() == (rank == 0)
    if rank == 0:
        assert path.stat().st_size == size
        assert (load_file(path)["weight"] == 1).all()
    else:
        assert size > 2 * 3 * 8
