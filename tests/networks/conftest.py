"""Layers draw their parameters from a random state of the test's own."""

import pytest


@pytest.fixture(autouse=True)
def layers_are_seeded(seeded_layers: None) -> None:
    """Take the fixture for all tests of this folder."""
