"""What every run needs around its mathematics: random state, parameters, progress, a watch.

Nothing here changes torch's or Pyro's global state for longer than a ``with`` block.
"""

import contextlib
import operator
import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

__all__ = [
    "ConvergenceWarning",
    "NonFiniteError",
    "NonFiniteWatch",
    "Progress",
    "Watched",
    "private_param_store",
    "resolve_seed",
    "seeded",
]

_SUMS_AT_ONCE = 50


def resolve_seed(seed: Any) -> int:
    """Return the given seed, or fresh entropy from the operating system.

    Raises:
        ValueError: If the seed is not an integer in [0, 2**32).
    """
    if seed is None:
        return int.from_bytes(os.urandom(4), "little")
    try:
        # numpy's whole numbers are numbers too; True is not.
        whole = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        whole = -1
    if not 0 <= whole < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    return whole


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str | None = None) -> Iterator[None]:
    """Fork and seed the random state of torch, numpy and Python, and put it back afterwards.

    Args:
        seed: Resolved seed (see :func:`resolve_seed`).
        device: An accelerator whose generator is forked too; the CPU's always is.
    """
    kind = torch.device("cpu") if device is None else torch.device(device)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [] if kind.type == "cpu" else [kind]
    fork_type = "cuda" if kind.type == "cpu" else kind.type
    try:
        with torch.random.fork_rng(devices=devices, device_type=fork_type):
            # torch.manual_seed would seed every device, and those not forked would stay so.
            torch.default_generator.manual_seed(seed)
            for forked in devices:
                _seed_accelerator(forked, seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextlib.contextmanager
def private_param_store(state: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Swap Pyro's parameter store for a private one, and put it back afterwards.

    Args:
        state: What the private store starts from, as ``get_state`` gives it; default, a copy of
            the present store, so that parameters trained before are seen.
    """
    store = pyro.get_param_store()
    tables = ("_params", "_constraints", "_param_to_name")
    # Not get_state, which takes attributes from the parameters that a running program holds.
    before = {table: getattr(store, table) for table in tables}
    start = {
        "params": before["_params"] if state is None else state["params"],
        "constraints": before["_constraints"] if state is None else state["constraints"],
    }
    for table in tables:
        setattr(store, table, {})
    store.set_state({name: dict(table) for name, table in start.items()})  # type: ignore[arg-type]
    try:
        yield
    finally:
        for table, value in before.items():
            setattr(store, table, value)


class ConvergenceWarning(UserWarning):
    """A run ended whose draws should not be trusted as they are."""


class NonFiniteError(FloatingPointError):
    """A run met NaN or infinity.

    Attributes:
        step: The first bad step, counted from zero.
        sites: Names of the sites whose values or scores were not finite.
        posterior: What the run had at the last good snapshot, or None.
    """

    def __init__(self, message: str, *, step: int, sites: list[str], posterior: Any = None):
        super().__init__(message)
        self.step = step
        self.sites = sites
        self.posterior = posterior


class Watched(NamedTuple):
    """Sums of what a step met: a sum is finite where all its terms are.

    Attributes:
        total: Over the values of all evaluations.
        columns: Over the scores of all evaluations.
    """

    total: Float[Tensor, ""]
    columns: Float[Tensor, " dim"]

    @classmethod
    def of(
        cls, values: Float[Tensor, " evaluation"], scores: Float[Tensor, "row dim"]
    ) -> "Watched":
        """Sum values and scores."""
        return cls(values.sum(), scores.sum(0))


class NonFiniteWatch:
    """Looks for NaN and infinity without a device synchronization at each step.

    Sums are looked through by the dozen, on the device. Only :meth:`poll` reads the result.

    Args:
        dim: Width of the scores that are watched.
        device: Where they live.
    """

    def __init__(self, dim: int, device: torch.device):
        self._first_bad = torch.full((), -1, device=device)
        self._entries = torch.zeros(dim, dtype=torch.bool, device=device)
        self._pending: list[tuple[int, Watched]] = []

    def observe(self, step: int, watched: Watched) -> None:
        """Note whether all is finite at this step."""
        self._pending.append((step, watched))
        if len(self._pending) >= _SUMS_AT_ONCE:
            self._fold()

    def poll(self) -> int | None:
        """Return the first bad step, or None; this synchronizes."""
        self._fold()
        first = int(self._first_bad)
        return None if first < 0 else first

    def bad_entries(self) -> Bool[Tensor, " dim"]:
        """Entries of the score that were not finite at the first bad step."""
        return self._entries

    def _fold(self) -> None:
        if not self._pending:
            return
        steps, sums = zip(*self._pending, strict=True)
        self._pending = []
        finite = torch.stack([watched.columns for watched in sums]).isfinite()
        bad = ~(finite.all(1) & torch.stack([watched.total for watched in sums]).isfinite())
        index = bad.to(torch.uint8).argmax()
        first = bad.any() & (self._first_bad < 0)
        step = torch.tensor(steps, device=bad.device)[index]
        self._first_bad = torch.where(first, step, self._first_bad)
        self._entries = torch.where(first, ~finite[index], self._entries)


class Progress:
    """A progress bar that shows a run's own figures, read only every few steps.

    Args:
        total: Number of steps.
        label: The routine's name.
        show: Whether to draw the bar at all.
    """

    def __init__(self, total: int, label: str, show: bool):
        self._bar = tqdm(total=total, desc=label, disable=not show, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, figures: Callable[[], Mapping[str, float]] | None = None) -> None:
        """Count one step; where ``figures`` is given, show what it returns from then on."""
        if figures is not None and not self._bar.disable:
            shown = {name: f"{value:.4g}" for name, value in figures().items()}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def show(self, figures: Mapping[str, float]) -> None:
        """Count one step that is already done, with its figures."""
        self.advance(lambda: figures)


def _seed_accelerator(device: torch.device, seed: int) -> None:
    module = torch.get_device_module(device)
    chosen = contextlib.nullcontext() if device.index is None else module.device(device.index)
    with chosen:
        module.manual_seed(seed)
