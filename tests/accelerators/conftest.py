"""Tests of all on an accelerator against all on the CPU; skipped where there is none.

``TEST_DEVICE`` names another than the first GPU.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Return where to compute."""
    chosen = os.environ.get("TEST_DEVICE", "cuda")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return chosen


@pytest.fixture
def no_waiting(device: str) -> Callable[[], AbstractContextManager[None]]:
    """Within it, what waits for a GPU fails."""

    @contextmanager
    def context() -> Iterator[None]:
        if not device.startswith("cuda"):
            yield
            return
        try:
            with warnings.catch_warnings():
                # Of the mode itself, which does not see all that waits.
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context
