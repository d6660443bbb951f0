r"""Expectation maximization on a Pyro program that knows its closed forms.

.. math:: \theta_{t+1} = \arg\max_\theta
    \mathbb{E}_{p(z \mid x, \theta_t)} [\log p(x, z, \theta)]

Each step raises the joint density of data and parameters, hidden sites summed out: to a MAP
estimate under the program's priors, to maximum likelihood where they are flat. No gradient is
taken, and no step size chosen. The density is that of the constrained values, without Jacobian.

Source:
    Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm,
    JRSS B 39.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from jaxtyping import Float
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from bayesattn.inference.checkpoints import Checkpoint, resumed_seed
from bayesattn.inference.closed_forms import check_closed_forms
from bayesattn.inference.em_run import EMInfo, EMRun, EMState, rounding, unconstrained_states
from bayesattn.inference.initialization import Init, initial_values
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.routine import DensityOptions, Routine, check_count
from bayesattn.inference.schedules import Number
from bayesattn.inference.step_loop import StepLoop

__all__ = ["EM", "EMInfo", "EMState"]


class EM(Routine):
    """Expectation maximization on a program with closed forms.

    Args:
        model: A Pyro program that has ``log_density``, ``e_step`` and ``m_step``; see
            :class:`bayesattn.inference.closed_forms.ClosedForms`.
        **density: See :class:`bayesattn.inference.DensitySettings`. It is evaluated at the start,
            where the closed form is held against it, and at the end.

    Raises:
        ValueError: If the program lacks a closed form.
    """

    def __init__(self, model: Callable, **density: Unpack[DensityOptions]):
        super().__init__(model, **density)
        check_closed_forms(model)

    def run(
        self,
        *args: Any,
        num_steps: int,
        num_runs: int = 1,
        tolerance: Number | None = None,
        seed: int | None = None,
        progress: bool = True,
        init: Init = None,
        checkpoint: Checkpoint | str | Path | None = None,
        check_every: int = 10,
        **kwargs: Any,
    ) -> Posterior:
        """Climb to a mode given the program's arguments.

        Args:
            *args: The program's arguments.
            num_steps: Most steps.
            num_runs: Restarts, one after another at each step; they become chains.
            tolerance: Stop at a look at which the last step raised no run's log joint density by
                more, in nats.
            seed: Of starts; fresh if None, and noted in the posterior.
            progress: Whether to show a progress bar.
            init: Where to start; see :func:`bayesattn.inference.initial_values`. By default the
                first run starts at the program's ``initial_state``, and others at draws from the
                prior; without an ``initial_state`` all start as those of other routines.
            checkpoint: File to save the run to, and to go on from where it is there already; see
                :class:`bayesattn.inference.Checkpoint`.
            check_every: Steps between looks at the device: progress, non-finite values, a snapshot.
            **kwargs: The program's keyword arguments.

        Returns:
            Posterior of one point a run, with the log joint density before each step.

        Raises:
            ValueError: If the program, its arguments or ``init`` do not fit, its plates are
                subsampled, or its ``log_density`` is not that of the program.
            NonFiniteError: If values stop being finite; what there was is attached.
        """
        num_runs = check_count("num_runs", num_runs)
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {tolerance!r}")
        saved = Checkpoint.of(checkpoint)
        loop = StepLoop("EM", num_steps, resumed_seed(seed, saved), progress, check_every)
        density = self.log_density(*args, **kwargs)
        if density.program.subsamples:
            raise ValueError(
                f"EM needs the full data, but the plates {sorted(density.program.subsamples)} are "
                "subsampled"
            )
        rule = {"tolerance": tolerance, "check_every": tolerance and check_every}
        loop.save_to(saved, density, num_runs=num_runs, **rule)
        with loop.random_state(density.device), torch.no_grad():
            state = self.init(density, num_runs, init, loop.generator)
            return loop.run(EMRun(self, density, state, tolerance))

    def init(
        self, density: LogDensity, num_runs: int, init: Init, generator: torch.Generator
    ) -> EMState:
        """Place each run.

        Raises:
            ValueError: If ``init`` does not fit, or the closed form is not the program's density.
        """
        start = getattr(self.model, "initial_state", None)
        given = []
        if init is None and start is not None:
            given = [dict(start(*density.args, **density.kwargs))]
            init = cast("Init", init_to_sample)
        count = num_runs - len(given)
        rows = initial_values(density, count, init, generator) if count else None
        runs = [*given, *([] if rows is None else _states(density.constrain(rows)))]
        self._check_density(density, runs[0])
        return EMState(tuple(runs))

    def step(self, state: EMState, *args: Any, **kwargs: Any) -> EMState:
        """Do one E- and one M-step of each run given the program's arguments."""
        model: Any = self.model
        return EMState(
            tuple(
                dict(model.m_step(run, model.e_step(run, *args, **kwargs), *args, **kwargs))
                for run in state.runs
            )
        )

    def values(self, state: EMState, *args: Any, **kwargs: Any) -> Float[Tensor, " run"]:
        """Log joint density of each run, all independent problems together."""
        model: Any = self.model
        return torch.stack([model.log_density(run, *args, **kwargs).sum() for run in state.runs])

    def _check_density(self, density: LogDensity, run: Mapping[str, Tensor]) -> None:
        ours = self.values(EMState((dict(run),)), *density.args, **density.kwargs)
        theirs = _log_joint(density, [run])
        scale = 1 + theirs.abs() + sum(site.shape.numel() for site in density.sites)
        allowed = scale * rounding(density, ours) ** 0.5
        if bool(((ours - theirs).abs() > allowed).any()):
            raise ValueError(
                f"the program's log_density is {float(ours):.6g} at the start, but its sites have "
                f"the log joint density {float(theirs):.6g} there; the two must agree"
            )


def _states(values: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Rows of values as one state each."""
    count = len(next(iter(values.values())))
    return [{name: value[row] for name, value in values.items()} for row in range(count)]


def _log_joint(density: LogDensity, runs: Any) -> Float[Tensor, " run"]:
    """Log density of constrained values, without Jacobian."""
    rows = unconstrained_states(density, runs)
    values = density.value_and_score(rows, is_in_loop=False)[0]
    return values - density.log_determinant(rows)
