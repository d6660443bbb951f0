"""Fixtures of the tests of routines."""

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Run as users do, without the test run's checks of annotations, which would refuse first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
