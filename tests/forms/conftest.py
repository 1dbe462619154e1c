"""Tests of forms: their small models are perturbed as large ones are."""

import pytest

from mezo.forms.bundles import Bundles


@pytest.fixture(autouse=True)
def _as_in_a_large_model(request, monkeypatch):
    """Parameters are perturbed when they are read, but for tests that are marked `few`."""
    if "few" not in request.keywords:
        monkeypatch.setattr(Bundles, "FEW", 0)
