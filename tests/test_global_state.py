"""The guard over global state sees what it names, and importing the library changes nothing."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.poutine import runtime

from tests.global_state import changes, snapshot

ROOT = Path(__file__).parents[1]


def _enter_trace() -> None:
    pyro.poutine.trace().__enter__()


MEDDLERS = {
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float32),
    "torch's grad mode": lambda: torch.set_grad_enabled(False),
    "torch's random state": lambda: torch.rand(()),
    "torch's deterministic mode": lambda: torch.use_deterministic_algorithms(True),
    "numpy's random state": lambda: np.random.rand(),
    "Python's random state": random.random,
    "Pyro's param store": lambda: pyro.param("weight", torch.ones(2)),
    "Pyro's settings": lambda: pyro.enable_validation(False),
    "Pyro's effect stack": _enter_trace,
}


@pytest.fixture
def put_back() -> Iterator[None]:
    states = np.random.get_state(), random.getstate(), pyro.settings.get()
    with torch.random.fork_rng():
        yield
    np.random.set_state(states[0])
    random.setstate(states[1])
    pyro.settings.set(**states[2])
    pyro.clear_param_store()
    runtime._PYRO_STACK.clear()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", MEDDLERS)
def test_guard_sees(name: str, put_back: None) -> None:
    before = snapshot()
    meddle: Callable[[], object] = MEDDLERS[name]
    meddle()
    assert changes(before, snapshot()) == [name]


def test_guard_is_quiet_when_nothing_happens() -> None:
    assert changes(snapshot(), snapshot()) == []


IMPORT_EACH_MODULE = """
import importlib, pkgutil
import bayesattn
from tests.global_state import changes, snapshot

before = snapshot()
for module in pkgutil.walk_packages(bayesattn.__path__, "bayesattn."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        changed = changes(before, snapshot())
        assert not changed, f"importing {module.name} changes {changed}"
"""


def test_imports_leave_global_state_alone() -> None:
    run = [sys.executable, "-c", IMPORT_EACH_MODULE]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
