"""Stein variational gradient descent on a Pyro program, in both readings of the word particle.

A particle is a copy of all latents (``num_particles``), or one slice of the sites in a plate, such
as one attention head of one network (``particle_plate``). In the second reading one joint
evaluation gives every slice its score given the others, and sites outside of the plate are
optimized along.

Source:
    Liu and Wang (2016), Stein variational gradient descent, arXiv:1608.04471.
    Heads as particles: An et al. (2020), Repulsive attention, arXiv:2009.09364.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from bayesattn.argument_checks import check_choice, check_count, check_positive
from bayesattn.inference import stein
from bayesattn.inference.checkpoints import Checkpoint, resumed_seed
from bayesattn.inference.coordinates import Affine, check_hessians, identity, laplace
from bayesattn.inference.directions import Direction, stein_direction
from bayesattn.inference.initialization import Init, initial_values, set_apart
from bayesattn.inference.learned_parameters import warn_of_held_parameters
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.metrics import MetricChoice, chosen_metric
from bayesattn.inference.optimizers import Optimizer, ScheduledOptimizer, check_optimizer
from bayesattn.inference.particle_views import ParticleView, PlateParticles, WholeParticles
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.routine import DensityOptions, Routine
from bayesattn.inference.schedules import Number, Schedule, cosine_after_half
from bayesattn.inference.stein import Stepper, SVGDInfo, SVGDState, direction
from bayesattn.inference.step_loop import StepLoop
from bayesattn.inference.svgd_run import SVGDRun
from bayesattn.kernels import IMQ, Kernel, SiteKernel, reads_coordinates

__all__ = ["SVGD", "SVGDInfo", "SVGDState", "direction"]


# Given particles from which the mode is searched too.
_FURTHER_STARTS = 20


class SVGD(Routine):
    """Stein variational gradient descent on a Pyro program.

    Args:
        model: A Pyro program.
        num_particles: Copies of all latents; 100 by default. One particle climbs to a mode (MAP).
        particle_plate: Instead: name of the plate whose slices are the particles of one network.
        outside: With ``particle_plate``, what sites outside of it do: ``"optimize"`` (climb the
            joint log density along) or ``"fixed"`` (stay where they start).
        kernel: In working coordinates; IMQ with the median rule by default. With
            :class:`~bayesattn.kernels.PerSite` coordinates of different sites are kept apart: no
            metric or coordinates that mix them. With kernels of features, such as
            :class:`~bayesattn.kernels.Equivariant`, coordinates stay as they are.
        optimizer: Makes a torch optimizer of a list of tensors; Adam at 0.1 by default.
        schedule: Factor on the learning rate by progress in [0, 1].
        metric: Working coordinates from the particles' own covariance, every ``metric_every`` steps
            for the first 70 % of a run, then frozen: ``"full"``, ``"diagonal"`` or ``"none"``;
            ``"auto"`` takes full from four particles a dimension on, else diagonal from 20
            particles on, else none. Or ``"curvature"``: from the average Hessian at the particles,
            however few they are; far from the mode it misleads, so best with ``"laplace"``.
        temperature: T of the target p^(1/T), or a function of progress in [0, 1].
        coordinates: ``"raw"``, or ``"laplace"`` for badly scaled posteriors of some ten dimensions.
        **density: ``compile``, ``chunk_size``, ``stochastic``, ``max_plate_nesting``: see
            :class:`bayesattn.inference.DensitySettings`.

    Raises:
        ValueError: On settings that do not go together.
    """

    metric_every = 50
    metric_until = 0.7
    direction: Direction = staticmethod(stein_direction)

    def __init__(
        self,
        model: Callable,
        *,
        num_particles: int | None = None,
        particle_plate: str | None = None,
        outside: Literal["optimize", "fixed"] = "optimize",
        kernel: Kernel | SiteKernel | None = None,
        optimizer: Optimizer | None = None,
        schedule: Schedule = cosine_after_half,
        metric: MetricChoice = "auto",
        temperature: Number | Schedule = 1.0,
        coordinates: Literal["raw", "laplace"] = "raw",
        **density: Unpack[DensityOptions],
    ):
        super().__init__(model, **density)
        check_choice("outside", outside, ("optimize", "fixed"))
        check_choice("metric", metric, get_args(MetricChoice))
        check_choice("coordinates", coordinates, ("raw", "laplace"))
        if not callable(temperature):
            check_positive("temperature", temperature)
        if particle_plate is None:
            if outside != "optimize":
                raise ValueError(f"outside={outside!r} goes with particle_plate; none was given")
            num_particles = 100 if num_particles is None else num_particles
            num_particles = check_count("num_particles", num_particles)
        elif num_particles is not None:
            raise ValueError(
                "give num_particles (copies of all latents) or particle_plate (slices of one "
                f"network), not both: got {num_particles} and {particle_plate!r}"
            )
        elif coordinates == "laplace":
            raise ValueError(
                "coordinates='laplace' mixes the slices of a plate, so it does not go with "
                f"particle_plate={particle_plate!r}"
            )
        elif metric == "curvature":
            raise ValueError(
                "metric='curvature' is of whole networks, so it does not go with "
                f"particle_plate={particle_plate!r}"
            )
        mixing = {"metric": metric, "coordinates": coordinates}.items()
        for name, choice in mixing if isinstance(kernel, SiteKernel) else ():
            if choice in ("full", "curvature", "laplace"):
                raise ValueError(
                    f"{name}={choice!r} mixes coordinates of different sites, so it does not go "
                    f"with a kernel for each of them: {kernel!r}"
                )
        if reads_coordinates(kernel):
            # Features are of the coordinates that the program has.
            metric = "none" if metric == "auto" else metric
            if metric != "none" or coordinates != "raw":
                raise ValueError(
                    "a kernel of features reads the program's own coordinates: expected "
                    f"metric='none' and coordinates='raw', got metric={metric!r} and "
                    f"coordinates={coordinates!r}"
                )
        self.num_particles, self.particle_plate = num_particles, particle_plate
        self.outside = outside
        self.kernel = IMQ() if kernel is None else kernel
        self.optimizer = optimizer or functools.partial(torch.optim.Adam, lr=0.1)
        check_optimizer(self.optimizer)
        self.schedule = schedule
        self.metric: MetricChoice = metric
        self.temperature = temperature
        self.coordinates = coordinates

    def run(
        self,
        *args: Any,
        num_steps: int,
        num_runs: int = 1,
        seed: int | None = None,
        progress: bool = True,
        init: Init = None,
        checkpoint: Checkpoint | str | Path | None = None,
        stop_below_ksd: Number | None = None,
        check_every: int = 50,
        **kwargs: Any,
    ) -> Posterior:
        """Move particles to the posterior given the program's arguments.

        Args:
            *args: The program's arguments.
            num_steps: Steps of the optimizer.
            num_runs: Independent restarts, evaluated together on the same minibatches; they become
                chains.
            seed: Of starts and subsamples; fresh if None, and noted in the posterior.
            progress: Whether to show a progress bar.
            init: Where to start; see :func:`bayesattn.inference.initial_values`. Particles that
                would start at one place are moved a little apart.
            checkpoint: File to save the run to, and to go on from where it is there already; see
                :class:`bayesattn.inference.Checkpoint`.
            stop_below_ksd: Stop at a look at which the kernel Stein discrepancy of every run is
                below this, as :func:`bayesattn.inference.ksd` measures it.
            check_every: Steps between looks at the device: progress, non-finite values, a snapshot.
            **kwargs: The program's keyword arguments.

        Returns:
            Posterior whose draws are particles, or heads of one network a chain.

        Raises:
            ValueError: If the program, its arguments or ``init`` do not fit.
            NonFiniteError: If values or scores stop being finite; what there was is attached.
        """
        num_runs = check_count("num_runs", num_runs)
        saved = Checkpoint.of(checkpoint)
        seed = resumed_seed(seed, saved)
        name = type(self).__name__
        loop = StepLoop(name, num_steps, seed, progress, check_every)
        density = self.log_density_for(num_steps, args, kwargs)
        warn_of_held_parameters(density, name)
        view = self.view(density, num_runs)
        rule = {"stop_below_ksd": stop_below_ksd, "check_every": stop_below_ksd and check_every}
        loop.save_to(saved, density, num_runs=num_runs, **rule, **self.identity())
        with loop.random_state(density.device):
            run = self.begin(density, view, init, loop, num_runs)
            run.stop_below_ksd = self._checked_stop(stop_below_ksd, density)
            return loop.run(run)

    def begin(
        self, density: LogDensity, view: ParticleView, init: Init, loop: StepLoop, num_runs: int
    ) -> SVGDRun:
        """Place the particles, and make ready for the steps of a loop.

        Raises:
            ValueError: If ``init`` does not fit, particles are too few for the metric, or the
                program has no Hessians for it.
        """
        if self.metric == "curvature":
            check_hessians(density, "metrics of curvature", instead="metric='diagonal'")
        networks, frame = self._starts(density, num_runs, init, loop.generator)
        particles, outside = view.split(networks)
        may_mix = not isinstance(self.kernel, SiteKernel)
        metric = chosen_metric(self.metric, *particles.shape[-2:], may_mix=may_mix)
        apart = set_apart(particles.flatten(0, 1), loop.generator).reshape(particles.shape)
        state = self.init(apart, outside, frame or identity(particles[:, 0]))
        return SVGDRun(self, density, view, state, metric, loop)

    def _checked_stop(self, bound: Number | None, density: LogDensity) -> Number | None:
        if bound is None:
            return None
        check_positive("stop_below_ksd", bound)
        if self.particle_plate is not None or density.program.subsamples:
            raise ValueError(
                "stop_below_ksd needs particles that are whole networks and the full data, since "
                "the discrepancy is measured by their scores"
            )
        return bound

    def identity(self) -> dict[str, Any]:
        """Settings that a run cannot be gone on with if they are others."""
        names = ("num_particles", "particle_plate", "outside", "metric", "coordinates", "kernel")
        names = (*names, "optimizer", "schedule", "temperature")
        return {name: getattr(self, name) for name in names}

    def view(self, density: LogDensity, num_runs: int) -> ParticleView:
        """What a particle is.

        Raises:
            ValueError: If no latent site stands in the plate.
        """
        if self.particle_plate is None:
            return WholeParticles(num_runs)
        return PlateParticles.of(density, self.particle_plate)

    def init(
        self,
        particles: Float[Tensor, "run particle dim"],
        outside: Float[Tensor, "run outside"],
        metric: Affine,
    ) -> SVGDState:
        """Start from given unconstrained particles.

        Raises:
            ValueError: Without particles.
        """
        make = functools.partial(ScheduledOptimizer, self.optimizer, self.schedule)
        is_moved = self.outside == "optimize"
        return stein.init(particles, outside, metric, make, move_outside=is_moved)

    def step(
        self,
        state: SVGDState,
        stepper: Stepper,
        generator: torch.Generator,
        progress: float = 0.0,
    ) -> tuple[SVGDState, SVGDInfo]:
        """Move all particles once with these settings, on fresh subsamples.

        Args:
            state: Its tensors are moved in place.
            stepper: Of the log density; see :meth:`stepper`.
            generator: Draws the subsamples.
            progress: In [0, 1], for schedules.
        """
        info = stepper(
            state,
            subsample=stepper.density.draw_subsample(generator),
            temperature=self.temperature_at(progress),
            progress=progress,
        )
        return state, info

    def stepper(self, density: LogDensity, view: ParticleView) -> Stepper:
        """Steps with these settings on a log density."""
        return Stepper(density, view, self.kernel_of(density, view), self.direction)

    def kernel_of(self, density: LogDensity, view: ParticleView) -> Kernel:
        """The kernel of particles such as the view makes them.

        Raises:
            ValueError: If it was given kernels for sites that a particle does not have.
        """
        kernel = self.kernel
        return kernel.over(view.widths(density)) if isinstance(kernel, SiteKernel) else kernel

    def temperature_at(self, progress: float) -> Number:
        """T at a progress in [0, 1].

        Raises:
            ValueError: If the function of progress does not give a positive number.
        """
        if not callable(self.temperature):
            return self.temperature
        temperature = self.temperature(progress)
        check_positive(f"temperature({progress:.3g})", temperature)
        return temperature

    def _starts(
        self, density: LogDensity, num_runs: int, init: Init, generator: torch.Generator
    ) -> tuple[Float[Tensor, "evaluation all"], Affine | None]:
        """Unconstrained vectors to start from, and coordinates other than raw."""
        count = num_runs * (self.num_particles or 1)
        points = None if init is None else initial_values(density, count, init, generator)
        if self.coordinates == "raw":
            points = initial_values(density, count, None, generator) if points is None else points
            return points, None
        further = None if points is None else points[:_FURTHER_STARTS]
        frame = laplace(density, generator=generator, starts=further)
        if points is None:
            noise = torch.randn(count, density.dim, generator=generator, dtype=torch.float64)
            points = frame.apply(noise.to(frame.location))
        return points, frame.expand(num_runs)
