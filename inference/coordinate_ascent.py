r"""Variational Bayes by coordinate ascent, on a Pyro program that knows its closed forms.

.. math:: q(\theta) = \prod_i q_i(\theta_i), \qquad
    \log q_i(\theta_i) = \mathbb{E}_{q_{-i}} [\log p(x, \theta)] + \text{const}

Each step gives each site in turn its best law given those of the others, which raises the evidence
lower bound (ELBO). No gradient is taken, no step size chosen, and the bound is exact. Where a law
is a point, this is variational EM.

Source:
    Beal (2003), Variational algorithms for approximate Bayesian inference, thesis, University
    College London, chapter 2; Blei, Kucukelbir and McAuliffe (2017), arXiv:1601.00670.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.argument_checks import check_count
from bayesattn.inference.ascent import Ascent
from bayesattn.inference.ascent_run import AscentState, rounding
from bayesattn.inference.checkpoints import Checkpoint
from bayesattn.inference.initialization import Init
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.running import Watched
from bayesattn.inference.schedules import Number

__all__ = ["CoordinateAscent", "CoordinateInfo"]

# Draws by which the bound is checked, and standard errors of their mean that it may be off.
_CHECK_DRAWS = 50
_ALLOWED_ERRORS = 8
# Nats between the bounds of runs that found the same; draws may differ in what has no order.
_SAME_BOUND = 1.0


class CoordinateInfo(NamedTuple):
    """What the reader of a run needs of one step; never read back.

    Attributes:
        elbo: Before the step, exactly, in nats.
        watched: The same, and the parameters of all laws.
    """

    elbo: Float[Tensor, " run"]
    watched: Watched


class CoordinateAscent(Ascent):
    """Closed-form variational Bayes, each site's law in turn.

    Args:
        model: A Pyro program that has ``law_around``, ``laws``, ``elbo`` and ``coordinate_step``;
            see :class:`bayesattn.inference.closed_forms.MeanField`.
        **density: See :class:`bayesattn.inference.DensitySettings`. It is evaluated at the start,
            where the bound is held against it, and at the end.

    Raises:
        ValueError: If the program lacks a closed form.
    """

    forms: ClassVar[tuple[str, ...]] = ("law_around", "laws", "elbo", "coordinate_step")
    objective: ClassVar[str] = "the evidence lower bound"

    def run(
        self,
        *args: Any,
        num_steps: int,
        num_samples: int = 1000,
        num_runs: int = 1,
        tolerance: Number | None = None,
        seed: int | None = None,
        progress: bool = True,
        init: Init = None,
        checkpoint: Checkpoint | str | Path | None = None,
        check_every: int = 10,
        **kwargs: Any,
    ) -> Posterior:
        """Raise the bound given the program's arguments, and draw from the laws.

        Args:
            *args: The program's arguments.
            num_steps: Most steps.
            num_samples: Independent draws from the laws that each run ends at.
            num_runs: Restarts, one after another at each step; they become chains.
            tolerance: Stop at a look at which the last step raised no run's bound by more, in nats.
            seed: Of starts and draws; fresh if None, and noted in the posterior.
            progress: Whether to show a progress bar.
            init: What the first laws stand around; see
                :func:`bayesattn.inference.initial_values`. By default the program's
                ``initial_state`` for the first run; others, or all where it has none, start as
                those of other routines.
            checkpoint: File to save the run to, and to go on from where it is there already; see
                :class:`bayesattn.inference.Checkpoint`.
            check_every: Steps between looks at the device: progress, non-finite values, a snapshot.
            **kwargs: The program's keyword arguments.

        Returns:
            Posterior of independent draws, with ``lp`` and ``log_q`` of each, and the bound before
            each step. Runs that disagree, or a bound that fell, are noted in ``attrs["problems"]``,
            with a warning.

        Raises:
            ValueError: If the program, its arguments or ``init`` do not fit, its plates are
                subsampled, or its ``elbo`` is not that of the program and its laws.
            NonFiniteError: If values stop being finite; what there was is attached.
        """
        num_samples = check_count("num_samples", num_samples)
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
            num_samples=num_samples,
        )

    def init(
        self, density: LogDensity, num_runs: int, init: Init, generator: torch.Generator
    ) -> AscentState:
        """Place the laws of each run.

        Raises:
            ValueError: If ``init`` does not fit, or the bound is not the program's.
        """
        model: Any = self.model
        runs = [
            dict(model.law_around(values, *density.args, **density.kwargs))
            for values in self.starts(density, num_runs, init, generator)
        ]
        self._check_bound(density, runs[0])
        return AscentState(tuple(runs))

    def step(self, state: AscentState, *args: Any, **kwargs: Any) -> AscentState:
        """Renew each law of each run once given the program's arguments."""
        model: Any = self.model
        return AscentState(
            tuple(dict(model.coordinate_step(run, *args, **kwargs)) for run in state.runs)
        )

    def values(self, state: AscentState, *args: Any, **kwargs: Any) -> Float[Tensor, " run"]:
        """Evidence lower bound of each run."""
        model: Any = self.model
        return torch.stack([model.elbo(run, *args, **kwargs).sum() for run in state.runs])

    def info(self, values: Float[Tensor, " run"], watched: Watched) -> CoordinateInfo:
        """The bound before a step, and what is watched."""
        return CoordinateInfo(values, watched)

    def finished(
        self, density: LogDensity, state: AscentState, *, num_samples: int, **fields: Any
    ) -> Posterior:
        """Posterior of draws from the laws of a state."""
        drawn = [self._drawn(density, run, num_samples) for run in state.runs]
        draws, unconstrained, lp, log_q = (list(part) for part in zip(*drawn, strict=True))
        bounds = self.values(state, *density.args, **density.kwargs)
        fields["attrs"]["problems"] += [
            f"run {run}: {problem}, so that the elbo is not that of the program and its laws"
            for run, parts in enumerate(zip(bounds, lp, log_q, strict=True))
            if (problem := _bound_problem(density, *parts))
        ]
        fields["attrs"]["problems"] += _disagreement(bounds)
        return self.posterior(
            density,
            {name: torch.stack([values[name] for values in draws]) for name in draws[0]},
            draws_are="iid_guide",
            unconstrained=torch.stack(unconstrained),
            sample_stats={"lp": torch.stack(lp), "log_q": torch.stack(log_q)},
            **fields,
        )

    def _drawn(
        self, density: LogDensity, run: Mapping[str, Tensor], count: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Constrained and unconstrained draws, their log density and that of the laws."""
        model: Any = self.model
        laws = model.laws(run, *density.args, **density.kwargs)
        draws = {site.name: laws[site.name].sample((count,)) for site in density.sites}
        log_q = sum(
            laws[name].log_prob(value).reshape(count, -1).sum(-1) for name, value in draws.items()
        )
        rows = density.unconstrain(draws)
        lp = density.value_and_score(rows, is_in_loop=False)[0]
        return density.constrain(rows), rows, lp, (log_q + density.log_determinant(rows)).to(lp)

    def _check_bound(self, density: LogDensity, run: Mapping[str, Tensor]) -> None:
        bound = self.values(AscentState((dict(run),)), *density.args, **density.kwargs)[0]
        _, _, lp, log_q = self._drawn(density, run, _CHECK_DRAWS)
        problem = _bound_problem(density, bound, lp, log_q)
        if problem:
            raise ValueError(f"at the start {problem}; elbo and laws must be those of the program")


def _bound_problem(
    density: LogDensity,
    bound: Float[Tensor, ""],
    lp: Float[Tensor, " draw"],
    log_q: Float[Tensor, " draw"],
) -> str:
    """Say in words that a bound is not what draws say; empty if it may be, or they are few."""
    if len(lp) < _CHECK_DRAWS:
        return ""
    gaps = (lp - log_q).double()
    mean, error = float(gaps.mean()), float(gaps.std(correction=0)) / len(gaps) ** 0.5
    rounded = float(1 + lp.abs().max() + log_q.abs().max()) * rounding(density, lp) ** 0.5
    if abs(float(bound) - mean) <= _ALLOWED_ERRORS * error + rounded:
        return ""
    return f"the elbo is {float(bound):.6g}, but draws put it at {mean:.6g} ± {error:.2g}"


def _disagreement(bounds: Float[Tensor, " run"]) -> list[str]:
    """Say in words whether runs ended at different optima; empty if not."""
    low, high = float(bounds.min()), float(bounds.max())
    if high - low <= _SAME_BOUND:
        return []
    problem = (
        f"the {len(bounds)} runs disagree: their bounds end between {low:.6g} and {high:.6g} nats, "
        "so that some found a worse optimum or need more steps"
    )
    return [problem]
