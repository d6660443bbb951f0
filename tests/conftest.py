"""What every test runs under: float64, one thread, no display, and a guard over global state.

A test draws from the ``generator`` fixture or inside ``torch.random.fork_rng``; one that leaves
any global state changed fails, so that the library cannot change it unseen either.
"""

import random
import zlib
from collections.abc import Iterator

# Here, before there are several processes: it notes the day in a file that two would fight over.
import arviz  # noqa: F401
import hypothesis
import jaxtyping
import matplotlib as mpl
import pytest
import torch
from beartype._check.code import codemain

from tests.global_state import changes, snapshot

mpl.use("Agg")
torch.set_num_threads(1)

# Where beartype checks shapes, it looks at a random item of a list: with this, of its own choosing,
# so that Python's random state stays as it was.
codemain.getrandbits = random.Random(0).getrandbits  # type: ignore[attr-defined]

# Derandomized: a failure on one machine is a failure on all of them.
hypothesis.settings.register_profile("bayesattn", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("bayesattn")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Make float64 the default dtype of a test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def untouched_global_state(float64: None) -> Iterator[None]:
    """Fail a test that leaves global state other than it found it."""
    before = snapshot()
    yield
    changed = changes(before, snapshot())
    assert not changed, f"left changed: {', '.join(changed)}"


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Return a CPU generator whose seed is the test's own name."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def seeded_layers(untouched_global_state: None) -> Iterator[None]:
    """Seed what modules draw at construction, and put the state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Run as users do, without the test run's checks of annotations, which would refuse first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
