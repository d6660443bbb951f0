r"""Stein variational gradient descent: particles pulled by the score, pushed apart by the kernel.

.. math:: \phi(x_i) = \frac1M \sum_j \left[ k(x_j, x_i)\, \frac{\nabla \log p(x_j)}{T}
          + \nabla_{x_j} k(x_j, x_i) \right]

A particle is a copy of all latents (``num_particles``), or one slice of the sites in a plate, such as
one attention head of one network (``particle_plate``). In the second reading one joint evaluation gives
every slice its score given the others, and sites outside of the plate are optimized along.

Source:
    Liu and Wang (2016), Stein variational gradient descent, arXiv:1608.04471, eq. 8.
    Heads as particles: An et al. (2020), Repulsive attention, arXiv:2009.09364.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayesattn.inference.coordinates import Affine, identity, laplace
from bayesattn.inference.initialization import Init, initial_values
from bayesattn.inference.log_density import LogDensity
from bayesattn.inference.posterior import Posterior
from bayesattn.inference.routine import DensityOptions, Optimizer, Routine, StepLoop
from bayesattn.inference.schedules import Schedule, cosine_after_half
from bayesattn.kernels import IMQ, Kernel

__all__ = ["SVGD", "SVGDInfo", "SVGDState", "direction"]


class SVGDState(NamedTuple):
    """What the next step needs; runs are batched.

    Attributes:
        working: Particles in working coordinates: those in which distances are measured.
        outside: Unconstrained values of what is optimized beside the particles; often empty.
        metric: From working to unconstrained coordinates, one for each run.
        optimizer: Torch's own, over the two tensors above, which it moves in place.
        step: Steps done so far.
    """

    working: Float[Tensor, "run particle dim"]
    outside: Float[Tensor, "run outside"]
    metric: Affine
    optimizer: torch.optim.Optimizer
    step: int

    @property
    def particles(self) -> Float[Tensor, "run particle dim"]:
        """Particles in unconstrained coordinates."""
        return self.metric.apply(self.working.detach())


class SVGDInfo(NamedTuple):
    """What the reader of a run needs; never read back.

    Attributes:
        log_density: Mean over evaluations, before the step, in nats.
        stein_norm: Root mean square over particles of the direction's norm.
        bandwidth: Of the kernel, in working coordinates.
        values: Log density of each evaluation.
        scores: By unconstrained coordinates, of each evaluation.
    """

    log_density: Float[Tensor, " run"]
    stein_norm: Float[Tensor, " run"]
    bandwidth: Float[Tensor, " run"]
    values: Float[Tensor, " evaluation"]
    scores: Float[Tensor, "evaluation dim"]


def direction(
    particles: Float[Tensor, "*batch particle dim"],
    score: Float[Tensor, "*batch particle dim"],
    kernel: Kernel,
    temperature: float = 1.0,
) -> Float[Tensor, "*batch particle dim"]:
    """Steepest descent of KL from the particles to p^(1/T), in the kernel's function space.

    Args:
        particles: At least one.
        score: Gradient of the log density at each particle.
        kernel: Gives Gram matrix and repulsion.
        temperature: T; above one the particles spread more.
    """
    gram, repulsion = kernel(particles)
    return (gram @ score / temperature + repulsion) / particles.shape[-2]


class SVGD(Routine):
    """Stein variational gradient descent on a Pyro program.

    Args:
        model: A Pyro program.
        num_particles: Copies of all latents; 100 by default. One particle climbs to a mode (MAP).
        particle_plate: Instead: name of the plate whose slices are the particles of one network.
        outside: With ``particle_plate``, what sites outside of it do: ``"optimize"`` (climb the joint
            log density along) or ``"fixed"`` (stay where they start).
        kernel: In working coordinates; IMQ with the median rule by default.
        optimizer: Makes a torch optimizer of a list of tensors; Adam at 0.1 by default.
        schedule: Factor on the learning rate by progress in [0, 1].
        metric: Working coordinates from the particles' own covariance, every ``metric_every`` steps
            for the first 70 % of a run, then frozen: ``"full"``, ``"diagonal"`` or ``"none"``; ``"auto"``
            takes full from four particles a dimension, else diagonal from 20 particles, else none.
        temperature: T of the target p^(1/T), or a function of progress.
        coordinates: ``"raw"``, or ``"laplace"`` for badly scaled posteriors of some ten dimensions.
        **density: ``compile``, ``chunk_size``, ``stochastic``, ``max_plate_nesting``: see
            :class:`bayesattn.inference.DensitySettings`.

    Raises:
        ValueError: On settings that do not go together.
    """

    metric_every = 50
    metric_until = 0.7

    def __init__(
        self,
        model: Callable,
        *,
        num_particles: int | None = None,
        particle_plate: str | None = None,
        outside: Literal["optimize", "fixed"] = "optimize",
        kernel: Kernel | None = None,
        optimizer: Optimizer | None = None,
        schedule: Schedule = cosine_after_half,
        metric: Literal["auto", "full", "diagonal", "none"] = "auto",
        temperature: float | Schedule = 1.0,
        coordinates: Literal["raw", "laplace"] = "raw",
        **density: Unpack[DensityOptions],
    ):
        super().__init__(model, **density)
        if num_particles is not None and particle_plate is not None:
            raise ValueError(
                "give num_particles (copies of all latents) or particle_plate (slices of one network), "
                f"not both: got {num_particles} and {particle_plate!r}"
            )
        if num_particles is not None and num_particles < 1:
            raise ValueError(f"SVGD needs at least one particle, got num_particles={num_particles}")
        if outside not in ("optimize", "fixed"):
            raise ValueError(f"outside must be 'optimize' or 'fixed', got {outside!r}")
        if metric not in ("auto", "full", "diagonal", "none"):
            raise ValueError(f"metric must be 'auto', 'full', 'diagonal' or 'none', got {metric!r}")
        if coordinates not in ("raw", "laplace"):
            raise ValueError(f"coordinates must be 'raw' or 'laplace', got {coordinates!r}")
        if coordinates == "laplace" and particle_plate is not None:
            raise ValueError(
                "coordinates='laplace' mixes the slices of a plate, so it does not go with particle_plate"
            )
        if not callable(temperature) and not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.num_particles = 100 if num_particles is None else num_particles
        self.particle_plate = particle_plate
        self.outside = outside
        self.kernel = IMQ() if kernel is None else kernel
        self.optimizer = optimizer or functools.partial(torch.optim.Adam, lr=0.1)
        self.schedule = schedule
        self.metric = metric
        self.temperature = temperature if callable(temperature) else lambda _: temperature
        self.coordinates = coordinates

    def run(
        self,
        *args: Any,
        num_steps: int,
        num_runs: int = 1,
        seed: int | None = None,
        progress: bool = True,
        init: Init = None,
        check_every: int = 50,
        **kwargs: Any,
    ) -> Posterior:
        """Move particles to the posterior given the program's arguments.

        Args:
            *args: The program's arguments.
            num_steps: Steps of the optimizer.
            num_runs: Independent restarts, evaluated together; they become chains.
            seed: Of starts and subsamples; fresh if None, and noted in the posterior.
            progress: Whether to show a progress bar.
            init: Where to start; see :func:`bayesattn.inference.initial_values`.
            check_every: Steps between looks at the device: progress, non-finite values, a snapshot.
            **kwargs: The program's keyword arguments.

        Returns:
            Posterior whose draws are particles, or heads of one network a chain.

        Raises:
            NonFiniteError: If values or scores stop being finite; what there was is attached.
        """
        loop = StepLoop("SVGD", num_steps, seed, progress, check_every)
        with loop.random_state():
            density = self.log_density(*args, **kwargs)
            state, view = self._start(density, num_runs, init, loop.generator)
            base_rates = [group["lr"] for group in state.optimizer.param_groups]

            def advance(step: int) -> SVGDInfo:
                nonlocal state
                done = step / num_steps
                for group, rate in zip(state.optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = rate * self.schedule(done)
                if step and step % self.metric_every == 0 and done <= self.metric_until:
                    state = self._with_new_metric(state)
                state, info = self.step(state, density, view, loop.generator, done)
                return info

            def snapshot() -> Tensor:
                return view.assemble(state.particles, state.outside.detach())

            def figures(info: SVGDInfo) -> dict[str, float]:
                return {
                    "log density": float(info.log_density.mean()),
                    "stein norm": float(info.stein_norm.mean()),
                }

            def finish(networks: Tensor, curves: dict[str, Tensor], attrs: dict) -> Posterior:
                return self._posterior(density, view, networks, num_runs, curves, attrs, loop)

            return loop.run(density, advance, snapshot, figures, finish)

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
        if particles.shape[-2] == 0:
            raise ValueError("SVGD needs at least one particle, got none")
        working = metric.invert(particles).detach().clone().requires_grad_()
        outside = outside.detach().clone().requires_grad_(self.outside == "optimize")
        moved = [working, outside] if outside.numel() and self.outside == "optimize" else [working]
        return SVGDState(working, outside, metric, self.optimizer(moved), 0)

    def step(
        self,
        state: SVGDState,
        density: LogDensity,
        view: "WholeParticles | PlateParticles",
        generator: torch.Generator,
        progress: float = 0.0,
    ) -> tuple[SVGDState, SVGDInfo]:
        """Move every particle once along :func:`direction`, by the optimizer's rule."""
        networks = view.assemble(state.particles, state.outside.detach())
        values, scores = density.value_and_score(networks, density.draw_subsample(generator))
        inside, outside = view.split(scores)
        working = state.working.detach()
        phi = direction(
            working, state.metric.pull_back(inside), self.kernel, self.temperature(progress)
        )
        state.working.grad = -phi
        if state.outside.requires_grad:
            state.outside.grad = -outside
        state.optimizer.step()
        num_runs = len(working)
        info = SVGDInfo(
            log_density=values.view(num_runs, -1).mean(-1),
            stein_norm=phi.square().sum(-1).mean(-1).sqrt(),
            bandwidth=self.kernel.squared_bandwidth(working).sqrt().expand(num_runs),
            values=values,
            scores=scores,
        )
        return state._replace(step=state.step + 1), info

    def _start(
        self, density: LogDensity, num_runs: int, init: Init, generator: torch.Generator
    ) -> tuple[SVGDState, "WholeParticles | PlateParticles"]:
        if num_runs < 1:
            raise ValueError(f"num_runs must be at least one, got {num_runs}")
        if self.particle_plate is not None:
            view = PlateParticles(*density.particle_index(self.particle_plate))
            networks = initial_values(density, num_runs, init, generator)
        else:
            view = WholeParticles(num_runs)
            networks = None
        if self.coordinates == "laplace":
            metric = laplace(density, generator=generator)
        else:
            metric = identity(torch.zeros(density.dim, device=density.device, dtype=density.dtype))
        if networks is None and init is None and self.coordinates == "laplace":
            count = (1, num_runs * self.num_particles, density.dim)
            noise = torch.randn(count, generator=generator, dtype=torch.float64)
            networks = metric.apply(noise.to(metric.location))[0]
        elif networks is None:
            networks = initial_values(density, num_runs * self.num_particles, init, generator)
        particles, outside = view.split(networks)
        if self.particle_plate is not None:
            metric = identity(torch.zeros_like(particles[:, 0]))
        else:
            metric = Affine(*(part.expand(num_runs, *part.shape) for part in metric))
        return self.init(particles, outside, metric), view

    def _with_new_metric(self, state: SVGDState) -> SVGDState:
        kind = self._metric_kind(*state.working.shape[-2:])
        if kind == "none":
            return state
        particles = state.particles
        location = particles.mean(-2)
        centered = particles - location[..., None, :]
        count = max(particles.shape[-2] - 1, 1)
        variance = centered.square().sum(-2) / count
        floor = torch.finfo(variance.dtype).tiny ** 0.5
        deviation = variance.clamp(min=floor).sqrt()
        if kind == "full":
            unit = centered / deviation[..., None, :]
            correlation = unit.mT @ unit / count
            eye = torch.eye(correlation.shape[-1], device=unit.device, dtype=unit.dtype)
            ridge = 1e-6 if unit.dtype == torch.float64 else 1e-4
            factor = torch.linalg.cholesky((1 - ridge) * correlation + ridge * eye)
            metric = Affine(location, deviation[..., :, None] * factor)
        else:
            metric = Affine(location, deviation)
        with torch.no_grad():
            state.working.copy_(metric.invert(particles))
        # Momenta belong to the old coordinates.
        state.optimizer.state.pop(state.working, None)
        return state._replace(metric=metric)

    def _metric_kind(self, num_particles: int, dim: int) -> str:
        if self.metric != "auto":
            return self.metric if num_particles > 1 else "none"
        if num_particles >= 4 * dim:
            return "full"
        return "diagonal" if num_particles >= 20 else "none"

    def _posterior(
        self,
        density: LogDensity,
        view: "WholeParticles | PlateParticles",
        networks: Tensor,
        num_runs: int,
        curves: dict[str, Tensor],
        attrs: dict[str, Any],
        loop: StepLoop,
    ) -> Posterior:
        subsample = density.draw_subsample(loop.generator)
        values, scores = density.value_and_score(networks, subsample)
        particles, _ = view.split(networks)
        phi = direction(particles, view.split(scores)[0], self.kernel)
        stats = {"stein_norm": phi.norm(dim=-1)}
        constrained = density.constrain(networks)
        if self.particle_plate is None:
            stats["lp"] = values.view(num_runs, -1)
            return self.posterior(
                density,
                {name: v.unflatten(0, (num_runs, -1)) for name, v in constrained.items()},
                draws_are="particles",
                unconstrained=particles,
                sample_stats=stats,
                optimization=curves,
                attrs=attrs,
            )
        stats["lp"] = values[:, None].expand(stats["stein_norm"].shape).clone()
        axes = {
            site.name: plate.axis
            for site in density.sites
            for plate in site.plates
            if plate.name == self.particle_plate
        }
        return self.posterior(
            density,
            {name: constrained[name].movedim(axis + 1, 1) for name, axis in axes.items()},
            draws_are="heads",
            unconstrained=particles,
            sample_stats=stats,
            optimization=curves,
            point_estimates={n: v for n, v in constrained.items() if n not in axes},
            attrs=attrs | {"particle_plate": self.particle_plate, "particle_plate_axes": axes},
        )


