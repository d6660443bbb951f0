r"""Variational inference: a guide's parameters climb the evidence lower bound.

.. math:: \mathrm{ELBO}(\lambda) = \mathbb{E}_{q_\lambda(u)} [\log p(u) - \log q_\lambda(u)]

With one of the named guides the guide stands over the recorded log density, in raw or Laplace
coordinates. With a guide of the user's, or where the program has parameters to learn, Pyro's ELBO
runs on the program itself.

Source:
    Kucukelbir et al. (2017), Automatic differentiation variational inference, arXiv:1603.00788.
"""

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from bayesattn.argument_checks import check_choice, check_count, check_positive
from bayesattn.inference.checkpoints import Checkpoint, resumed_seed
from bayesattn.inference.convergence import run_problems
from bayesattn.inference.density_fit import DensityFit
from bayesattn.inference.guide_fits import GUIDES, GuideFit, SVIInfo
from bayesattn.inference.initialization import Init
from bayesattn.inference.learned_parameters import copied_guide, learned_names, private_parameters
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.optimizers import Optimizer, ScheduledOptimizer, check_optimizer
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.program_fit import ProgramFit
from bayesattn.inference.routine import DensityOptions, Routine
from bayesattn.inference.running import ConvergenceWarning, NonFiniteError, resolve_seed
from bayesattn.inference.schedules import Number, Schedule, cosine_after_half
from bayesattn.inference.step_loop import StepLoop

__all__ = ["SVI", "SVIInfo"]


