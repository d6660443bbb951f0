"""What routines of closed forms share: each step raises an objective, and none has a size."""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.argument_checks import check_count
from bayesattn.inference.ascent_run import AscentRun, AscentState
from bayesattn.inference.checkpoints import Checkpoint, resumed_seed
from bayesattn.inference.closed_forms import check_closed_forms
from bayesattn.inference.initialization import Init, initial_values
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.routine import DensityOptions, Routine
from bayesattn.inference.running import Watched
from bayesattn.inference.schedules import Number
from bayesattn.inference.step_loop import StepLoop

__all__ = ["Ascent"]


class Ascent(Routine):
    """A routine that climbs by a program's own closed forms; subclasses say which, and add ``run``.

    Args:
        model: A Pyro program with these forms.
        **density: See :class:`bayesattn.inference.DensitySettings`. It is evaluated at the start,
            where the closed forms are held against it, and at the end.

    Attributes:
        forms: Methods that the program must have.
        objective: What no step lowers, in words.

    Raises:
        ValueError: If the program lacks a closed form.
    """

    forms: ClassVar[tuple[str, ...]]
    objective: ClassVar[str]

    def __init__(self, model: Callable, **density: Unpack[DensityOptions]):
        super().__init__(model, **density)
        check_closed_forms(model, self.forms, type(self).__name__)

    @abc.abstractmethod
    def init(
        self, density: LogDensity, num_runs: int, init: Init, generator: torch.Generator
    ) -> AscentState:
        """Place each run.

        Raises:
            ValueError: If ``init`` does not fit, or the closed forms are not the program's.
        """

    @abc.abstractmethod
    def step(self, state: AscentState, *args: Any, **kwargs: Any) -> AscentState:
        """Move each run once given the program's arguments."""

    @abc.abstractmethod
    def values(self, state: AscentState, *args: Any, **kwargs: Any) -> Float[Tensor, " run"]:
        """The objective of each run, in nats."""

    @abc.abstractmethod
    def info(self, values: Float[Tensor, " run"], watched: Watched) -> Any:
        """The objective before a step, first, and what is watched."""

    @abc.abstractmethod
    def finished(self, density: LogDensity, state: AscentState, **fields: Any) -> Posterior:
        """Posterior of a state."""

    def ascend(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        num_steps: int,
        num_runs: int,
        tolerance: Number | None,
        seed: int | None,
        progress: bool,
        init: Init,
        checkpoint: Checkpoint | str | Path | None,
        check_every: int,
        **settings: Any,
    ) -> Posterior:
        """Do the steps of a run.

        Args:
            args: The program's arguments.
            kwargs: Its keyword arguments.
            num_steps: As all that follow, an argument of ``run``.
            num_runs: Restarts.
            tolerance: At or below which a rise is none.
            seed: Of the run.
            progress: Whether to show a bar.
            init: Where to start.
            checkpoint: Where to save, and to go on from.
            check_every: Steps between looks.
            **settings: Further ones that :meth:`finished` takes.

        Raises:
            ValueError: If the program, its arguments or ``init`` do not fit, its plates are
                subsampled, or its closed forms are not those of the program.
            NonFiniteError: If values stop being finite; what there was is attached.
        """
        label, num_runs = type(self).__name__, check_count("num_runs", num_runs)
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {tolerance!r}")
        saved = Checkpoint.of(checkpoint)
        loop = StepLoop(label, num_steps, resumed_seed(seed, saved), progress, check_every)
        density = self.log_density(*args, **kwargs)
        if density.program.subsamples:
            raise ValueError(
                f"{label} needs the full data, but the plates "
                f"{sorted(density.program.subsamples)} are subsampled"
            )
        rule = {"tolerance": tolerance, "check_every": tolerance and check_every}
        loop.save_to(saved, density, num_runs=num_runs, **rule, **settings)
        with loop.random_state(density.device), torch.no_grad():
            state = self.init(density, num_runs, init, loop.generator)
            return loop.run(AscentRun(self, density, state, tolerance, settings))

    def starts(
        self,
        density: LogDensity,
        num_runs: int,
        init: Init,
        generator: torch.Generator,
        others: Init = None,
    ) -> list[dict[str, Tensor]]:
        """Site to constrained value, for each run.

        Where no ``init`` is given, and the program has an ``initial_state``, the first run starts
        there and further ones as ``others`` says.
        """
        start = getattr(self.model, "initial_state", None)
        given = []
        if init is None and start is not None:
            given = [dict(start(*density.args, **density.kwargs))]
            init = others
        count = num_runs - len(given)
        if not count:
            return given
        values = density.constrain(initial_values(density, count, init, generator))
        rows = [{name: value[row] for name, value in values.items()} for row in range(count)]
        return [*given, *rows]
