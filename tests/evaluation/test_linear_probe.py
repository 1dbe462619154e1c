"""The linear probe is the published code's: LogisticRegressionCV with its ten strengths."""

import numpy as np
import pytest

from mezo.evaluation.linear_probe import fit_probe

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
