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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from bayesattn.inference.ascent import Ascent
from bayesattn.inference.ascent_run import AscentState, rounding
from bayesattn.inference.checkpoints import Checkpoint
from bayesattn.inference.initialization import Init
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.running import Watched
from bayesattn.inference.schedules import Number

__all__ = ["EM", "EMInfo"]


class EMInfo(NamedTuple):
    """What the reader of a run needs of one step; never read back.

    Attributes:
        log_density: Log joint density before the step, in nats.
        watched: The same, and the values of all sites.
    """

    log_density: Float[Tensor, " run"]
    watched: Watched


class EM(Ascent):
    """Expectation maximization on a program with closed forms.

    Args:
        model: A Pyro program that has ``log_density``, ``e_step`` and ``m_step``; see
            :class:`bayesattn.inference.closed_forms.ClosedForms`.
        **density: See :class:`bayesattn.inference.DensitySettings`. It is evaluated at the start,
            where the closed form is held against it, and at the end.

    Raises:
        ValueError: If the program lacks a closed form.
    """

    forms: ClassVar[tuple[str, ...]] = ("log_density", "e_step", "m_step")
    objective: ClassVar[str] = "the log joint density"

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
        return self.ascend(
            args,
            kwargs,
            num_steps=num_steps,
            num_runs=num_runs,
            tolerance=tolerance,
            seed=seed,
            progress=progress,
            init=init,
            checkpoint=checkpoint,
            check_every=check_every,
        )

    def init(
        self, density: LogDensity, num_runs: int, init: Init, generator: torch.Generator
    ) -> AscentState:
        """Place each run.

        Raises:
            ValueError: If ``init`` does not fit, or the closed form is not the program's density.
        """
        runs = self.starts(density, num_runs, init, generator, cast("Init", init_to_sample))
        self._check_density(density, runs[0])
        return AscentState(tuple(runs))

    def step(self, state: AscentState, *args: Any, **kwargs: Any) -> AscentState:
        """Do one E- and one M-step of each run given the program's arguments."""
        model: Any = self.model
        return AscentState(
            tuple(
                dict(model.m_step(run, model.e_step(run, *args, **kwargs), *args, **kwargs))
                for run in state.runs
            )
        )

    def values(self, state: AscentState, *args: Any, **kwargs: Any) -> Float[Tensor, " run"]:
        """Log joint density of each run, all independent problems together."""
        model: Any = self.model
        return torch.stack([model.log_density(run, *args, **kwargs).sum() for run in state.runs])

    def info(self, values: Float[Tensor, " run"], watched: Watched) -> EMInfo:
        """The log joint density before a step, and what is watched."""
        return EMInfo(values, watched)

    def finished(self, density: LogDensity, state: AscentState, **fields: Any) -> Posterior:
        """Posterior of the points of a state."""
        names = [site.name for site in density.sites]
        unconstrained = _unconstrained(density, state.runs)
        values = density.value_and_score(unconstrained, is_in_loop=False)[0]
        return self.posterior(
            density,
            {name: torch.stack([run[name] for run in state.runs])[:, None] for name in names},
            draws_are="point",
            unconstrained=unconstrained[:, None],
            sample_stats={"lp": values[:, None]},
            **fields,
        )

    def _check_density(self, density: LogDensity, run: Mapping[str, Tensor]) -> None:
        ours = self.values(AscentState((dict(run),)), *density.args, **density.kwargs)
        theirs = _log_joint(density, [run])
        scale = 1 + theirs.abs() + sum(site.shape.numel() for site in density.sites)
        allowed = scale * rounding(density, ours) ** 0.5
        if bool(((ours - theirs).abs() > allowed).any()):
            raise ValueError(
                f"the program's log_density is {float(ours):.6g} at the start, but its sites have "
                f"the log joint density {float(theirs):.6g} there; the two must agree"
            )


def _unconstrained(
    density: LogDensity, runs: Sequence[Mapping[str, Tensor]]
) -> Float[Tensor, "run dim"]:
    """States on the real line."""
    values = {site.name: torch.stack([run[site.name] for run in runs]) for site in density.sites}
    return density.unconstrain(values)


def _log_joint(density: LogDensity, runs: Sequence[Mapping[str, Tensor]]) -> Float[Tensor, " run"]:
    """Log density of constrained values, without Jacobian."""
    rows = _unconstrained(density, runs)
    values = density.value_and_score(rows, is_in_loop=False)[0]
    return values - density.log_determinant(rows)