class SVI(Routine):
    """Stochastic variational inference on a Pyro program.

    Parameters that the program declares (``pyro.param``, ``pyro.module``, a ``PyroModule``'s) are
    learned along. They are ``point_estimates`` of the posterior, which predicts with them; the
    modules themselves, the guide given and Pyro's parameter store stay as they were.

    Args:
        model: A Pyro program.
        guide: ``"normal"`` (mean-field), ``"multivariate_normal"``, ``"low_rank"``, ``"delta"``
            (MAP of the constrained values, without Jacobian, as Pyro's), or a guide of your own: a
            Pyro program over the same sites, such as an instance of one of Pyro's autoguides.
        optimizer: Makes a torch optimizer of a list of tensors; by default Adam at 0.05
            with a short memory for squares, because first gradients are often huge.
        schedule: Factor on the learning rate by progress in [0, 1].
        num_elbo_particles: Draws of the guide in each estimate of the ELBO.
        init_scale: First standard deviation of a named guide; by default 0.1 in raw coordinates and
            one in Laplace coordinates.
        coordinates: ``"raw"``, or ``"laplace"`` for badly scaled posteriors of some ten dimensions.
        **density: See :class:`bayesattn.inference.DensitySettings`.

    Raises:
        ValueError: On settings that do not go together.
    """

    def __init__(
        self,
        model: Callable,
        *,
        guide: Literal["normal", "multivariate_normal", "low_rank", "delta"] | Callable = "normal",
        optimizer: Optimizer | None = None,
        schedule: Schedule = cosine_after_half,
        num_elbo_particles: int = 1,
        init_scale: Number | None = None,
        coordinates: Literal["raw", "laplace"] = "raw",
        **density: Unpack[DensityOptions],
    ):
        super().__init__(model, **density)
        if (guide not in GUIDES) if isinstance(guide, str) else isinstance(guide, type):
            raise ValueError(
                f"guide must be one of {sorted(GUIDES)} or a Pyro program (an instance where it is "
                f"an autoguide), got {guide!r}"
            )
        if not isinstance(guide, str) and not callable(guide):
            raise ValueError(f"guide must be a name or a Pyro program, got {guide!r}")
        check_choice("coordinates", coordinates, ("raw", "laplace"))
        if coordinates == "laplace" and (not isinstance(guide, str) or guide == "delta"):
            raise ValueError(
                "coordinates='laplace' changes what the guide stands over, so it goes with the "
                f"guides 'normal', 'multivariate_normal' and 'low_rank' only, not with {guide!r}"
            )
        if init_scale is not None:
            check_positive("init_scale", init_scale)
            if not isinstance(guide, str) or guide == "delta":
                raise ValueError(f"init_scale goes with named guides that have one, not {guide!r}")
        self.guide = guide
        self.optimizer = optimizer or functools.partial(
            torch.optim.Adam, lr=0.05, betas=(0.9, 0.99)
        )
        check_optimizer(self.optimizer)
        self.schedule = schedule
        self.num_elbo_particles = check_count("num_elbo_particles", num_elbo_particles)
        self.init_scale = init_scale
        self.coordinates = coordinates

    def run(
        self,
        *args: Any,
        num_steps: int,
        num_samples: int = 1000,
        num_runs: int = 1,
        seed: int | None = None,
        progress: bool = True,
        init: Init = None,
        checkpoint: Checkpoint | str | Path | None = None,
        check_every: int = 50,
        **kwargs: Any,
    ) -> Posterior:
        """Fit the guide given the program's arguments, and draw from it.

        Args:
            *args: The program's arguments.
            num_steps: Steps of the optimizer.
            num_samples: Independent draws of each fitted guide (one for ``"delta"``).
            num_runs: Independent restarts, which become chains.
            seed: Of starts, estimates and draws; fresh if None, and noted in the posterior.
            progress: Whether to show a progress bar.
            init: Where the guide's mean starts; see :func:`bayesattn.inference.initial_values`. Not
                for guides of your own.
            checkpoint: File to save the run to, and to go on from where it is there already; see
                :class:`bayesattn.inference.Checkpoint`. Several runs have one each.
            check_every: Steps between looks at the device: progress, non-finite values, a snapshot.
            **kwargs: The program's keyword arguments.

        Returns:
            Posterior of independent draws of the guide, with ``lp`` and ``log_q`` of each. Runs
            that disagree are noted in ``attrs["problems"]``, with a warning.

        Raises:
            ValueError: If the program, its arguments, the guide or ``init`` do not fit.
            NonFiniteError: If the ELBO or its gradient stops being finite; what there was is
                attached.
        """
        num_samples = check_count("num_samples", num_samples)
        num_runs = check_count("num_runs", num_runs)
        if init is not None and not isinstance(self.guide, str):
            raise ValueError("init goes with named guides; a guide of your own has its own start")
        saved = Checkpoint.each(checkpoint, num_runs)
        seed, began = resolve_seed(resumed_seed(seed, saved[0])), time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**31, (num_runs,), generator=generator).tolist()
        labels = [
            f"SVI {index + 1}/{num_runs}" if num_runs > 1 else "SVI" for index in range(num_runs)
        ]
        loops = [
            StepLoop(label, num_steps, run_seed, progress, check_every)
            for label, run_seed in zip(labels, seeds, strict=True)
        ]
        density = self.log_density(*args, **kwargs)
        learned = learned_names(density)
        self._check_learned(learned)
        runs: list[Posterior] = []

        def together() -> Posterior:
            attrs = {"seed": seed, "seconds": time.perf_counter() - began}
            return self._joined(density, runs, attrs)

        for loop, file in zip(loops, saved, strict=True):
            loop.save_to(file, density, **self._identity() | {"seed": seed})
            with contextlib.ExitStack() as stack:
                stack.enter_context(loop.random_state(density.device))
                guide = copied_guide(self.guide, density)
                stack.enter_context(private_parameters(density, guide))
                fit = self._fit(density, guide, loop, init, num_samples, learned)
                try:
                    runs.append(loop.run(fit))
                except NonFiniteError as error:
                    runs.append(error.posterior)
                    error.posterior = together()
                    raise
            if "interrupted" in runs[-1].attrs:
                break
        posterior = together()
        if posterior.attrs["problems"]:
            problems = "; ".join(posterior.attrs["problems"])
            warnings.warn(f"SVI: {problems}", ConvergenceWarning, stacklevel=2)
        return posterior

    def _identity(self) -> dict[str, Any]:
        """Settings that a run cannot be gone on with if they are others."""
        names = ("guide", "num_elbo_particles", "init_scale", "coordinates", "optimizer")
        return {name: getattr(self, name) for name in (*names, "schedule")}

    def _check_learned(self, learned: Sequence[str]) -> None:
        if learned and self.coordinates == "laplace":
            raise ValueError(
                "coordinates='laplace' needs a density without parameters to learn, but the "
                f"program declares {list(learned)}"
            )

    def _fit(
        self,
        density: LogDensity,
        guide: Any,
        loop: StepLoop,
        init: Init,
        num_samples: int,
        learned: Sequence[str],
    ) -> GuideFit:
        common = {
            "make_optimizer": functools.partial(ScheduledOptimizer, self.optimizer, self.schedule),
            "make_posterior": functools.partial(self.posterior, density),
            "num_elbo_particles": self.num_elbo_particles,
            "num_samples": num_samples,
            "init": init,
            "init_scale": self.init_scale,
        }
        if isinstance(guide, str) and guide != "delta" and not learned:
            is_laplace = self.coordinates == "laplace"
            return DensityFit(density, guide, loop, is_laplace=is_laplace, **common)
        return ProgramFit(density, guide, loop, learned=learned, **common)

    def _joined(
        self, density: LogDensity, runs: Sequence[Posterior], attrs: dict[str, Any]
    ) -> Posterior:
        """Runs as chains of one posterior."""
        unconstrained = torch.cat([r.unconstrained for r in runs if r.unconstrained is not None])
        count = self.num_elbo_particles * sum(run.attrs["num_steps"] for run in runs)
        problems = run_problems(unconstrained, density.site_names)
        return self.posterior(
            density,
            _chains([run.draws for run in runs]),
            draws_are=runs[0].draws_are,
            unconstrained=unconstrained,
            sample_stats=_chains([run.sample_stats for run in runs]),
            optimization=_curves([run.optimization for run in runs]),
            point_estimates=_chains([run.point_estimates for run in runs]),
            attrs=runs[-1].attrs | attrs | {"problems": problems, "gradient_evaluations": count},
        )


def _chains(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _curves(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Curves side by side; one that stopped early is NaN from there on."""
    length = max((curve.shape[1] for part in parts for curve in part.values()), default=0)
    names = dict.fromkeys(name for part in parts for name in part)
    curves = {}
    for name in names:
        like = next(part[name] for part in parts if name in part)
        rows = [part.get(name, like.new_zeros(1, 0)) for part in parts]
        missing = torch.nan
        curves[name] = torch.cat(
            [
                torch.nn.functional.pad(row, (0, length - row.shape[1]), value=missing)
                for row in rows
            ]
        )
    return curves