class WholeParticles(NamedTuple):
    """The reading in which a particle is a copy of all latents.

    Attributes:
        num_runs: Clouds evaluated together.
    """

    num_runs: int

    def assemble(
        self, particles: Float[Tensor, "run particle dim"], outside: Tensor
    ) -> Float[Tensor, "evaluation all"]:
        """Unconstrained vectors to evaluate."""
        return particles.flatten(0, 1)

    def split(self, networks: Float[Tensor, "evaluation all"]) -> tuple[Tensor, Tensor]:
        """Particles (or their scores), and what is outside of them."""
        particles = networks.unflatten(0, (self.num_runs, -1))
        return particles, particles.new_zeros(self.num_runs, 0)


class PlateParticles(NamedTuple):
    """The reading in which a particle is one slice of a plate of one network.

    Attributes:
        inside: Entries of the unconstrained vector that belong to each slice.
        outside: The other entries.
    """

    inside: Int[Tensor, "particle dim"]
    outside: Int[Tensor, " outside"]

    def assemble(
        self, particles: Float[Tensor, "run particle dim"], outside: Float[Tensor, "run outside"]
    ) -> Float[Tensor, "evaluation all"]:
        """Unconstrained vectors to evaluate, one a run."""
        width = self.inside.numel() + self.outside.numel()
        networks = particles.new_empty(len(particles), width)
        networks[:, self.inside] = particles
        networks[:, self.outside] = outside
        return networks

    def split(self, networks: Float[Tensor, "evaluation all"]) -> tuple[Tensor, Tensor]:
        """Slices (or their scores), and what is outside of them."""
        return networks[:, self.inside], networks[:, self.outside]
