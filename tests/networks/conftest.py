"""Layers draw their parameters from a random state of the test's own."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_layers(untouched_global_state: None) -> Iterator[None]:
    """Seed what modules draw at construction, and put the state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
