"""What all routines share: a checked model, a cached log density, and a loop of steps that can stop.

A loop shows progress, watches for non-finite values without a look at the device at every step, keeps
a good snapshot, and returns what there is when it is interrupted.
"""

import contextlib
import inspect
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from bayesattn.inference.log_density import DensitySettings, LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.running import (
    NonFiniteError,
    NonFiniteWatch,
    Progress,
    resolve_seed,
    seeded,
)

__all__ = ["DensityOptions", "Optimizer", "Routine", "StepLoop", "interruptible"]

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


class DensityOptions(TypedDict, total=False):
    """Options of :class:`bayesattn.inference.DensitySettings` that a routine passes on."""

    compile: Literal["record", "none"]
    chunk_size: int | None
    stochastic: bool
    max_plate_nesting: int | None


class Routine:
    """A model with settings; subclasses add ``run``.

    Args:
        model: A Pyro program.
        **density: See :class:`bayesattn.inference.DensitySettings`.

    Raises:
        ValueError: If the model is no callable or has a parameter that bears one of run's names.
    """

    def __init__(self, model: Callable, **density: Any):
        if not callable(model):
            raise ValueError(f"model must be a Pyro program, that is callable, got {model!r}")
        taken = inspect.signature(type(self).run).parameters  # type: ignore[attr-defined]
        names = {
            name
            for name, parameter in taken.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        clash = sorted(names.intersection(_parameter_names(model)))
        if clash:
            raise ValueError(
                f"the model's parameters {clash} bear names that {type(self).__name__}.run takes for "
                "itself; fix them with functools.partial, or rename them"
            )
        self.model = model
        self.density_settings = DensitySettings(**density)

    def log_density(self, *args: Any, **kwargs: Any) -> LogDensity:
        """The model's log density given its arguments; graphs are shared between runs."""
        return LogDensity(self.model, *args, settings=self.density_settings, **kwargs)

    def posterior(
        self, density: LogDensity, draws: Mapping[str, Tensor], **fields: Any
    ) -> Posterior:
        """Draws of this routine as a posterior that knows its model and data."""
        return Posterior(
            draws,
            method=type(self).__name__,
            model=self.model,
            args=density.args,
            kwargs=density.kwargs,
            **fields,
        )


class StepLoop:
    """Runs steps with a bar, a watch, snapshots and a clean stop.

    Args:
        label: The routine's name.
        num_steps: How many steps.
        seed: Of the run; fresh if None.
        progress: Whether to show a bar.
        check_every: Steps between looks at the device.

    Attributes:
        seed: As resolved.
        generator: On the CPU, seeded.

    Raises:
        ValueError: If a number of steps is below one.
    """

    def __init__(
        self, label: str, num_steps: int, seed: int | None, progress: bool, check_every: int = 50
    ):
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least one, got {num_steps}")
        if check_every < 1:
            raise ValueError(f"check_every must be at least one step, got {check_every}")
        self.label, self.num_steps, self.check_every = label, num_steps, check_every
        self.seed = resolve_seed(seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.show = progress

    def random_state(self) -> contextlib.AbstractContextManager[None]:
        """Fork and seed global random state for what draws from it."""
        return seeded(self.seed)

    def run(
        self,
        density: LogDensity,
        advance: Callable[[int], Any],
        snapshot: Callable[[], Any],
        figures: Callable[[Any], Mapping[str, float]],
        finish: Callable[[Any, dict[str, Tensor], dict[str, Any]], Posterior],
    ) -> Posterior:
        """Run all steps, and finish.

        Args:
            density: Of the model, to name sites.
            advance: Does one step and returns its info, with fields ``values`` and ``scores`` that are
                watched, and others, one number a run, that become curves.
            snapshot: What the run has.
            figures: What the bar shows of an info.
            finish: Makes the posterior of a snapshot, curves and attrs.

        Raises:
            NonFiniteError: With the posterior of the last good snapshot.
        """
        watch = NonFiniteWatch(density.dim, density.device)
        curves: dict[str, list[Tensor]] = {}
        good, good_step, done = snapshot(), 0, 0
        start = time.perf_counter()

        def attrs(**more: Any) -> dict[str, Any]:
            seconds = time.perf_counter() - start
            return {"seed": self.seed, "num_steps": done, "seconds": seconds, **more}

        def stacked(steps: int) -> dict[str, Tensor]:
            return {name: torch.stack(rows[:steps], -1) for name, rows in curves.items() if steps}

        def check() -> None:
            nonlocal good, good_step
            bad = watch.poll()
            if bad is None:
                good, good_step = snapshot(), done
                return
            sites = density.site_names(watch.bad_entries())
            raise NonFiniteError(
                f"{self.label}: the log density or its score is not finite at step {bad}, first in the "
                f"sites {sites or 'outside of all sites'}; the particles of step {good_step} are kept in "
                "this error's .posterior. A smaller learning rate, other starts (init=) or "
                "coordinates='laplace' may help",
                step=bad,
                sites=sites,
                posterior=finish(good, stacked(good_step), attrs(stopped_at_step=good_step)),
            )

        with Progress(self.num_steps, self.label, self.show) as bar, interruptible() as stop:
            for step in range(self.num_steps):
                if stop.is_set():
                    break
                info = advance(step)
                watch.observe(step, info.values, info.scores)
                for name, value in info._asdict().items():
                    if name not in ("values", "scores"):
                        curves.setdefault(name, []).append(value)
                done = step + 1
                due = done % self.check_every == 0 or done == self.num_steps
                bar.advance((lambda info=info: figures(info)) if due else None)
                if due:
                    check()
        if stop.is_set():
            check()
            warnings.warn(
                f"{self.label} was interrupted after {done} of {self.num_steps} steps; what it had is "
                "returned",
                RuntimeWarning,
                stacklevel=3,
            )
            return finish(good, stacked(done), attrs(interrupted=1))
        return finish(good, stacked(done), attrs())


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag that is read between steps; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _parameter_names(model: Callable) -> list[str]:
    target = getattr(model, "forward", model) if isinstance(model, torch.nn.Module) else model
    try:
        return list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return []
